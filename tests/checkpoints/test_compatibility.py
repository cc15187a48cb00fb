"""Every field of the config has a decision, and loaded weights compute what the decision says."""

import ast
import dataclasses
import re
import shlex
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import LAYERS, STAGE, randomised, tiny_batch, tiny_config

from squeeze_jax.checkpoints.build import build_system
from squeeze_jax.checkpoints.compatibility import RULES, check_same_run, check_start, rule_of
from squeeze_jax.checkpoints.fingerprint import fingerprint
from squeeze_jax.checkpoints.manager import write_weights
from squeeze_jax.checkpoints.trained import load_initial_params, with_scale_of
from squeeze_jax.config import (
    Config,
    CrittersConfig,
    EmojiConfig,
    StageConfig,
    load_preset,
    override,
)
from squeeze_jax.config_json import differences
from squeeze_jax.errors import InputError
from squeeze_jax.layers.lora import LoRAConfig
from squeeze_jax.sharding import make_mesh
from squeeze_jax.training.state import split_system
from squeeze_jax.training.step import StepRandomness, compute_losses

WHOLE = tiny_config()
WHOLE = dataclasses.replace(
    WHOLE,
    aggregator=dataclasses.replace(WHOLE.aggregator, layers=(0, 1)),
    data=dataclasses.replace(WHOLE.data, critters=CrittersConfig(size=32)),
)
ADAPTED = dataclasses.replace(WHOLE, lora=LoRAConfig(rank=2, alpha=3.0))
STAGES = (StageConfig(steps=3, references=False),)
CONFIGS = Path(__file__).parents[2] / "configs"

OTHERS: dict[str, Any] = {
    "name": "other",
    "model.dit_weights": "elsewhere",
    "model.autoencoder": "elsewhere",
    "model.mllm": "elsewhere",
    "model.mllm_source": "transformers",
    "model.latent_pixels": 4,
    "model.frozen_dtype": "bfloat16",
    "model.dtype": "bfloat16",
    "model.dit.in_channels": 128,
    "model.dit.context_width": {"model.dit.context_width": 32, "aggregator.out_width": 32},
    "model.dit.pooled_width": 16,
    "model.dit.heads": 4,
    "model.dit.head_width": {"model.dit.head_width": 10, "model.dit.rope_axes": (2, 4, 4)},
    "model.dit.num_double_blocks": 2,
    "model.dit.num_single_blocks": 1,
    "model.dit.mlp_ratio": 2,
    "model.dit.rope_axes": (4, 2, 2),
    "model.dit.guidance": False,
    "model.dit.reference_attention": "cached",
    "aggregator.kind": "lap",
    "aggregator.layers": (1, 2),
    "aggregator.width": 32,
    "aggregator.out_width": {"model.dit.context_width": 32, "aggregator.out_width": 32},
    "aggregator.heads": 4,
    "aggregator.mlp_width": 32,
    "aggregator.layer_blocks": 2,
    "aggregator.refiner_blocks": 2,
    "aggregator.norm_eps": 0.1,
    "lora.rank": 3,
    "lora.target": r"double_blocks\.img_attn\.proj",
    "lora.qkv": "separate",
    "lora.alpha": 1.0,
    "lora.init_gain": 2.0,
    "data.source": {"data.source": "pairs.jsonl", "data.critters": None},
    "data.min_score": 1.0,
    "data.limit": 5,
    "data.max_text_tokens": 32,
    "data.long_captions": "cut",
    "data.manifest": {"data.manifest": "pairs.json", "data.critters": None},
    "data.critters.train": 5,
    "data.critters.held_out": 5,
    "data.critters.size": {"data.critters.size": 48, "data.height": 48},
    "data.critters.seed": 5,
    **{
        f"data.emoji.{name}": {"data.critters": None, "data.emoji": EmojiConfig(**{name: value})}
        for name, value in {
            "train": 5,
            "held_out": 5,
            "subjects": 2,
            "seed": 5,
            "near": 0.5,
        }.items()
    },
    "data.features": "elsewhere",
    "data.image_root": "elsewhere",
    "data.mix": (("elsewhere", 2.0),),
    "data.height": {"data.critters.size": 48, "data.height": 48},
    "data.width": 48,
    "data.buckets": {"data.buckets": ((32, 32), (32, 48)), "data.critters": None},
    "data.reference_long_side": 48,
    "data.held_out": 5,
    "data.skip_bad": True,
    "data.batch_per_chip": 5,
    "data.codec": "int8",
    "data.online": True,
    "data.keep": "read",
    "data.extract_batch": 5,
    "data.workers": 5,
    "data.system_text": "Look closely.",
    "data.max_tiles": 2,
    "diffusion.time_sampling": "logit_normal",
    "diffusion.guidance": 3.5,
    "optimizer.kind": "muon",
    "optimizer.learning_rate": 0.5,
    "optimizer.vector_learning_rate": 0.5,
    "optimizer.warmup_steps": 5,
    "optimizer.decay": "cosine",
    "optimizer.b1": 0.5,
    "optimizer.b2": 0.5,
    "optimizer.weight_decay": 0.5,
    "optimizer.clip_norm": 0.5,
    "optimizer.accumulate": 5,
    "optimizer.ema": 0.5,
    "training.stages": STAGES,
    "training.seed": 5,
    "training.steps_before": 5,
    "training.validate_every": 5,
    "training.sample_every": 5,
    "sampling.steps": 5,
    "sampling.tau1": 0.8,
    "sampling.tau2": 0.1,
    "sampling.tau_tokens": 5,
    "sampling.cfg_scale": 5.0,
    "sampling.shifted": False,
    "parallel.data": 2,
    "parallel.fsdp": 2,
    "parallel.tensor": 2,
    "parallel.remat": "block",
    "parallel.unroll": 2,
    "checkpoint.every": 5,
    "checkpoint.keep": 5,
    "checkpoint.keep_every": 5,
    "log.every": 5,
    "log.tensorboard": False,
    "log.profile": (1, 2),
    "log.grid": 5,
    "log.score": 5,
}
"""Another value of every field, with what else has to change for it."""


def fields_of(kind: Any, path: str = ""):
    """The dotted fields of a config's type; of several sections in a tuple N is the place."""
    inner = [part for part in get_args(kind) if dataclasses.is_dataclass(part)]
    if dataclasses.is_dataclass(kind):
        for name, hint in get_type_hints(kind).items():
            yield from fields_of(hint, f"{path}.{name}".lstrip("."))
    elif inner and get_origin(kind) in (UnionType, Union):
        for part in inner:
            yield from fields_of(part, path)
    elif inner and get_origin(kind) is tuple:
        yield from fields_of(inner[0], f"{path}.N")
    else:
        yield path


def replaced(section: Any, path: str, value: Any) -> Any:
    name, _, rest = path.partition(".")
    inner = replaced(getattr(section, name), rest, value) if rest else value
    # Not `dataclasses.replace`: what belongs together is checked when all of it is there.
    copy = object.__new__(type(section))
    copy.__dict__.update(section.__dict__, **{name: inner})
    return copy


def with_other(config: Config, field: str) -> Config:
    value = OTHERS[field]
    for path, one in value.items() if isinstance(value, dict) else ((field, value),):
        config = replaced(config, path, one)
    return checked(config)


def checked(value: Any) -> Any:
    """Built anew, so that it is a config that a user can have."""
    if not dataclasses.is_dataclass(value):
        return value
    parts = {f.name: checked(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return type(value)(**parts)


BATCH = tiny_batch(mixed=False)._replace(grid=np.array([[2, 2]] * 4, np.int32))
NOISE = np.random.default_rng(3).standard_normal(BATCH.target.shape).astype(np.float32)
DRAWS = StepRandomness(jnp.array([0.2, 0.4, 0.6, 0.8]), NOISE, jnp.ones(4, bool), jnp.ones(4, bool))


@partial(jax.jit, static_argnums=(0, 1))
def losses_of(graph: Any, guidance: float, state: Any, batch: Any, draws: Any):
    config = replaced(WHOLE, "diffusion.guidance", guidance)
    return compute_losses(nnx.merge(graph, state), batch, draws, config, STAGE)


def losses(config: Config, leaves: dict[str, Any], frozen: dict[str, Any]) -> np.ndarray:
    """Each example's loss of a config's system with these leaves."""
    config = replaced(config, "data.online", False)
    graph, state = nnx.split(nnx.eval_shape(lambda: build_system(config, with_base=False)))
    flat = nnx.to_flat_state(state)
    filled = []
    for path, variable in flat:
        name, wanted = ".".join(map(str, path)), variable.get_value()
        leaf = leaves.get(name, frozen.get(name))
        if path[-1] == "scale" and "adapter" in path:
            leaf = np.full(wanted.shape, config.lora.alpha / config.lora.rank)
        filled.append((path, variable.replace(jnp.asarray(leaf, wanted.dtype))))
    state = nnx.from_flat_state(filled)
    return np.asarray(losses_of(graph, config.diffusion.guidance, state, BATCH, DRAWS))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """For both configs: its weights' folder, its leaves, the frozen ones, and the losses."""
    found = {}
    for config in (WHOLE, ADAPTED):
        leaves, split = split_system(randomised(config), config)
        flat = nnx.to_flat_state(split.frozen)
        frozen = {".".join(map(str, path)): variable.get_value() for path, variable in flat}
        folder = tmp_path_factory.mktemp("weights")
        write_weights(folder, config, leaves, np.float32)
        found[config.lora] = folder, leaves, frozen, split.frozen, losses(config, leaves, frozen)
    return found


MESH = make_mesh(1, 1, 1, devices=jax.devices()[:1])


def test_every_field_has_a_decision():
    assert set(fields_of(Config)) == set(RULES), "a new field needs a row in compatibility.py"
    several = {field.partition(".N.")[0] for field in RULES if ".N." in field}
    of_flux2 = {"model.dit.rope_theta"}  # in which the tests' transformer, FLUX.1's, has no part
    assert {field.partition(".N.")[0] for field in RULES} - of_flux2 == set(OTHERS)
    for section in several:  # differs as a whole
        of_section = {rule for field, rule in RULES.items() if field.startswith(f"{section}.")}
        assert of_section == {rule_of(section)}


@pytest.mark.parametrize("field", OTHERS)
def test_weights_begin_a_run_as_it_is_decided(trained, field):
    """Free: the losses stay, up to the type of numbers. Carried: they stay. Refused by name."""
    config = ADAPTED if field.startswith("lora.") else WHOLE
    folder, _, frozen, _, wanted = trained[config.lora]
    other, decision = with_other(config, field), rule_of(field).begin
    if decision in ("ask", "refused"):
        with pytest.raises(InputError, match=field.replace(".", r"\.") + "|has learned joint"):
            load_initial_params(folder, other, "", MESH)
        assert (decision == "ask") == accepted(load_initial_params, folder, other, "", MESH)
        return
    found = losses(other, load_initial_params(folder, other, "", MESH), frozen)
    rounded = {"model.dtype": 0.02}
    np.testing.assert_allclose(found, wanted, rtol=rounded.get(field, 1e-5))


def accepted(check, *given) -> bool:
    try:
        check(*given, accept_changes=True)
    except InputError:
        return False
    return True


@pytest.mark.parametrize("field", OTHERS)
def test_a_run_is_resumed_as_it_is_decided(field):
    config = ADAPTED if field.startswith("lora.") else WHOLE
    if field.startswith("data.emoji."):  # a run that has this section
        config = replaced(replaced(config, "data.critters", None), "data.emoji", EmojiConfig())
    other, decision = with_other(config, field), rule_of(field).resume
    if (
        decision in ("free", "carried") or field == "sampling.steps"
    ):  # FLUX.1's shift has no part in
        assert check_same_run(config, other, Path("work")) == []
        return
    with pytest.raises(InputError, match=field.replace(".", r"\.")):
        check_same_run(config, other, Path("work"))
    assert (decision == "ask") == accepted(check_same_run, config, other, Path("work"))


def test_steps_are_asked_about_where_training_draws_other_times_with_them():
    """FLUX.2's shift depends on the number of steps, and training draws the sampler's times."""
    klein = load_preset(Path(__file__).parents[2] / "configs" / "klein_stage2.py")
    fewer = replaced(klein, "sampling.steps", 10)
    with pytest.raises(InputError, match=r"sampling\.steps: 50 → 10"):
        check_same_run(klein, fewer, Path("work"))
    assert check_same_run(klein, replaced(klein, "sampling.tau1", 0.9), Path("work")) == []


@pytest.mark.parametrize(
    "field", ["aggregator.layers", "model.dit.rope_axes", "diffusion.guidance"]
)
def test_what_is_refused_would_have_computed_something_else(trained, field):
    """Without a word, since every array fits."""
    _, leaves, frozen, _, wanted = trained[None]
    assert np.abs(losses(with_other(WHOLE, field), leaves, frozen) / wanted - 1).max() > 1e-3


def test_adapters_keep_their_strength_under_another_alpha(trained):
    folder, leaves, frozen, _, wanted = trained[ADAPTED.lora]
    other = with_other(ADAPTED, "lora.alpha")
    assert np.abs(losses(other, leaves, frozen) / wanted - 1).max() > 1e-3, "as they are"
    carried = load_initial_params(folder, other, "", MESH)
    up = next(name for name in leaves if name.endswith("parts.0.up"))
    np.testing.assert_allclose(carried[up], 3.0 * leaves[up], rtol=1e-6)
    np.testing.assert_allclose(losses(other, carried, frozen), wanted, rtol=1e-5)


def test_the_base_is_still_told_apart_under_another_alpha(trained):
    """Its fingerprint covers the scale, too."""
    folder, _, _, frozen, _ = trained[ADAPTED.lora]
    flat = nnx.to_flat_state(frozen)
    scales = [path for path, _ in flat if path[-1] == "scale" and "adapter" in path]
    weaker = nnx.from_flat_state(
        [(p, v.replace(v.get_value() / 3) if p in scales else v) for p, v in flat]
    )
    assert len(scales) > 3
    assert fingerprint(weaker) != fingerprint(frozen)
    assert fingerprint(with_scale_of(folder, weaker)) == fingerprint(frozen)


@pytest.mark.parametrize("field", ["lora.alpha", "lora.init_gain"])
def test_the_base_is_compared_whatever_the_adapters_began_with(
    trained, tmp_path, monkeypatch, field
):
    """On a pre-trained base, of which another fingerprint is given than the weights began with."""
    based = replaced(ADAPTED, "model.dit_weights", "base")
    _, leaves, _, _, _ = trained[ADAPTED.lora]
    write_weights(tmp_path, based, leaves, np.float32)
    monkeypatch.setattr("squeeze_jax.checkpoints.trained.saved_base", lambda folder: "one")
    other = replaced(based, field, OTHERS[field])
    with pytest.raises(InputError, match=r"another base \(fingerprint one\)"):
        load_initial_params(tmp_path, other, "two", MESH)


def test_a_random_base_belongs_to_its_seed():
    """Adapters on random weights: no fingerprint tells these apart."""
    seeded = with_other(ADAPTED, "training.seed")
    with pytest.raises(InputError, match=r"training\.seed: 0 → 5"):
        check_start(ADAPTED, seeded, Path("run"), exported=False)
    with pytest.raises(InputError, match=r"model\.dit_weights: None → elsewhere"):
        check_start(ADAPTED, with_other(ADAPTED, "model.dit_weights"), Path("run"), exported=False)
    pre_trained = with_other(ADAPTED, "model.dit_weights")
    check_start(pre_trained, with_other(pre_trained, "training.seed"), Path("run"), exported=False)


def test_layers_that_no_kind_reads_may_differ():
    last = replaced(WHOLE, "aggregator.kind", "last_layer")
    fewer = replaced(last, "aggregator.layers", (1,))
    check_start(last, fewer, Path("run"), exported=False)
    assert LAYERS == 3


@pytest.mark.parametrize("base", ["krea", "kontext", "schnell"])
def test_the_stage_1_that_a_preset_names_is_one_that_it_can_begin_with(base):
    """Both commands stand in its docstring; only what stages are about may differ."""
    path = CONFIGS / f"flux_{base}.py"
    said = ast.get_docstring(ast.parse(path.read_text())).replace("\\\n", " ")
    first, second = (shlex.split(line) for line in re.findall(r"python train\.py (.*)", said))
    workdir = first.index("--workdir")
    assert second[second.index("--from") + 1] == first[workdir + 1]
    flags = first[1:workdir] + first[workdir + 2 :]
    stage1 = override(load_preset(CONFIGS.parent / first[0]), flags, "train.py")
    stage2 = load_preset(path)
    check_start(stage1, stage2, Path(first[workdir + 1]), exported=False)
    assert stage1.model == stage2.model
    differing = {line.split(": ")[0] for line in differences(stage1, stage2)}
    stages = {field for field in differing if field.startswith("training.stages.0.")}
    assert differing - stages == {"name", "data.features", "sampling.tau1", "sampling.tau2"}
    assert {field.rpartition(".")[2] for field in stages} >= {"steps", "references"}
