"""The one configuration tree: typed, frozen, validated when it is built.

A preset is a Python file in `configs/` with a variable `config`. Any field can be overridden on the
command line (`--optimizer.learning-rate 3e-4`). Fields marked "our decision" stand where the paper
is silent: docs/decisions.md has the reasons.
"""

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import tyro

from squeeze_jax.config_checks import Checked, above_zero, between
from squeeze_jax.config_data import CrittersConfig as CrittersConfig
from squeeze_jax.config_data import DataConfig
from squeeze_jax.config_data import EmojiConfig as EmojiConfig
from squeeze_jax.config_flags import set_optional
from squeeze_jax.config_names import current_flag
from squeeze_jax.diffusion.flow import TimeSampling, no_shift
from squeeze_jax.diffusion.latents import PATCH
from squeeze_jax.diffusion.stages import MAX_TAU, ConditionDropout
from squeeze_jax.errors import InputError
from squeeze_jax.finite import not_finite
from squeeze_jax.layers.lora import LoRAConfig
from squeeze_jax.layers.stack import REMAT, Remat
from squeeze_jax.models.aggregator import AggregatorConfig
from squeeze_jax.models.dit import DiTConfig
from squeeze_jax.models.flux2 import Flux2Config
from squeeze_jax.preset_files import find_preset

Precision = Literal["float32", "bfloat16"]
TransformerConfig = DiTConfig | Flux2Config
"""A published family of transformers (`interop.formats`), and its sizes."""


@dataclass(frozen=True)
class ModelConfig(Checked):
    """The transformer, and where the frozen parts come from."""

    dit: TransformerConfig = field(default_factory=DiTConfig)
    """FLUX.1's sizes, or FLUX.2's."""
    dit_weights: str | None = None
    """Folder of the pre-trained transformer (safetensors, diffusers layout); None starts from
    random weights."""
    autoencoder: str = "demo"
    """Folder of the autoencoder; `demo` and `emoji` are the shipped miniatures'."""
    mllm: str = "demo"
    """Folder of the multimodal LLM; `demo` and `emoji` are the shipped miniatures'."""
    mllm_source: Literal["internvl", "transformers"] = "internvl"
    """What runs it: our InternVL, or transformers in PyTorch, which takes any image-text-to-text
    model."""
    latent_pixels: int = 8
    """Pixels that a latent stands for along one side: the autoencoder's downsampling (FLUX.1: 8,
    the miniature: 4)."""
    frozen_dtype: Literal["float32", "bfloat16", "int8"] = "bfloat16"
    """What frozen weights are kept in; `int8` (extra `quantize`): the blocks' kernels, each
    output channel with a scale."""
    dtype: Precision = "bfloat16"
    """What activations are computed in; norms, softmax, modulation, rotary phases, scales and
    loss are float32 always (docs/decisions.md, "Float32 and bfloat16")."""

    def _problems(self) -> Iterator[str]:
        if self.latent_pixels not in (1, 2, 4, 8):
            yield f"model.latent_pixels is {self.latent_pixels}; it must be 1, 2, 4 or 8"
        kinds = get_args(Precision)
        if self.dtype not in kinds or self.frozen_dtype not in (*kinds, "int8"):
            yield (
                f"model.dtype and model.frozen_dtype must each be one of {', '.join(kinds)}; "
                "the latter may be int8, too"
            )


@dataclass(frozen=True)
class DiffusionConfig:
    """How times are drawn and which distilled guidance value the transformer is told."""

    time_sampling: TimeSampling = "shifted_uniform"
    """Our decision: uniform times, shifted as the sampler's are (`sampling.shifted`);
    `logit_normal` looks at the middle more often."""
    guidance: float = 1.0
    """FLUX.1-dev's distilled guidance input, in training and sampling (our decision)."""


WITH_REFERENCES = ConditionDropout()
WITHOUT_REFERENCES = ConditionDropout(both=0.0, mllm=0.9, vae=0.0, neither=0.1)


@dataclass(frozen=True)
class StageConfig:
    """One training stage. The paper: 25,000 steps with the MLLM alone, then 10,000 with both
    conditions."""

    steps: int
    references: bool
    """Whether reference tokens take part."""
    dropout: ConditionDropout = WITH_REFERENCES
    """Which conditions a sample keeps; without references `both` and `mllm` together are the share
    that keeps the MLLM. Where a stage without references is given none, it drops the MLLM in a
    tenth of the samples (our decision)."""

    def __post_init__(self) -> None:
        # By identity: equal values that were given, as an old run's config has them, stay.
        if self.dropout is WITH_REFERENCES and not self.references:
            object.__setattr__(self, "dropout", WITHOUT_REFERENCES)


@dataclass(frozen=True)
class OptimizerConfig(Checked):
    """AdamW with warm-up and clipping (our decision throughout: docs/decisions.md, "Optimizer")."""

    kind: Literal["adamw", "muon"] = "adamw"
    """`muon` orthogonalises the updates of matrices (AdamW moves the rest): fewer, dearer steps,
    for small models."""
    learning_rate: float = 1e-4
    """Peak rate; with `muon` that of the matrices."""
    vector_learning_rate: float = 2e-3
    """Peak rate of what `muon` leaves to AdamW; unused by `adamw`."""
    warmup_steps: int = 100
    """Linear warm-up at the start of each stage."""
    decay: Literal["constant", "cosine"] = "constant"
    """What the rate does after the warm-up, over each stage; cosine ends at a twentieth of the
    peak."""
    b1: float = 0.9
    b2: float = 0.999
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    accumulate: int = 1
    """Batches whose gradients are averaged into one update."""
    ema: float = 0.0
    """Decay of the running average of trained weights that sampling uses; 0 keeps none."""

    def _problems(self) -> Iterator[str]:
        yield from between(0.0, 0.999999, "optimizer", self, "ema", "b1", "b2")
        yield from above_zero("optimizer", self, "learning_rate", "clip_norm", "accumulate")


@dataclass(frozen=True)
class TrainingConfig(Checked):
    """What a run does from start to end."""

    stages: tuple[StageConfig, ...] = (StageConfig(steps=10_000, references=True),)
    """Stages in order; a run goes through all of them."""
    seed: int = 0
    """Decides initial weights, data order, noise, times and dropout."""
    steps_before: int = 0
    """Steps that the weights of `--from` have behind them, which sets it: data order, noise, times
    and dropout go on after these."""
    validate_every: int = 500
    sample_every: int = 1000
    """Steps between grids of sampled pictures; 0 draws none before the end."""

    def _problems(self) -> Iterator[str]:
        if not self.stages:
            yield "training.stages is empty; give at least one stage"
        for i, stage in enumerate(self.stages):
            if stage.steps < 1:
                yield f"training.stages.{i}.steps is {stage.steps}; it must be at least 1"
        if self.steps_before < 0:
            yield f"training.steps_before is {self.steps_before}; it must be at least 0"
        yield from above_zero("training", self, "validate_every")


@dataclass(frozen=True)
class SamplingConfig(Checked):
    """Defaults of `sample.py` for checkpoints of this config."""

    steps: int = 25
    tau1: float = 0.95
    """At t ≥ τ1 the MLLM's tokens alone (paper). Above 1 (to 1.1) no step has them alone."""
    tau2: float = 0.85
    """At t < τ2 the references' tokens alone (paper). 0: never; above 1: always."""
    tau_tokens: int | None = None
    """Target tokens that τ1 and τ2 are stated for: at other sizes they move with the noise level
    at which the layout is settled (`diffusion.stages.carry_tau`). None: they stay as they are,
    as in the paper."""
    cfg_scale: float = 2.5
    """Classifier-free guidance (paper); 1 is off."""
    shifted: bool = True
    """Whether the model's times are shifted, in sampling and in training: FLUX.1-dev's are,
    FLUX.1-schnell's are not."""

    def _problems(self) -> Iterator[str]:
        if self.tau2 > self.tau1:
            yield f"sampling.tau2 {self.tau2} must not be larger than sampling.tau1 {self.tau1}"
        yield from between(0.0, MAX_TAU, "sampling", self, "tau1", "tau2")
        yield from above_zero("sampling", self, "steps")
        if self.tau_tokens is not None and self.tau_tokens < 1:
            yield (
                f"sampling.tau_tokens is {self.tau_tokens}; "
                "it must be a number of target tokens, or None"
            )


@dataclass(frozen=True)
class ParallelConfig(Checked):
    """Mesh and memory."""

    data: int = 1
    fsdp: int = -1
    """-1: all the devices that the other axes leave."""
    tensor: int = 1
    remat: Remat = "none"
    """What the backward pass keeps: `layers.stack.scan_blocks` explains the names."""
    unroll: int = 1
    """Blocks of a stack unrolled in the scan: more compile time for fewer copies; pays on CPUs."""

    def _problems(self) -> Iterator[str]:
        if self.remat not in REMAT:
            yield f"parallel.remat is {self.remat!r}; choose one of {', '.join(REMAT)}"


@dataclass(frozen=True)
class CheckpointConfig(Checked):
    """When a run's state is saved, and what stays on disk."""

    every: int = 500
    """Steps between saves; the last step of a run is saved always."""
    keep: int = 2
    """The newest checkpoints that stay on disk."""
    keep_every: int = 0
    """Checkpoints whose step is a multiple of this stay for ever; 0: none does."""

    def _problems(self) -> Iterator[str]:
        yield from above_zero("checkpoint", self, "every", "keep")


@dataclass(frozen=True)
class LogConfig(Checked):
    """What a run notes and draws of itself."""

    every: int = 20
    """Steps between lines of metrics.jsonl and TensorBoard."""
    tensorboard: bool = True
    profile: tuple[int, int] | None = None
    """First and last step to trace with `jax.profiler`, into the work folder's `profile`."""
    grid: int = 8
    """Held-out pairs in a sample grid."""
    score: int = 0
    """Held-out critters to score by retrieval at the end of a run; 0 scores none."""

    def _problems(self) -> Iterator[str]:
        if self.grid < 0:
            yield f"log.grid is {self.grid}; it must be at least 0 (0: no pictures)"
        yield from above_zero("log", self, "every")


@dataclass(frozen=True)
class Config(Checked):
    """Everything that decides a run."""

    name: str
    model: ModelConfig = field(default_factory=ModelConfig)
    aggregator: AggregatorConfig = field(default_factory=AggregatorConfig)
    lora: LoRAConfig | None = field(default_factory=LoRAConfig)
    """None trains the whole transformer: for small ones."""
    data: DataConfig = field(default_factory=DataConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def _problems(self) -> Iterator[str]:
        """Yields a sentence for what cannot work between sections; each checks itself."""
        yield from not_finite(self)
        dit, aggregator, model, data = self.model.dit, self.aggregator, self.model, self.data
        if aggregator.out_width != dit.context_width:
            yield (
                f"aggregator.out_width {aggregator.out_width} must equal model.dit.context_width "
                f"{dit.context_width}, since the aggregator's tokens enter the transformer there"
            )
        if data.max_tiles != 1 and model.mllm_source != "internvl":
            yield (
                f"data.max_tiles is {data.max_tiles}, which only model.mllm_source internvl reads; "
                "leave it at 1"
            )
        if data.online and model.mllm_source != "internvl":
            yield (
                "data.online runs our InternVL in the program; "
                "set model.mllm_source internvl, or extract records"
            )
        if data.long_captions == "cut" and model.mllm_source != "internvl":
            yield (
                "data.long_captions cut counts tokens as our InternVL reads them; "
                "set model.mllm_source internvl, or long_captions refuse"
            )
        profile, last = self.log.profile, self.total_steps
        if profile is not None and not 1 <= profile[0] <= profile[1] <= last:
            yield f"log.profile is {profile}; give the first and the last of steps 1 to {last}"
        if model.frozen_dtype == "int8" and self.lora is None:
            yield (
                "model.frozen_dtype is int8, which cannot be trained; "
                "set lora, or keep the weights in float32"
            )

    @property
    def target_grid(self) -> tuple[int, int]:
        """Rows and columns of target tokens."""
        return self.grid(self.data.height, self.data.width)

    @property
    def training_grids(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of the target tokens of every size that is trained on."""
        return tuple(self.grid(*size) for size in self.data.buckets) or (self.target_grid,)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens of a picture: the autoencoder's downsampling, then 2 x 2
        patches."""
        side = PATCH * self.model.latent_pixels
        return height // side, width // side

    def schedule_shift(self, target_tokens: int, steps: int) -> float:
        """μ by which the model's times are shifted, in sampling and in training.

        Training takes it at `sampling.steps` (docs/decisions.md, "Training times").
        """
        if not self.sampling.shifted:
            return no_shift(target_tokens, steps)
        return self.model.dit.schedule_shift(target_tokens, steps)

    @property
    def total_steps(self) -> int:
        """Of all training stages together."""
        return sum(stage.steps for stage in self.training.stages)


def global_batch(config: Config, mesh_shape: Mapping[str, int]) -> int:
    """Returns the examples that one update sees, all its accumulated batches together.

    Devices along the mesh's data and fsdp axes have examples of their own; those along the tensor
    axis share them.
    """
    rows = config.data.batch_per_chip * mesh_shape["data"] * mesh_shape["fsdp"]
    return rows * config.optimizer.accumulate


def load_preset(path: str | Path) -> Config:
    """The `config` of a preset: a file, or the name of a shipped one. Raises InputError if there is
    none."""
    path = find_preset(path)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = getattr(module, "config", None)
    if not isinstance(config, Config):
        raise InputError(
            f"{path} must define `config`, a squeeze_jax.config.Config; it has {type(config).__name__}"
        )
    return config


def override(config: Config, arguments: list[str], prog: str) -> Config:
    """`config` with `--path.to.field value` applied; old names of fields count, too.

    `--section None` leaves an optional section out (`lora`, `data.critters`). For an unknown field
    tyro prints the nearest ones and exits with 2.
    """
    config, left = set_optional(config, [*map(current_flag, arguments)])
    # Without the marker a union would be a subcommand; the kind that the default is of, stays.
    kind = tyro.conf.AvoidSubcommands[Config]
    return tyro.cli(kind, default=config, args=left, prog=prog)
