"""Prompt and reference pictures in, pictures out: load once, sample many."""

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from PIL import Image

from squeeze_jax.batch import HiddenStates
from squeeze_jax.checkpoints.inference import convert_for_sampling
from squeeze_jax.checkpoints.manager import read_config
from squeeze_jax.checkpoints.trained import load_trained
from squeeze_jax.config import Config
from squeeze_jax.data.feature_extractor import FeatureExtractor
from squeeze_jax.data.images import to_rgb
from squeeze_jax.data.placement import data_parallel_size, mesh_of, shard_inputs
from squeeze_jax.data.references import encode_references
from squeeze_jax.diffusion.latents import (
    unpack,
)
from squeeze_jax.errors import InputError
from squeeze_jax.interop.load import checkpoint_folder
from squeeze_jax.layers.int8 import quantise
from squeeze_jax.layers.stack import is_unstacked, unstack
from squeeze_jax.models.dit import BLOCK_STACKS
from squeeze_jax.models.system import System
from squeeze_jax.processes import to_host
from squeeze_jax.sampling.batching import pad_references, plan_batches
from squeeze_jax.sampling.denoiser import Prepared
from squeeze_jax.sampling.sampler import Sampler, SolverState, initial_state, make_sampler
from squeeze_jax.sampling.schedule import MAX_STEPS, Schedule, noise_for
from squeeze_jax.sampling.settings import Resolved, Settings, resolve
from squeeze_jax.storage import AnyPath


class Progress(NamedTuple):
    """Where a run stands."""

    step: int
    """Steps done, from 1 to `steps`."""
    steps: int
    stage: str
    """What the last step saw: one of `sampling.schedule.STAGE_NAMES`."""
    tokens: jax.Array
    """Latent tokens [images, N, c], noisy before the last step."""


class Ready(NamedTuple):
    """Prompts of which images can be drawn: all that is made once for them."""

    sampler: Sampler
    prepared: Prepared
    """A row a prompt."""
    schedule: Schedule
    scales: jax.Array
    settings: Resolved


class Run(NamedTuple):
    """A batch of images about to be drawn."""

    sampler: Sampler
    state: SolverState
    prepared: Prepared
    schedule: Schedule
    scales: jax.Array


@dataclass
class Pipeline:
    """A trained system with its encoders. Programs are compiled at first use and kept."""

    config: Config
    encoders: FeatureExtractor
    graphdef: Any
    params: tuple[Any, ...]
    step: int | None = None
    int8: bool = False
    """Whether the transformer's blocks are in 8 bits a weight: `quantised`."""
    keep_mllm: bool = True
    """Whether the MLLM stays after a prompt is read; else it is freed, and read again for the next."""
    _programs: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def load(
        cls,
        checkpoint: str | AnyPath | None = None,
        mesh: Mesh | None = None,
        *,
        merge_lora: bool = True,
        keep_mllm: bool = True,
        encoders: FeatureExtractor | None = None,
    ) -> "Pipeline":
        """From a work folder (also gs://bucket/…), a weights or an exported one; None is the shipped miniature.

        On a `mesh` (`sampling.layout.sampling_mesh` chooses one) every device reads and keeps its
        own slices of all weights, the encoders' included; without one all lie on one device.
        Adapters are merged into the base, which changes what is drawn by that one rounding;
        `merge_lora=False` computes them beside it, as training does. Do so before `quantised`, in
        whose steps a merged adapter would drown. `encoders` are the config's own that are there
        already (`FeatureExtractor.of`). Raises InputError for a folder that cannot be used.
        """
        folder = checkpoint_folder(checkpoint)
        if encoders is None and not keep_mllm:
            # The MLLM has come and gone before the transformer is there: both need not fit.
            encoders = FeatureExtractor.of(read_config(folder), mesh)
            encoders.forget_reader()
        trained = load_trained(folder, mesh=mesh)
        system = convert_for_sampling(trained.system, trained.config, merge_lora=merge_lora)
        encoders = FeatureExtractor.of(trained.config, mesh) if encoders is None else encoders
        pipeline = cls.of(system, trained.config, encoders, trained.step)
        return dataclasses.replace(pipeline, keep_mllm=keep_mllm)

    @classmethod
    def of(
        cls,
        system: System,
        config: Config,
        encoders: FeatureExtractor | None = None,
        step: int | None = None,
    ):
        """Around a system in memory."""
        if encoders is None:
            encoders = FeatureExtractor.of(config)
        graphdef, state = nnx.split(system)
        return cls(config, encoders, graphdef, (state,), step)

    def unrolled(self) -> "Pipeline":
        """This pipeline for a service on one GPU: no block's matrices are copied before they are
        used, at the price of minutes to compile (`layers.stack.unstack`). The old pipeline's
        weights are freed: it draws no more."""
        params = tuple(unstack(state, BLOCK_STACKS, donate=True) for state in self.params)
        return dataclasses.replace(self, params=params, _programs={})

    def quantised(self) -> "Pipeline":
        """This pipeline with the transformer's blocks in 8 bits a weight (`layers.int8`): half
        of bfloat16's memory, at a small loss. Raises InputError where qwix is not installed, and
        after `unrolled`."""
        if any(
            is_unstacked(leaf)
            for state in self.params
            for leaf in jax.tree.leaves(state, is_leaf=is_unstacked)
        ):
            raise InputError(
                "this pipeline is unrolled already; call quantised() first and unrolled() after it"
            )
        own = jax.tree.map(lambda x: x, self.params)  # the same arrays in other variables
        system = nnx.merge(self.graphdef, *own)
        quantise(system.dit)
        graphdef, state = nnx.split(system)
        return dataclasses.replace(
            self, graphdef=graphdef, params=(state,), int8=True, _programs={}
        )

    @property
    def uses_references(self) -> bool:
        """Whether reference tokens took part in training."""
        return any(stage.references for stage in self.config.training.stages)

    def resolved(self, settings: Settings) -> Resolved:
        """The settings with the config's values filled in (`sampling.settings.resolve`)."""
        return resolve(settings, self.config, int8=self.int8)

    def __call__(
        self,
        prompt: str | Sequence[str],
        references: Sequence[Image.Image] | Sequence[Sequence[Image.Image]] = (),
        settings: Settings = Settings(),
        at_once: int = 16,
    ) -> np.ndarray:
        """Pictures [prompts · num_images, height, width, 3] in [−1, 1] of the references' subjects
        doing what each prompt says, prompt by prompt.

        `references` are those of the prompt, or one list for each of several prompts. Without
        references the MLLM's condition stays on throughout. `at_once` images at most are drawn
        together (on a mesh, at least one for every place that holds examples); of more, a batch's
        pictures are fetched while the next one is drawn. Raises InputError for an empty or too long
        prompt, sizes that are no multiples of 16, and impossible steps or τ.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        shown: Any = [references] if isinstance(prompt, str) else references or [()] * len(prompts)
        if len(prompts) != len(shown):
            raise InputError(
                f"{len(prompts)} prompts and {len(shown)} lists of references; give one list a prompt"
            )
        if not prompts or at_once < 1:
            raise InputError(f"{len(prompts)} prompts, at_once {at_once}: both must be at least 1")
        resolved, places = self.resolved(settings), data_parallel_size(mesh_of(self.params))
        self._warn_of_empty_stages(resolved, any(shown))
        images = range(resolved.num_images)
        parts, fews = plan_batches(shown, resolved.num_images, at_once, places)

        def batches() -> Iterator[tuple[Ready, list[int]]]:
            for part in parts:
                ready = self.ready(
                    *self.encode([prompts[i] for i in part], [shown[i] for i in part]), settings
                )
                for few in fews:
                    yield ready, [resolved.seeds[i] for i in few] * len(part)

        drawn: dict[tuple[int, int], np.ndarray] = {}
        pieces = [(part, few) for part in parts for few in fews]
        for (part, few), pictures in zip(pieces, self.draw(batches())):
            drawn |= zip(((row, image) for row in part for image in few), pictures)
        return np.stack([drawn[row, image] for row in range(len(prompts)) for image in images])

    def _warn_of_empty_stages(self, resolved: Resolved, references: bool) -> None:
        """Warns the caller's caller."""
        for sentence in resolved.empty_stages(self.config, references and self.uses_references):
            warnings.warn(sentence, stacklevel=3)

    def draw(self, batches: Iterable[tuple[Ready, Sequence[int]]]) -> Iterator[np.ndarray]:
        """Pictures [B, height, width, 3] of one batch of prompts and seeds after the other: see
        `sample`.

        A batch's pictures are fetched, and whatever the caller does with them done, when the next
        one is under way.
        """
        before = None
        for ready, seeds in batches:
            drawn = self.decode_later(self._all_steps(self.begin(ready, seeds)), ready.settings)
            if before is not None:
                yield before()
            before = drawn
        if before is not None:
            yield before()

    def stream(
        self,
        prompt: str,
        references: Sequence[Image.Image] = (),
        settings: Settings = Settings(),
        every: int = 1,
    ) -> Iterator[Progress]:
        """Draws one prompt's images, all at once, and says where it stands after every `every`
        steps and at the end.

        Raises InputError as a call does.
        """
        resolved = self.resolved(settings)
        self._warn_of_empty_stages(resolved, bool(references))
        ready = self.ready(*self.encode([prompt], [references]), settings)
        yield from self.stream_ready(ready, resolved.seeds, every)

    def stream_ready(
        self, ready: Ready, seeds: Sequence[int], every: int = 1
    ) -> Iterator[Progress]:
        """`stream` of images of prompts that are `ready`. Raises InputError where `every` is below
        1."""
        if every < 1:
            raise InputError(f"every is {every}; it must be at least 1")
        run, steps = self.begin(ready, seeds), ready.settings.steps
        state, stages = run.state, run.schedule.stage_names(steps)
        for start in range(0, steps, every):
            end = min(start + every, steps)
            span = np.array([start, end], np.int32)
            state = run.sampler.denoise(
                self.params, state, run.prepared, run.schedule, run.scales, span
            )
            yield Progress(end, steps, stages[end - 1], state.x)

    def encode(
        self, prompts: Sequence[str], references: Sequence[Sequence[Image.Image]]
    ) -> tuple[HiddenStates, list[list[np.ndarray]]]:
        """What the frozen encoders make of prompts and their references, latents [h, w, c] each:
        once, whatever is drawn from it."""
        encoded = encode_prompts(self.encoders, self.config, prompts, references)
        if not self.keep_mllm:
            self.encoders.forget_reader()
        return encoded

    def sample(
        self,
        states: HiddenStates,
        latents: Sequence[Sequence[np.ndarray]],
        seeds: Sequence[int],
        settings: Settings = Settings(),
    ) -> jax.Array:
        """Latent tokens [len(seeds), N, c] from hidden states and reference latents of as many
        prompts as divide the seeds: each prompt's images stand in a row."""
        return self._all_steps(self.run(states, latents, seeds, settings))

    def _all_steps(self, run: Run) -> jax.Array:
        whole = np.array([0, MAX_STEPS], np.int32)
        return run.sampler.denoise(
            self.params, run.state, run.prepared, run.schedule, run.scales, whole
        ).x

    def run(
        self,
        states: HiddenStates,
        latents: Sequence[Sequence[np.ndarray]],
        seeds: Sequence[int],
        settings: Settings = Settings(),
    ) -> Run:
        """Everything that comes before the steps of `sample`; `latents` as `encode` gives them,
        [h, w, c] each."""
        return self.begin(self.ready(states, latents, settings), seeds)

    def ready(
        self,
        states: HiddenStates,
        latents: Sequence[Sequence[np.ndarray]],
        settings: Settings = Settings(),
    ) -> Ready:
        """What is made once for prompts, however many images are then drawn: the context, the
        references as the transformer sees them, all modulation.

        Raises InputError for prompts with references beside others without: their stages differ.
        `latents` as `encode` gives them, [h, w, c] each.
        """
        resolved = self.resolved(settings)
        grid = self.config.grid(resolved.height, resolved.width)
        references = pad_references(latents, grid, self.config.model.dit.reference_positions)
        # A system trained on the MLLM alone has never seen reference tokens: it samples without
        # them (docs/decisions.md, "Sampling without references").
        if not self.uses_references:
            references = None
        elif len({bool(row) for row in latents}) > 1:
            raise InputError(
                "some prompts have references and some have none: draw them apart, since their stages differ"
            )
        schedule = resolved.make_schedule(self.config, references is not None)
        mesh = mesh_of(self.params)
        key = grid, tuple(scale != 1.0 for scale in resolved.scales), resolved.solver_config
        sampler = self._programs.get(key)
        if sampler is None:
            guidance = self.config.diffusion.guidance
            sampler = make_sampler(
                self.graphdef, target_grid=grid, guided=key[1], guidance=guidance, solver=resolved.solver_config,
                width=self.config.model.dit.width, mesh=mesh,
            )  # fmt: skip
            self._programs[key] = sampler
        states, references = shard_inputs(mesh, (states, references))
        prepared = sampler.prepare(self.params, states, references, schedule)
        return Ready(
            sampler, prepared, schedule, jnp.asarray(resolved.scales, jnp.float32), resolved
        )

    def begin(self, ready: Ready, seeds: Sequence[int]) -> Run:
        """A run of as many images as there are seeds, each prompt's in a row. Raises InputError
        where the seeds do not divide evenly among the prompts."""
        mesh, (rows, columns) = (
            mesh_of(self.params),
            self.config.grid(ready.settings.height, ready.settings.width),
        )
        prompts = ready.prepared.context.mask.shape[0]
        if not seeds or len(seeds) % prompts:
            raise InputError(f"{len(seeds)} seeds for {prompts} prompts; give each prompt as many")
        noise = shard_inputs(
            mesh, noise_for(list(seeds), rows * columns, self.config.model.dit.in_channels)
        )
        state = initial_state(noise, ready.settings.solver_config, self.config.model.dit.width)
        if (
            mesh is None
        ):  # said where it lies, as every later state is: the first step is then no program of its own
            state = jax.device_put(state, next(iter(jax.tree.leaves(ready.prepared)[0].devices())))
        return Run(ready.sampler, state, ready.prepared, ready.schedule, ready.scales)

    def decode(self, tokens: jax.Array, settings: Settings = Settings()) -> np.ndarray:
        """Pictures [B, height, width, 3] in [−1, 1] of latent tokens."""
        return self.decode_later(tokens, settings)()

    def decode_later(
        self, tokens: jax.Array, settings: Settings | Resolved
    ) -> Callable[[], np.ndarray]:
        """`decode` of tokens [B, N, c] begun; what is returned waits for its end."""
        resolved = settings if isinstance(settings, Resolved) else self.resolved(settings)
        # Encoders on one device cannot read what lies on many.
        spread = isinstance(tokens, jax.Array) and len(tokens.devices()) > 1
        spread = spread and self.encoders.mesh is None
        latents = unpack(
            to_host(tokens) if spread else tokens, self.config.grid(resolved.height, resolved.width)
        )
        pictures = self.encoders.decode_later(latents)
        return lambda: np.clip(pictures(), -1.0, 1.0)


def encode_prompts(
    encoders: FeatureExtractor,
    config: Config,
    prompts: Sequence[str],
    references: Sequence[Sequence[Image.Image]],
) -> tuple[HiddenStates, list[list[np.ndarray]]]:
    """`Pipeline.encode` (latents [h, w, c]) with a config's encoders, before or without a
    transformer."""
    upright = [[to_rgb(image) for image in row] for row in references]
    latents = encode_references(encoders, upright, config.data.reference_long_side)
    return encoders.read(list(prompts), upright), latents
