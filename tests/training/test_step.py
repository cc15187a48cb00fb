"""The train step's properties: padding, accumulation, meshes, non-finite batches, averages."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import STAGE, randomised, row, tiny_batch, tiny_config

from squeeze_jax.batch import Context, HiddenStates, References
from squeeze_jax.checkpoints.build import build_system
from squeeze_jax.config import OptimizerConfig, StageConfig
from squeeze_jax.layers.lora import LoRAConfig
from squeeze_jax.training.optimizer import is_matrix, learning_rate, make_optimizer
from squeeze_jax.training.state import initial_state, split_system
from squeeze_jax.training.step import (
    compute_losses,
    make_train_step,
    sample_randomness,
    step_key,
    update_ema,
)
from squeeze_jax.training.validation import make_validation

CONFIG = tiny_config()
CACHED = dataclasses.replace(
    CONFIG,
    model=dataclasses.replace(
        CONFIG.model, dit=dataclasses.replace(CONFIG.model.dit, reference_attention="cached")
    ),
)


@pytest.fixture(autouse=True)
def _optax_promotes():
    """Optax itself computes 0.9 ** (an integer count), which strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def setup(config=CONFIG):
    trained, split = split_system(randomised(config), config)
    optimizer = make_optimizer(config)
    return split, optimizer, initial_state(jax.tree.map(jnp.copy, trained), optimizer, config)


def shorten(batch, i):
    """Row i alone with its padding cut away."""
    one, states, references = row(batch, i), row(batch.hidden_states, i), row(batch.references, i)
    t, m, r = (int(mask.sum()) for mask in (states.text_mask, states.image_mask, references.mask))
    return one._replace(
        hidden_states=HiddenStates(
            states.text[:, :, :t], states.text_mask[:, :t], states.text_positions[:, :t],
            states.image[:, :, :m], states.image_mask[:, :m], states.image_positions[:, :m],
        ),
        references=References(
            references.tokens[:, :r], references.mask[:, :r], references.positions[:, :r]
        ),
    )  # fmt: skip


@pytest.mark.parametrize(
    "config", [CONFIG, pytest.param(CACHED, marks=pytest.mark.slow)], ids=["joint", "cached"]
)
def test_a_samples_loss_in_a_mixed_padded_batch_equals_that_of_a_batch_of_one(config):
    system, batch = randomised(config), tiny_batch()
    draws = sample_randomness(jax.random.key(3), batch.target.shape, config, STAGE)
    draws = draws._replace(keep_mllm=jnp.ones(4, bool), keep_vae=jnp.ones(4, bool))
    together = compute_losses(system, batch, draws, config, STAGE)
    alone = [
        compute_losses(system, shorten(batch, i), row(draws, i), config, STAGE)[0] for i in range(4)
    ]
    np.testing.assert_allclose(together, alone, rtol=1e-5)


@pytest.mark.parametrize("config", [CONFIG, CACHED], ids=["joint", "cached"])
def test_dropped_conditions_equal_conditions_left_out(config):
    system, batch = randomised(config), tiny_batch(mixed=False)
    draws = sample_randomness(jax.random.key(3), batch.target.shape, config, STAGE)
    off = jnp.zeros(4, bool)
    dropped = compute_losses(
        system, batch, draws._replace(keep_mllm=off, keep_vae=off), config, STAGE
    )
    x = (1 - draws.t[:, None, None]) * batch.target + draws.t[:, None, None] * draws.noise
    empty = Context(jnp.zeros((4, 0, 24)), jnp.zeros((4, 0), bool))
    velocity = system.velocity(x, (2, 2), draws.t, empty, None, config.diffusion.guidance)
    np.testing.assert_allclose(
        dropped,
        jnp.mean(jnp.square(velocity - (draws.noise - batch.target)), axis=(1, 2)),
        rtol=1e-5,
    )


def test_draws_of_a_row_do_not_depend_on_the_batch_and_steps_differ():
    big = sample_randomness(step_key(CONFIG, 5), (8, 4, 64), CONFIG, STAGE)
    small = sample_randomness(step_key(CONFIG, 5), (3, 4, 64), CONFIG, STAGE)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda x: x[:3], big), small)
    assert not np.array_equal(
        sample_randomness(step_key(CONFIG, 6), (3, 4, 64), CONFIG, STAGE).noise, small.noise
    )
    assert len(np.unique(np.asarray(big.t))) == 8


@pytest.mark.telling
@pytest.mark.slow
def test_accumulated_gradients_equal_one_large_batch():
    config = dataclasses.replace(
        CONFIG, optimizer=dataclasses.replace(CONFIG.optimizer, accumulate=2)
    )
    batch = tiny_batch()
    outcomes = []
    for c in (CONFIG, config):
        split, _, state = setup(c)
        sgd = optax.sgd(0.1)
        state = state._replace(opt_state=sgd.init(state.params))
        outcomes.append(make_train_step(split, sgd, c, STAGE)(state, split.frozen, batch))
    (one, m1), (two, m2) = outcomes
    np.testing.assert_allclose(m1.loss, m2.loss, rtol=1e-5)
    for name in one.params:
        np.testing.assert_allclose(
            one.params[name], two.params[name], rtol=1e-5, atol=1e-6, err_msg=name
        )


def test_a_non_finite_batch_changes_nothing_and_is_counted():
    split, optimizer, state = setup()
    before = jax.tree.map(np.asarray, (state.params, state.opt_state, state.ema_params))
    batch = tiny_batch()
    bad = batch._replace(target=np.full_like(batch.target, np.nan))
    step = make_train_step(split, optimizer, CONFIG, STAGE)
    state, metrics = step(state, split.frozen, bad)
    jax.tree.map(
        np.testing.assert_array_equal, before, (state.params, state.opt_state, state.ema_params)
    )
    assert (int(state.step), int(state.skipped), int(metrics.skipped)) == (1, 1, 1)
    state, metrics = step(state, split.frozen, batch)
    assert int(state.skipped) == 1
    assert np.isfinite(metrics.loss)
    # Adam's first step moves a weight by the rate, which is the warm-up's first: the one before did
    # not count.
    moved = max(np.max(np.abs(before[0][name] - state.params[name])) for name in before[0])
    assert float(metrics.learning_rate) == pytest.approx(5e-3)
    assert moved == pytest.approx(5e-3, rel=0.05)


def test_average_follows_its_closed_form_and_differs_from_the_weights():
    split, optimizer, state = setup()
    first = np.asarray(next(iter(state.params.values())))
    step, seen = make_train_step(split, optimizer, CONFIG, STAGE), [first]
    for _ in range(2):
        state, _ = step(state, split.frozen, tiny_batch())
        seen.append(np.asarray(next(iter(state.params.values()))))
    wanted = seen[0]
    for count, weights in enumerate(seen[1:]):
        decay = min(0.9, (1 + count) / (10 + count))
        wanted = decay * wanted + (1 - decay) * weights
    got = np.asarray(next(iter(state.ema_params.values())))
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-7)
    assert not np.array_equal(got, seen[-1])


def test_moments_and_accumulators_are_float32():
    """Under bfloat16 activations and frozen weights, too: what a loop over pieces carries is the
    sum of gradients."""
    model = dataclasses.replace(CONFIG.model, dtype="bfloat16", frozen_dtype="bfloat16")
    config = tiny_config(
        lora=LoRAConfig(rank=2), model=model, optimizer=OptimizerConfig(accumulate=2)
    )
    split, optimizer, state = setup(config)
    step = make_train_step(split, optimizer, config, STAGE)
    carried = [
        [variable.aval for variable in loop.outvars[: loop.params["num_carry"]]]
        for loop in loops(jax.make_jaxpr(step)(state, split.frozen, tiny_batch()).jaxpr)
    ]
    sums = [carry for carry in carried if len(carry) == len(state.params) + 1]
    assert len(sums) == 1
    assert {value.dtype for value in sums[0]} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim} == {
        jnp.dtype("float32")
    }
    assert {leaf.dtype for leaf in state.params.values()} == {jnp.dtype("float32")}
    assert all(".adapter." in name or name.startswith("aggregator") for name in state.params)


def loops(jaxpr):
    """Every scan in a program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from loops(inner)


def test_learning_rate_warms_up_in_every_stage():
    stages = (dataclasses.replace(STAGE, steps=10), dataclasses.replace(STAGE, steps=20))
    config = tiny_config(
        training=dataclasses.replace(CONFIG.training, stages=stages),
        optimizer=OptimizerConfig(learning_rate=1.0, warmup_steps=4),
    )
    rates = [float(learning_rate(config)(step)) for step in range(30)]
    np.testing.assert_allclose(rates[:5], [0.25, 0.5, 0.75, 1, 1], rtol=1e-6)
    np.testing.assert_allclose(rates[9:15], [1, 0.25, 0.5, 0.75, 1, 1], rtol=1e-6)


def test_only_matrices_decay():
    names = ("dit.img_in.kernel", "dit.img_in.bias", "x.adapter.parts.0.down", "aggregator.scale")
    assert is_matrix(dict.fromkeys(names, np.zeros(1))) == {
        "dit.img_in.kernel": True,
        "dit.img_in.bias": False,
        "x.adapter.parts.0.down": True,
        "aggregator.scale": False,
    }


@pytest.mark.telling
@pytest.mark.slow
def test_muon_moves_every_leaf():
    config = dataclasses.replace(
        CONFIG, optimizer=OptimizerConfig(kind="muon", learning_rate=0.02, warmup_steps=1)
    )
    split, optimizer, state = setup(config)
    before = {name: np.asarray(leaf) for name, leaf in state.params.items()}
    stage = dataclasses.replace(STAGE)
    state, _ = make_train_step(split, optimizer, config, stage)(state, split.frozen, tiny_batch())
    still = [name for name in before if np.array_equal(before[name], state.params[name])]
    # The pooled vector is zero, so its first layer's kernel has no gradient and moves by weight
    # decay alone.
    assert not still, still


def test_validation_is_the_same_whatever_the_step():
    split, _, state = setup()
    validate = make_validation(split, CONFIG, STAGE)
    batch = tiny_batch()
    a = validate(state.params, split.frozen, batch)
    b = validate(state.params, split.frozen, row(batch, 2))
    np.testing.assert_allclose(a[2], b[0], rtol=1e-5)


@pytest.mark.telling
@pytest.mark.slow
def test_one_example_is_learnt_by_heart():
    """At fixed times and noise, which a falling training loss alone does not show."""
    stage, steps = StageConfig(steps=200, references=False), 200
    model = dataclasses.replace(
        CONFIG.model, dit=dataclasses.replace(CONFIG.model.dit, in_channels=4)
    )
    config = tiny_config(
        model=model,
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=10, decay="cosine"),
        training=dataclasses.replace(CONFIG.training, stages=(stage,)),
    )
    trained, split = split_system(build_system(config), config)
    optimizer, one = make_optimizer(config), tiny_batch(rows=1)
    batch = jax.tree.map(
        lambda x: np.repeat(x, 16, axis=0), one._replace(target=one.target[..., :4])
    )
    state, step = (
        initial_state(trained, optimizer, config),
        make_train_step(split, optimizer, config, stage),
    )
    validate = make_validation(split, config, stage)
    before = float(np.mean(validate(state.params, split.frozen, batch)))
    for _ in range(steps):
        state, _ = step(state, split.frozen, batch)
    assert float(np.mean(validate(state.params, split.frozen, batch))) < 0.1 * before


def test_moving_average_at_step_zero_is_a_tenth_of_the_way_back():
    average = update_ema({"a": jnp.zeros(1)}, {"a": jnp.ones(1)}, jnp.int32(0), 0.99)
    np.testing.assert_allclose(average["a"], 0.9, rtol=1e-6)
