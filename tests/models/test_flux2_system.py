"""FLUX.2's transformer in the whole system: train step, sampler and caches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from naive_sampler import sample_naively
from parity import relative_error
from small_flux2 import random_flux2
from tiny import STAGE, tiny_batch, tiny_config

from squeeze_jax.diffusion.latents import timed_reference_positions
from squeeze_jax.models.aggregator import Aggregator
from squeeze_jax.models.flux2 import Flux2Config
from squeeze_jax.models.system import System
from squeeze_jax.sampling.sampler import make_sampler
from squeeze_jax.sampling.schedule import make_schedule, noise_for
from squeeze_jax.sampling.solver_config import SolverConfig
from squeeze_jax.training.optimizer import make_optimizer
from squeeze_jax.training.state import initial_state, split_system
from squeeze_jax.training.step import make_train_step

GRID, TOKENS = (2, 2), 4
CONFIG = tiny_config()
SMALL = Flux2Config(
    in_channels=64, context_width=24, heads=2, head_width=8, num_double_blocks=1, num_single_blocks=2,
    mlp_ratio=2.0, rope_axes=(2, 2, 2, 2),
)  # fmt: skip


def small_system(attention):
    config = dataclasses.replace(SMALL, reference_attention=attention)
    return System(Aggregator(CONFIG.aggregator, rngs=nnx.Rngs(0)), random_flux2(config))


def batch_of(rows):
    """Random records with FLUX.2's positions of a reference of 2 x 3 tokens."""
    batch = tiny_batch(rows=rows)
    positions = np.tile(timed_reference_positions([(2, 3)]), (rows, 1, 1))
    return batch._replace(references=batch.references._replace(positions=positions))


@pytest.mark.parametrize("attention", ["joint", "cached"])
def test_the_train_step_learns(attention):
    params, split = split_system(small_system(attention), CONFIG)
    optimizer, batch = make_optimizer(CONFIG), jax.tree.map(jnp.asarray, batch_of(4))
    state = initial_state(jax.tree.map(jnp.copy, params), optimizer, CONFIG)
    stage, losses = dataclasses.replace(STAGE, steps=30), []
    step = make_train_step(split, optimizer, CONFIG, stage)
    for _ in range(30):
        with jax.numpy_dtype_promotion("standard"):  # Optax computes 0.9 ** (an integer count)
            state, metrics = step(state, split.frozen, batch)
        losses.append(float(metrics.loss))
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    assert int(state.skipped) == 0


@pytest.mark.parametrize("attention", ["joint", "cached"])
@pytest.mark.parametrize(
    "solver",
    [SolverConfig(), SolverConfig(first_block_threshold=1e-9)],
    ids=["plain", "first-block cache"],
)
def test_the_staged_sampler_equals_the_naive_one(attention, solver):
    system, batch = small_system(attention), batch_of(2)
    graphdef, state = nnx.split(system)
    noise, scales = noise_for([0, 1], TOKENS, 64), np.float32([2.0, 1.5, 3.0])
    schedule = make_schedule(6, TOKENS, 0.9, 0.5, references=True)
    sampler = make_sampler(
        graphdef,
        target_grid=GRID,
        guided=(True,) * 3,
        guidance=1.0,
        solver=solver,
        width=SMALL.width,
    )
    sampled = sampler((state,), noise, batch.hidden_states, batch.references, schedule, scales)
    naive = sample_naively(
        system, noise, GRID, batch.hidden_states, batch.references, schedule, scales
    )
    assert relative_error(sampled, naive) < 1e-5
