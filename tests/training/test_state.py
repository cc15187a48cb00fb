"""A new run's state: made where it lies, and what the fingerprint of its frozen part tells
apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config

from squeeze_jax.checkpoints.fingerprint import fingerprint
from squeeze_jax.config import OptimizerConfig
from squeeze_jax.layers.lora import LoRAConfig
from squeeze_jax.sharding import make_mesh, parameter_spec
from squeeze_jax.training.optimizer import make_optimizer, schedule_step
from squeeze_jax.training.state import (
    begin_stage,
    create_params,
    flatten_params,
    make_state,
    replace_params,
)

CONFIG = tiny_config(lora=LoRAConfig(rank=4))


@pytest.fixture(autouse=True)
def _optax_promotes():
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_values_do_not_depend_on_the_mesh_and_nothing_lies_whole_that_is_shared():
    one, eight = make_mesh(1, 1, 1, devices=jax.devices()[:1]), make_mesh(1, 4, 2)
    (alone, split), (shared, parts) = create_params(CONFIG, one), create_params(CONFIG, eight)
    for name, leaf in alone.items():
        np.testing.assert_allclose(leaf, shared[name], rtol=1e-6, atol=1e-7, err_msg=name)
    state = make_state(shared, make_optimizer(CONFIG), CONFIG, eight)
    cut = 0
    for name, leaf in (flatten_params(parts.frozen) | state.params | state.ema_params).items():
        spec = parameter_spec(name, leaf.shape, eight)
        assert leaf.sharding.is_equivalent_to(jax.sharding.NamedSharding(eight, spec), leaf.ndim), (
            name
        )
        cut += any(spec)
    assert cut > 20
    assert all(leaf.dtype == jnp.float32 for leaf in state.params.values())
    assert flatten_params(split.frozen).keys() == flatten_params(parts.frozen).keys()


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_further_stage_begins_with_the_average_and_nothing_else(kind):
    """Moments are zero, the average is the weights, and the schedule is at the run's step."""
    settings = OptimizerConfig(kind=kind, ema=0.9)
    config, mesh = tiny_config(optimizer=settings), make_mesh(1, 1, 1, devices=jax.devices()[:1])
    params, _ = create_params(config, mesh)
    optimizer, rng = make_optimizer(config), np.random.default_rng(0)

    def noisy(leaf):
        drawn = rng.integers(1, 9) if leaf.ndim == 0 else rng.standard_normal(leaf.shape)
        return jnp.asarray(drawn, leaf.dtype)

    state = jax.tree.map(noisy, make_state(params, optimizer, config, mesh))
    state = state._replace(step=jnp.int32(70), skipped=jnp.int32(3))
    average = {name: np.asarray(leaf) for name, leaf in state.ema_params.items()}
    begun = begin_stage(state, optimizer, config, mesh)
    assert (int(begun.step), int(begun.skipped)) == (70, 3)
    assert int(schedule_step(begun.opt_state, jnp.int32(-1))) == 70
    for name, leaf in average.items():
        np.testing.assert_array_equal(begun.params[name], leaf)
        np.testing.assert_array_equal(begun.ema_params[name], leaf)
    counts = [int(leaf) for leaf in jax.tree.leaves(begun.opt_state) if leaf.dtype == jnp.int32]
    assert sorted(set(counts)) == [0, 70], "bias correction begins anew, the schedule goes on"
    by_path = jax.tree_util.tree_leaves_with_path(begun.opt_state)
    moments = [leaf for path, leaf in by_path if getattr(path[-1], "key", None) in average]
    assert len(moments) >= len(average)
    assert not any(np.any(leaf) for leaf in moments)


def test_the_fingerprint_is_of_bits_alone():
    _, split = create_params(CONFIG, make_mesh(1, 1, 1, devices=jax.devices()[:1]))
    leaves = {name: np.asarray(leaf) for name, leaf in flatten_params(split.frozen).items()}
    same = fingerprint(split.frozen)
    mesh = make_mesh(2, 2, 2)
    spread = {
        name: jax.device_put(
            leaf, jax.sharding.NamedSharding(mesh, parameter_spec(name, leaf.shape, mesh))
        )
        for name, leaf in leaves.items()
    }
    assert fingerprint(replace_params(split.frozen, spread)) == same
    name = "dit.txt_in.kernel"

    def changed(leaf):
        return fingerprint(replace_params(split.frozen, leaves | {name: leaf}))

    bit = leaves[name].copy()
    bit.view(np.uint32)[3, 5] ^= 1
    swapped = leaves[name].copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    transposed = leaves[name].copy()
    transposed[:16, :16] = transposed[:16, :16].T.copy()
    found = {
        same,
        changed(bit),
        changed(swapped),
        changed(transposed),
        changed(leaves[name].astype(jnp.bfloat16)),
    }
    assert len(found) == 5
