"""Every mesh gives the numbers of one device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from parity import relative_error
from tiny import STAGE, randomised, tiny_batch, tiny_config

from squeeze_jax.config import OptimizerConfig, StageConfig
from squeeze_jax.diffusion.flow import add_noise
from squeeze_jax.layers.lora import LoRAConfig
from squeeze_jax.models import backbone, dit, dit_blocks
from squeeze_jax.sharding import batch_sharding, current_mesh, make_mesh, shardings
from squeeze_jax.training.optimizer import make_optimizer
from squeeze_jax.training.state import (
    flatten_params,
    initial_state,
    replace_params,
    split_system,
    state_shardings,
)
from squeeze_jax.training.step import make_train_step, sample_randomness, step_key
from squeeze_jax.training.validation import make_validation

CONFIG = tiny_config()
CACHED = dataclasses.replace(CONFIG.model.dit, reference_attention="cached")
SGD = optax.chain(optax.trace(0.0), optax.scale(-0.1))
"""Plain descent whose state is the gradient."""
WAYS = {
    "whole": (CONFIG, STAGE),
    "adapters": (tiny_config(lora=LoRAConfig(rank=4, alpha=4.0)), STAGE),
    "stage 1": (CONFIG, StageConfig(steps=4, references=False)),
    "cached": (
        dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, dit=CACHED)),
        STAGE,
    ),
    "accumulated": (dataclasses.replace(CONFIG, optimizer=OptimizerConfig(accumulate=2)), STAGE),
}
MESHES = [
    (8, 1, 1), (1, 8, 1), (2, 4, 1), (4, 2, 1),
    (2, 2, 2), (1, 4, 2), (4, 1, 2), (1, 2, 4), (2, 1, 4), (1, 1, 8),
]  # fmt: skip
TELLING = [((2, 2, 2), "adapters")]
EVERY_MESH = [
    pytest.param(
        axes, way, id=f"{axes} {way}", marks=pytest.mark.telling if (axes, way) in TELLING else ()
    )
    for way in WAYS
    for axes in MESHES
]


def setup(config):
    trained, split = split_system(randomised(config), config)
    return split, initial_state(trained, SGD, config)


@functools.cache
def one_device(way):
    """State before and after a step, as NumPy arrays, and the step's loss."""
    config, stage = WAYS[way]
    split, state = setup(config)
    before = jax.tree.map(np.asarray, state)
    state, metrics = make_train_step(split, SGD, config, stage)(
        state, split.frozen, tiny_batch(rows=8)
    )
    return before, jax.tree.map(np.asarray, state), metrics.loss


@pytest.mark.slow
@pytest.mark.parametrize(("axes", "way"), EVERY_MESH)
def test_one_device_equals_eight(axes, way):
    """Loss, every gradient and every parameter after a step of plain descent; rows of different
    lengths."""
    config, stage = WAYS[way]
    before, one, loss = one_device(way)
    split, state = setup(config)
    mesh = make_mesh(*axes)
    where, leaves = state_shardings(state, mesh), flatten_params(split.frozen)
    frozen = replace_params(split.frozen, jax.device_put(leaves, shardings(leaves, mesh)))
    step = make_train_step(split, SGD, config, stage, where)
    batch = jax.device_put(tiny_batch(rows=8), batch_sharding(mesh))
    eight, metrics = step(jax.device_put(state, where), frozen, batch)

    np.testing.assert_allclose(metrics.loss, loss, rtol=1e-5)
    gradients, wanted = eight.opt_state[0].trace, one.opt_state[0].trace
    moved = [name for name, gradient in wanted.items() if gradient.any()]
    assert len(moved) >= len(wanted) - 1  # a stage without a pooled vector leaves one kernel still
    for name in wanted:
        if name in moved:
            assert relative_error(gradients[name], wanted[name]) < 1e-5, name
            assert relative_error(eight.params[name], one.params[name]) < 1e-5, name
            assert not np.array_equal(before.params[name], one.params[name]), name
        else:
            assert not np.asarray(gradients[name]).any(), name
    for name, leaf in eight.params.items():
        assert gradients[name].sharding == leaf.sharding == where.params[name], name

    step(eight, frozen, batch)
    assert step._cache_size() == 1, (
        "the state comes out where it went in, so the step is compiled once"
    )


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_moments_and_average_lie_as_their_parameters(kind):
    """On real arrays: a stack's depth is never cut, its matrices are (flax 5112)."""
    config = dataclasses.replace(WAYS["adapters"][0], optimizer=OptimizerConfig(kind=kind, ema=0.9))
    trained, _ = split_system(randomised(config), config)
    state = initial_state(trained, make_optimizer(config), config)
    mesh = make_mesh(2, 2, 2)
    state = jax.device_put(state, state_shardings(state, mesh))
    checked = dict.fromkeys(trained, 0)
    for path, leaf in jax.tree_util.tree_leaves_with_path((state.opt_state, state.ema_params)):
        if (name := getattr(path[-1], "key", None)) in trained:
            place = state.params[name].sharding
            assert leaf.sharding == place, name
            assert {shard.data.shape for shard in leaf.addressable_shards} == {
                place.shard_shape(leaf.shape)
            }, name
            checked[name] += 1
    assert set(checked.values()) <= {2, 3}, checked  # Muon's matrices have one moment, AdamW's two
    up = state.params["dit.single_blocks.linear1.adapter.parts.0.up"]
    assert up.shape == (2, 4, 48)
    assert up.addressable_shards[0].data.shape == (2, 2, 24)


def test_step_and_validation_are_traced_on_their_mesh(monkeypatch):
    """A kernel cannot be partitioned from outside: it has to know the mesh (sampling:
    test_pipeline)."""
    seen = []
    for module in (dit, dit_blocks, backbone):
        watched = lambda x, kind: (seen.append(current_mesh()), x)[1]  # noqa: E731
        monkeypatch.setattr(module, "constrain", watched)
    split, state = setup(CONFIG)
    mesh, batch = make_mesh(2, 4, 1), tiny_batch(rows=8)
    step = make_train_step(split, SGD, CONFIG, STAGE, state_shardings(state, mesh))
    jax.eval_shape(step, state, split.frozen, batch)
    jax.eval_shape(make_validation(split, CONFIG, STAGE, mesh), state.params, split.frozen, batch)
    assert len(seen) > 10
    assert set(seen) == {mesh.abstract_mesh}
    assert current_mesh() is None


def test_noise_is_the_same_however_many_devices_draw_it():
    """Bit for bit, drawn where it is used: in a program whose rows are cut (jax 40232)."""
    target = tiny_batch(rows=8).target

    def noised(step, target):
        draws = sample_randomness(step_key(CONFIG, step), target.shape, CONFIG, STAGE)
        return draws, add_noise(target, draws.noise, draws.t)

    found = []
    for devices in (1, 2, 8):
        mesh = jax.make_mesh(
            (1, devices, 1), ("data", "fsdp", "tensor"), devices=jax.devices()[:devices]
        )
        rows = batch_sharding(mesh)
        found.append(
            jax.jit(noised, in_shardings=(None, rows), out_shardings=rows)(jnp.int32(3), target)
        )
        assert len(found[-1][1].addressable_shards) == devices
    for other in found[1:]:
        jax.tree.map(np.testing.assert_array_equal, found[0], other)
    assert len(np.unique(found[0][0].t)) == 8
