"""The method's constants: what every preset resolves to, and that the compiled step and the sampler
go by them."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from parity import relative_error
from small_dit import run as run_dit
from tiny import randomised, row, tiny_batch, tiny_config

from squeeze_jax.config import DiffusionConfig, OptimizerConfig, StageConfig, load_preset
from squeeze_jax.config_json import from_json, to_json
from squeeze_jax.data.feature_extractor import FeatureExtractor
from squeeze_jax.diffusion.stages import ConditionDropout
from squeeze_jax.sampling.pipeline import Pipeline, Settings
from squeeze_jax.sampling.schedule import noise_for
from squeeze_jax.sampling.settings import resolve
from squeeze_jax.training.optimizer import make_optimizer
from squeeze_jax.training.state import initial_state, split_system
from squeeze_jax.training.step import make_train_step, sample_randomness, step_key

ROOT = Path(__file__).parents[2]
IN_MINIATURE = ROOT / "configs" / "ablations_miniature"
PRESETS = {
    path.stem: path
    for path in sorted((ROOT / "configs").rglob("*.py"))
    if path.parent != IN_MINIATURE
}

# --- what the presets resolve to ------------------------------------------------------------------

STAGE2 = {
    "learning_rate": 1e-4, "warmup_steps": 100, "decay": "constant", "kind": "adamw",
    "b1": 0.9, "b2": 0.999, "weight_decay": 0.01, "clip_norm": 1.0, "accumulate": 1, "ema": 0.0,
    "guidance": 1.0, "time_sampling": "shifted_uniform", "takes_guidance": True,
    "layers": tuple(range(29)), "kind_of_aggregator": "dla", "width": 3584,
    "rank": 512, "lora_scale": 1.0,
    "blocks": (19, 38, 24, 128), "context_width": 4096, "size": (512, 512, 512), "max_tiles": 1,
    "sampling": (25, 0.95, 0.85, 2.5, True, None), "dtypes": ("bfloat16", "bfloat16"),
    "steps": (10_000,), "references": (True,), "dropout": ((0.6, 0.1, 0.2, 0.1),),
}  # fmt: skip
"""Stage 2: docs/decisions.md, "Training" and what is decided below it."""

DROPPED_A_TENTH = ((0.9, 0.1),)
ONE = {
    "steps": (25_000,),
    "references": (False,),
    "dropout": DROPPED_A_TENTH,
    "sampling": (25, 0.0, 0.0, 2.5, True, None),
}
BOTH = {
    "steps": (25_000, 10_000),
    "references": (False, True),
    "dropout": DROPPED_A_TENTH + STAGE2["dropout"],
}
SINGLE = {"steps": (35_000,)}


def sampled(tau1, tau2, cfg):
    return {"sampling": (25, tau1, tau2, cfg, True, None)}


KLEIN = {
    "takes_guidance": False,
    "blocks": (5, 20, 24, 128),
    "context_width": 7680,
    "sampling": (50, 0.95, 0.85, 4.0, True, None),
}
"""FLUX.2 [klein]: docs/decisions.md, "FLUX.2 as the backbone"."""
KLEIN_ONE = ONE | KLEIN | {"sampling": (50, 0.0, 0.0, 4.0, True, None)}
OTHERS = {
    "klein_stage1": KLEIN_ONE,
    "klein_stage2": KLEIN,
    "klein_multi_subject": KLEIN | {"learning_rate": 5e-5, "steps": (2_000,)},
    "klein_small_stage1": KLEIN_ONE | {"width": 1536},
    "klein_small_stage2": KLEIN | {"width": 1536},
    "flux_stage1": ONE,
    "flux_stage2": {},
    "flux_krea": {},
    "flux_kontext": {},
    "flux_multi_subject": {"learning_rate": 5e-5, "steps": (2_000,)},
    "flux_schnell": {"takes_guidance": False, "sampling": (4, 0.91, 0.75, 1.0, False, None)},
    "lap": BOTH | {"kind_of_aggregator": "lap"},
    "last_layer": BOTH | {"kind_of_aggregator": "last_layer"},
    "last_layer_vit": BOTH | {"kind_of_aggregator": "last_layer_vit"},
    "layers_0_9": BOTH | {"layers": tuple(range(10))},
    "layers_10_19": BOTH | {"layers": tuple(range(10, 20))},
    "layers_20_28": BOTH | {"layers": tuple(range(20, 29))},
    "single_stage": SINGLE | sampled(1.1, 0.0, 2.5),
    "single_stage_staged": SINGLE,
    "cfg_4": sampled(0.95, 0.85, 4.0),
    "tau_085_070": sampled(0.85, 0.7, 2.5),
    "tau_097_090": sampled(0.97, 0.9, 2.5),
    "tau_0_0": sampled(0.0, 0.0, 2.5),
}
MINIATURE = {"demo", "demo_weights", "emoji"}
GOING_ON = {"emoji_multi_subject", "personal"}
"""Presets that begin with the weights of another."""


def resolved(config):
    """A preset as a row of the table. A stage without references has two outcomes: the MLLM is
    kept, or dropped."""
    optimizer, aggregator, dit, data = (
        config.optimizer,
        config.aggregator,
        config.model.dit,
        config.data,
    )
    sampling = config.sampling

    def probabilities(stage):
        d = stage.dropout
        return (
            (d.both, d.mllm, d.vae, d.neither)
            if stage.references
            else (d.both + d.mllm, d.vae + d.neither)
        )

    return {name: getattr(optimizer, name) for name in STAGE2 if hasattr(optimizer, name)} | {
        "guidance": config.diffusion.guidance,
        "time_sampling": config.diffusion.time_sampling,
        "takes_guidance": dit.guidance,
        "layers": aggregator.layers,
        "kind_of_aggregator": aggregator.kind,
        "width": aggregator.width,
        "rank": config.lora.rank,
        "lora_scale": (config.lora.alpha or config.lora.rank) / config.lora.rank,
        "blocks": (dit.num_double_blocks, dit.num_single_blocks, dit.heads, dit.head_width),
        "context_width": dit.context_width,
        "size": (data.height, data.width, data.reference_long_side),
        "max_tiles": data.max_tiles,
        "sampling": (
            sampling.steps, sampling.tau1, sampling.tau2, sampling.cfg_scale, sampling.shifted,
            sampling.tau_tokens,
        ),
        "dtypes": (config.model.dtype, config.model.frozen_dtype),
        "steps": tuple(stage.steps for stage in config.training.stages),
        "references": tuple(stage.references for stage in config.training.stages),
        "dropout": tuple(probabilities(stage) for stage in config.training.stages),
    }  # fmt: skip


def test_every_preset_is_in_the_table():
    assert set(PRESETS) == set(OTHERS) | MINIATURE | GOING_ON


def test_an_ablation_in_miniature_changes_one_thing():
    """One section, apart from the name; and each another one, or otherwise."""
    base = load_preset(IN_MINIATURE / "two_stages.py")
    sections = set()
    for path in sorted(IN_MINIATURE.glob("*.py")):
        config = load_preset(path)
        changed = [
            field.name
            for field in dataclasses.fields(base)
            if getattr(config, field.name) != getattr(base, field.name)
        ]
        changed.remove("name") if path.stem != "two_stages" else None
        assert config.name == path.stem
        assert len(changed) == (path.stem != "two_stages") + (path.stem == "single_stage"), path
        sections.add(str([getattr(config, name) for name in changed]))
        steps = sum(stage.steps for stage in config.training.stages)
        assert steps == 1_200, "one budget for all"
    assert len(sections) == len(list(IN_MINIATURE.glob("*.py")))


@pytest.mark.parametrize("name", OTHERS)
def test_a_preset_resolves_to_the_papers_numbers(name):
    found, wanted = resolved(load_preset(PRESETS[name])), STAGE2 | OTHERS[name]
    assert {key: value for key, value in found.items() if value != wanted[key]} == {}
    assert set(found) == set(wanted)


@pytest.mark.parametrize("name", PRESETS)
def test_no_preset_leaves_a_stage_without_steps(name):
    config = load_preset(PRESETS[name])
    assert resolve(Settings(), config).empty_stages(config, references=True) == []


@pytest.mark.parametrize("name", sorted(MINIATURE))
def test_the_miniature_has_the_papers_method_at_its_own_size(name):
    """τ carried from 1,024 tokens to 64 (logit + log(64 / 1,024) / 2), CFG and the dropout of stage
    2 as they are. With emoji τ1 and CFG are our decision (configs/emoji.py)."""
    config = load_preset(PRESETS[name])
    odds = [tau / (1 - tau) * (64 / 1024) ** 0.5 for tau in (0.95, 0.85)]
    tau1, tau2 = [o / (1 + o) for o in odds]
    tau1, guidance = (0.95, 4.0) if name == "emoji" else (tau1, 2.5)
    sampling = config.sampling
    assert (sampling.tau1, sampling.tau2) == pytest.approx((tau1, tau2), abs=5e-3)
    assert (sampling.cfg_scale, sampling.steps, sampling.shifted) == (guidance, 25, True)
    assert [stage.references for stage in config.training.stages] == [False, True]
    assert config.training.stages[-1].dropout == ConditionDropout(0.6, 0.1, 0.2, 0.1)
    assert config.aggregator.kind == "dla" and config.aggregator.layers == tuple(range(5))
    assert (
        config.optimizer.clip_norm,
        config.optimizer.weight_decay,
        config.diffusion.guidance,
    ) == (1.0, 0.01, 1.0)


@pytest.mark.parametrize("name", PRESETS)
def test_a_stage_without_references_drops_the_mllm_in_a_tenth_of_the_samples(name):
    """And what a run of 20,000 rows draws, whatever the preset gives or leaves to the default."""
    config = load_preset(PRESETS[name])
    for stage in config.training.stages:
        if not stage.references:
            d = stage.dropout
            assert d.vae + d.neither == pytest.approx(0.1)
            kept, _ = d.draw(jax.random.key(1), 20_000)
            assert np.mean(kept) == pytest.approx(0.9, abs=0.01)


def test_the_default_dropout_is_the_stages_own_and_given_probabilities_stay():
    alone, both = (StageConfig(1, references=references) for references in (False, True))
    assert alone.dropout == ConditionDropout(0.0, 0.9, 0.0, 0.1)
    assert both.dropout == ConditionDropout(0.6, 0.1, 0.2, 0.1)
    assert dataclasses.replace(both, references=False).dropout == alone.dropout
    given = StageConfig(1, references=False, dropout=ConditionDropout(0.6, 0.1, 0.2, 0.1))
    assert given.dropout == both.dropout
    config = dataclasses.replace(
        SMALL, training=dataclasses.replace(SMALL.training, stages=(given,))
    )
    assert from_json(to_json(config)) == config, "an old run's folder"


# --- the optimiser, in closed form ----------------------------------------------------------------


@pytest.fixture(autouse=True)
def _optax_promotes():
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize(
    ("name", "peak"), [("flux_stage1", 1e-4), ("flux_stage2", 1e-4), ("flux_multi_subject", 5e-5)]
)
def test_updates_are_clipped_adamw_with_the_papers_constants(name, peak):
    """Four gradients, of which two are clipped, against float64: b2, clipping and decay all show
    from the second on."""
    rng = np.random.default_rng(0)
    weights = {"dit.a.kernel": rng.standard_normal((3, 4)), "dit.a.bias": rng.standard_normal(4)}
    optimizer = make_optimizer(load_preset(PRESETS[name]))
    ours = {key: jnp.asarray(value, jnp.float32) for key, value in weights.items()}
    state = optimizer.init(ours)
    m, v = ({key: np.zeros_like(value) for key, value in weights.items()} for _ in range(2))
    for k, size in enumerate((0.05, 30.0, 0.1, 4.0), 1):
        gradient = {key: size * rng.standard_normal(value.shape) for key, value in weights.items()}
        norm = np.sqrt(sum(np.sum(g**2) for g in gradient.values()))
        before = {key: value.copy() for key, value in weights.items()}
        for key, g in gradient.items():
            g = g * min(1.0, 1.0 / norm)
            m[key], v[key] = 0.9 * m[key] + 0.1 * g, 0.999 * v[key] + 0.001 * g**2
            step = m[key] / (1 - 0.9**k) / (np.sqrt(v[key] / (1 - 0.999**k)) + 1e-8)
            step = step + (0.01 * weights[key] if key.endswith("kernel") else 0.0)
            weights[key] = weights[key] - peak * k / 100 * step
        given = {key: jnp.asarray(g, jnp.float32) for key, g in gradient.items()}
        updates, state = optimizer.update(given, state, ours)
        for key in weights:
            np.testing.assert_allclose(
                updates[key], weights[key] - before[key], rtol=1e-3, err_msg=f"{key}, step {k}"
            )
        ours = optax.apply_updates(ours, updates)


# --- what the compiled step draws -----------------------------------------------------------------

SMALL = tiny_config()
SMALL = dataclasses.replace(
    SMALL,
    model=dataclasses.replace(
        SMALL.model, dit=dataclasses.replace(SMALL.model.dit, num_single_blocks=1)
    ),
    aggregator=dataclasses.replace(SMALL.aggregator, kind="last_layer", refiner_blocks=0),
    optimizer=OptimizerConfig(warmup_steps=1),
    diffusion=DiffusionConfig(guidance=2.0),  # neither the default nor FLUX.1's own 3.5
)
BATCH = tiny_batch(mixed=False)
OUTCOMES = ("both", "mllm", "vae", "neither")
ONLY = {
    name: StageConfig(4, True, ConditionDropout(*(float(name == other) for other in OUTCOMES)))
    for name in OUTCOMES
}


@pytest.fixture(scope="module")
def system():
    return randomised(SMALL)


def step_of(system, stage):
    """The compiled step of a system, from a batch to (the weights before, the state after, the
    metrics)."""
    optimizer = make_optimizer(SMALL)
    trained, split = split_system(system, SMALL)
    step = make_train_step(split, optimizer, SMALL, stage)

    def run(batch=BATCH):
        own = jax.tree.map(jnp.copy, trained)
        return trained, *step(initial_state(own, optimizer, SMALL), split.frozen, batch)

    return run


@pytest.mark.parametrize("kept", ["mllm", "vae"])
def test_a_stages_dropout_decides_what_the_loss_sees(system, kept):
    """A condition that is dropped always has no say, and what reads it no gradient; one that is
    kept always has."""
    run = step_of(system, ONLY[kept])
    metrics = run()[-1]
    loss = float(metrics.loss)
    assert (float(metrics.grad_norm_aggregator) > 1e-3) == (kept == "mllm")
    others = BATCH.references._replace(tokens=BATCH.references.tokens[::-1])
    other = float(run(BATCH._replace(references=others))[-1].loss)
    assert abs(other / loss - 1) > 1e-4 if kept == "vae" else other == pytest.approx(loss, rel=1e-6)


@pytest.fixture(scope="module")
def bare(system):
    """One step of a stage that drops both conditions always."""
    with jax.numpy_dtype_promotion("standard"):
        return step_of(system, ONLY["neither"])()


def velocity(system, x, context, t, guidance):
    """By the transformer itself, called as its users call it."""
    given = {
        "target": x,
        "context": context,
        "t": t,
        "guidance": jnp.full(t.shape, guidance, jnp.float32),
    }
    return run_dit(system.dit, given | {"target_grid": (2, 2), "references": []})


def test_the_step_tells_the_transformer_the_configs_guidance(system, bare):
    """Without conditions the loss is the mean of (v(x_t, t, guidance) − (ε − x_0))²; FLUX.1's own
    value is another."""
    draws = sample_randomness(step_key(SMALL, 0), BATCH.target.shape, SMALL, ONLY["neither"])
    t = draws.t[:, None, None]
    x, empty = (1 - t) * BATCH.target + t * draws.noise, jnp.zeros((4, 0, 24))
    squares = {
        g: np.square(velocity(system, x, empty, draws.t, g) - (draws.noise - BATCH.target))
        for g in (2.0, 1.0, 3.5)
    }
    assert float(bare[-1].loss) == pytest.approx(float(squares[2.0].mean()), rel=1e-5)
    for other in (1.0, 3.5):
        assert abs(float(squares[other].mean() / squares[2.0].mean()) - 1) > 1e-3


def test_one_compiled_step_moves_each_weight_as_adamw_does(bare):
    """Adam's first step is the rate times the gradient's sign; a matrix loses a hundredth of it
    beside.

    The pooled vector is zero, so its first kernel has no gradient and shows the decay alone.
    """
    weights, state, metrics = bare
    assert float(metrics.learning_rate) == pytest.approx(1e-4, rel=1e-6)
    still = "dit.vector_in.in_layer.kernel"
    before, after = (np.float64(leaves[still]) for leaves in (weights, state.params))
    assert np.sum((after - before) * before) / np.sum(before**2) == pytest.approx(-1e-6, rel=0.1)
    for name in ("dit.img_in.kernel", "dit.img_in.bias"):
        w = np.float64(weights[name])
        moved, decay = (
            np.float64(state.params[name]) - w,
            0.01 * w if name.endswith("kernel") else 0.0,
        )
        np.testing.assert_allclose(np.abs(moved + 1e-4 * decay), 1e-4, rtol=5e-3, err_msg=name)


def test_the_sampler_tells_the_transformer_the_configs_guidance(system):
    """One Euler step from t = 1 to 0: x − v(x, 1, guidance)."""
    states, noise = row(tiny_batch().hidden_states, 0), noise_for([5], 4, 64)
    states = states._replace(
        image_mask=np.ones_like(states.image_mask), text_mask=np.ones_like(states.text_mask)
    )
    drawn = Pipeline.of(system, SMALL, object.__new__(FeatureExtractor)).sample(
        states, [[]], [5], Settings(steps=1, cfg_scale=1.0)
    )
    context = system.aggregate(states).tokens
    by_value = {
        g: noise - velocity(system, noise, context, jnp.ones(1), g) for g in (2.0, 1.0, 3.5)
    }
    assert relative_error(drawn, by_value[2.0]) < 1e-5
    assert min(relative_error(drawn, by_value[other]) for other in (1.0, 3.5)) > 1e-3


# --- times -------------------------------------------------------------------------------------------------------------


def scheduler_of(name, sigmas, tokens):
    """diffusers' scheduler of a published base (its scheduler_config.json) with these times before the shift."""
    pytest.importorskip("torch", reason="PyTorch is not installed: parity tests are skipped")
    diffusers = pytest.importorskip("diffusers")
    if name == "flux_schnell":
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False)
        scheduler.set_timesteps(sigmas=sigmas)
    else:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
        scheduler.set_timesteps(
            sigmas=sigmas, mu=0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
        )
    return scheduler.sigmas.numpy()


@pytest.mark.parametrize(("height", "tokens"), [(512, 1024), (256, 256)])
@pytest.mark.parametrize("name", ["flux_stage2", "flux_schnell"])
def test_a_model_is_trained_on_the_times_of_the_schedule_that_it_is_sampled_on(
    name, height, tokens
):
    """In closed form, and as diffusers' scheduler shifts uniform times: dev's by size, schnell's not."""
    config, count = load_preset(PRESETS[name]), 2000
    t = sample_randomness(
        step_key(config, 7), (count, tokens, 1), config, config.training.stages[0]
    ).t
    t = np.sort(np.asarray(t, np.float64))[::-1]
    factor = np.exp(0.5 + 0.65 * (tokens - 256) / 3840) if name == "flux_stage2" else 1.0
    s = t / (t + factor * (1 - t))  # the shift undone, which leaves uniform times
    distance = np.abs(s[::-1] - (np.arange(count) + 0.5) / count).max()  # Kolmogorov and Smirnov's
    assert distance < 1.95 / np.sqrt(count)  # exceeded once in a thousand times
    np.testing.assert_allclose(t, scheduler_of(name, s, tokens)[:-1], atol=2e-6)

    size = dataclasses.replace(config.data, height=height, width=height)
    config = dataclasses.replace(config, data=size)
    own = resolve(Settings(), config)
    sampled = own.make_schedule(config, references=True).times[: own.steps + 1]
    even = np.linspace(1.0, 1 / own.steps, own.steps)  # what diffusers' FLUX pipeline hands over
    np.testing.assert_allclose(sampled, scheduler_of(name, even, tokens), atol=2e-7)


# --- randomness --------------------------------------------------------------------------------------------------------


def test_time_noise_and_dropped_conditions_of_a_row_have_nothing_to_do_with_each_other():
    """Ranks of 2,000 rows: whatever is drawn twice from one key correlates by about one."""
    stage = StageConfig(4, True, ConditionDropout(0.25, 0.25, 0.25, 0.25))
    draws = sample_randomness(step_key(SMALL, 3), (2000, 4, 16), SMALL, stage)

    def ranked(x):
        ranks = np.asarray(x, np.float64).reshape(2000, -1).argsort(axis=0).argsort(axis=0)
        return (ranks - ranks.mean(axis=0)) / ranks.std(axis=0)

    outcome = 2.0 * np.asarray(draws.keep_mllm) + np.asarray(draws.keep_vae)
    t, noise = ranked(draws.t), ranked(draws.noise)
    outcome = (outcome - outcome.mean())[:, None] / outcome.std()
    for name, one, other in (
        ("t, noise", t, noise),
        ("t, dropout", t, outcome),
        ("noise, dropout", noise, outcome),
    ):
        assert np.abs(one.T @ other / 2000).max() < 0.12, name


@pytest.mark.parametrize("name", ["flux_stage1", "flux_stage2"])
def test_conditions_are_dropped_as_often_as_the_preset_says(name):
    """The draws of a step, 20,000 rows."""
    config = load_preset(PRESETS[name])
    (stage,) = config.training.stages
    draws = sample_randomness(step_key(config, 0), (20_000, 1, 1), config, stage)
    mllm, vae = np.asarray(draws.keep_mllm), np.asarray(draws.keep_vae)
    if not stage.references:
        assert mllm.mean() == pytest.approx(0.9, abs=0.01)
        return
    shares = [
        (mllm & vae).mean(),
        (mllm & ~vae).mean(),
        (~mllm & vae).mean(),
        (~mllm & ~vae).mean(),
    ]
    assert shares == pytest.approx([0.6, 0.1, 0.2, 0.1], abs=0.015)
