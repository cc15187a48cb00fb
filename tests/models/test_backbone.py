"""A backbone of the tests' own goes the whole path: train step, sampler, caches, export of the aggregator."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from naive_sampler import sample_naively
from parity import relative_error
from tiny import STAGE, tiny_batch, tiny_config
from toy_backbone import ToyBackbone, ToyConfig

from squeeze_jax.diffusion.latents import latent_grid, pack, pack_references, reference_positions
from squeeze_jax.interop import aggregator as aggregator_format
from squeeze_jax.interop.mapping import export_entries, load_entries
from squeeze_jax.models.aggregator import Aggregator
from squeeze_jax.models.backbone import Backbone, join_references
from squeeze_jax.models.dit import DiT
from squeeze_jax.models.system import System
from squeeze_jax.sampling.sampler import make_sampler
from squeeze_jax.sampling.schedule import make_schedule, noise_for
from squeeze_jax.sampling.solver_config import SolverConfig
from squeeze_jax.training.optimizer import make_optimizer
from squeeze_jax.training.state import initial_state, split_system
from squeeze_jax.training.step import make_train_step

GRID, TOKENS = (2, 2), 4
CONFIG = tiny_config()


def toy_system(attention="joint"):
    rngs = nnx.Rngs(0)
    backbone = ToyBackbone(dataclasses.replace(ToyConfig(), reference_attention=attention), rngs=rngs)
    return System(Aggregator(CONFIG.aggregator, rngs=rngs), backbone)


@pytest.mark.parametrize("make", [toy_system, lambda: nnx.eval_shape(lambda: System(
    Aggregator(CONFIG.aggregator, rngs=nnx.Rngs(0)), DiT(CONFIG.model.dit, rngs=nnx.Rngs(0))))])  # fmt: skip
def test_the_contract_has_every_name(make):
    assert isinstance(make().dit, Backbone)


@pytest.mark.parametrize("attention", ["joint", "cached"])
def test_the_train_step_learns(attention):
    params, split = split_system(toy_system(attention), CONFIG)
    optimizer, batch = make_optimizer(CONFIG), jax.tree.map(jnp.asarray, tiny_batch())
    state = initial_state(jax.tree.map(jnp.copy, params), optimizer, CONFIG)
    step, losses = make_train_step(split, optimizer, CONFIG, dataclasses.replace(STAGE, steps=30)), []
    for _ in range(30):
        with jax.numpy_dtype_promotion("standard"):  # Optax computes 0.9 ** (an integer count)
            state, metrics = step(state, split.frozen, batch)
        losses.append(float(metrics.loss))
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    assert int(state.skipped) == 0


@pytest.mark.parametrize("attention", ["joint", "cached"])
@pytest.mark.parametrize(
    "solver", [SolverConfig(), SolverConfig(first_block_threshold=1e-9)], ids=["plain", "first-block cache"]
)
def test_the_staged_sampler_equals_the_naive_one(attention, solver):
    system, batch = toy_system(attention), tiny_batch(rows=2)
    graphdef, state = nnx.split(system)
    noise, scales = noise_for([0, 1], TOKENS, 64), np.float32([2.0, 1.5, 3.0])
    schedule = make_schedule(6, TOKENS, 0.9, 0.5, references=True)
    width = system.dit.config.width
    sampler = make_sampler(graphdef, target_grid=GRID, guided=(True,) * 3, guidance=1.0, solver=solver, width=width)
    sampled = sampler((state,), noise, batch.hidden_states, batch.references, schedule, scales)
    naive = sample_naively(system, noise, GRID, batch.hidden_states, batch.references, schedule, scales)
    assert relative_error(sampled, naive) < 1e-5


def test_its_aggregator_is_exported_and_read_back():
    system, other = toy_system(), toy_system()
    table = aggregator_format.entries(CONFIG.aggregator)
    written = export_entries(system.aggregator, table)
    for _, leaf in nnx.to_flat_state(nnx.state(other.aggregator)):
        leaf.set_value(jnp.zeros_like(leaf.get_value()))
    load_entries(other.aggregator, table, written)
    states = tiny_batch().hidden_states
    np.testing.assert_array_equal(other.aggregate(states).tokens, system.aggregate(states).tokens)


def test_references_of_one_size_are_packed_like_any_others():
    """Two samples with the same two references each, as the data workers pack them."""
    rng = np.random.default_rng(0)
    latents = [rng.standard_normal((2, *size, 3)).astype(np.float32) for size in ((4, 6), (2, 8))]
    rows = [[latent[i] for latent in latents] for i in range(2)]
    expected = pack_references(rows, [(3, 5)] * 2, length=6 + 4, channels=12)
    found = join_references(
        [(jnp.asarray(pack(x)), latent_grid(x)) for x in latents], (3, 5), reference_positions
    )
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
