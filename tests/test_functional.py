"""The functional core: equal to the commands' own programs, and to itself under every transformation."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny import randomised, row, tiny_batch, tiny_config

from squeeze_jax import functional
from squeeze_jax.batch import HiddenStates, References
from squeeze_jax.data.feature_extractor import FeatureExtractor
from squeeze_jax.layers.lora import LoRAConfig
from squeeze_jax.sampling.batching import pad_references
from squeeze_jax.sampling.pipeline import Pipeline
from squeeze_jax.sampling.settings import Settings
from squeeze_jax.training.optimizer import make_optimizer
from squeeze_jax.training.state import flatten_params, initial_state, split_system
from squeeze_jax.training.step import make_train_step

CONFIG = tiny_config(lora=LoRAConfig(rank=2, target=".*"))
STAGE = CONFIG.training.stages[0]
KEY = jax.random.key(3)
SETTINGS = Settings(steps=3, cfg_scale=2.0)


def weights(seed=0):
    """Random everywhere, as dictionaries."""
    system = randomised(CONFIG, seed)
    rng = np.random.default_rng(seed)
    for path, leaf in nnx.to_flat_state(nnx.state(system)):
        if path[-1] in ("down", "up"):
            leaf.set_value(jnp.asarray(0.3 * rng.standard_normal(leaf.shape), leaf.dtype))
    trained, rest = split_system(system, CONFIG)
    return trained, flatten_params(rest.frozen)


@pytest.fixture(scope="module")
def parts():
    trained, frozen = weights()
    return trained, frozen, tiny_batch()


@pytest.mark.telling
@pytest.mark.slow
def test_init_is_pure_and_has_the_leaves_of_the_system():
    trained, frozen = jax.jit(functional.init, static_argnums=0)(CONFIG, KEY)
    again, _ = jax.jit(functional.init, static_argnums=0)(CONFIG, KEY)
    other, _ = jax.jit(functional.init, static_argnums=0)(CONFIG, jax.random.key(4))
    whole, rest = weights()
    assert {n: x.shape for n, x in trained.items()} == {n: x.shape for n, x in whole.items()}
    assert {n: (x.shape, x.dtype) for n, x in frozen.items()} == {n: (x.shape, x.dtype) for n, x in rest.items()}
    name = "aggregator.out.kernel"
    np.testing.assert_array_equal(trained[name], again[name])
    assert not np.allclose(trained[name], other[name])


@jax.numpy_dtype_promotion("standard")  # optax promotes
def test_a_step_is_the_one_that_training_takes(parts):
    trained, frozen, batch = parts
    split = functional.split(CONFIG)
    optimizer = make_optimizer(CONFIG)
    system = functional.merge(trained, frozen, CONFIG)
    leaves, of_system = split_system(system, CONFIG)
    wanted, metrics = make_train_step(of_system, optimizer, CONFIG, STAGE)(
        jax.tree.map(jnp.copy, initial_state(leaves, optimizer, CONFIG)), of_system.frozen, batch
    )
    step = jax.jit(functional.train_step, static_argnames="config")
    found, of_step = step(functional.initial_state_of(trained, CONFIG), frozen, batch, config=CONFIG)
    assert functional.split(dataclasses.replace(CONFIG)) is split, "equal configs share it"
    np.testing.assert_allclose(of_step.loss, metrics.loss, rtol=1e-6)
    for name, leaf in wanted.params.items():
        np.testing.assert_allclose(found.params[name], leaf, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.telling
@pytest.mark.slow
def test_an_optimizer_of_ones_own(parts):
    trained, frozen, batch = parts
    key = jax.random.fold_in(jax.random.key(CONFIG.training.seed), 0)
    gradient = jax.jit(jax.grad(functional.loss), static_argnums=4)(trained, frozen, batch, key, CONFIG)
    sgd = optax.sgd(0.1)
    state = functional.initial_state_of(trained, CONFIG, sgd)
    step = jax.jit(functional.train_step, static_argnames=("config", "optimizer"))
    found, _ = step(state, frozen, batch, config=CONFIG, optimizer=sgd)
    for name, leaf in trained.items():
        np.testing.assert_allclose(found.params[name], leaf - 0.1 * gradient[name], rtol=1e-4, atol=1e-6)


def test_a_population_of_adapters_is_each_of_them_alone(parts):
    _, frozen, batch = parts
    several = [weights(seed)[0] for seed in (0, 1, 2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *several)
    loss = jax.jit(functional.loss, static_argnums=4)
    alone = [loss(trained, frozen, batch, KEY, CONFIG) for trained in several]
    each = jax.vmap(lambda trained: functional.loss(trained, frozen, batch, KEY, CONFIG))
    together = jax.jit(each)(stacked)
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    assert len({round(float(value), 3) for value in alone}) == 3


@pytest.mark.telling
@pytest.mark.slow
def test_a_checkpointed_loss_has_the_same_gradient(parts):
    trained, frozen, batch = parts

    def gradient(loss):
        return jax.jit(jax.grad(lambda leaves: loss(leaves, frozen, batch, KEY, CONFIG)))(trained)

    wanted = gradient(functional.loss)
    found = gradient(jax.checkpoint(functional.loss, static_argnums=4))
    for name, leaf in wanted.items():
        np.testing.assert_allclose(found[name], leaf, rtol=1e-5, atol=1e-6)


def drawn(trained, frozen, states, references, key):
    return functional.sample(trained, frozen, states, references, key, CONFIG, SETTINGS)


@pytest.mark.telling
@pytest.mark.slow
def test_sampling_over_keys_is_each_key_alone(parts):
    trained, frozen, batch = parts
    states, references = row(batch.hidden_states, 0), row(batch.references, 1)
    keys = jax.random.split(KEY, 3)
    sample = jax.jit(drawn)
    alone = [sample(trained, frozen, states, references, key) for key in keys]
    together = jax.jit(jax.vmap(drawn, (None, None, None, None, 0)))(trained, frozen, states, references, keys)
    np.testing.assert_allclose(together, np.stack(alone), rtol=1e-4, atol=1e-4)
    assert np.abs(alone[0] - alone[1]).max() > 0.1
    text = sample(trained, frozen, states, None, KEY)
    assert text.shape == alone[0].shape and np.abs(text - alone[0]).max() > 1e-3


def test_a_picture_is_the_one_that_the_pipeline_draws_from_that_seed(parts):
    trained, frozen, batch = parts
    states = row(batch.hidden_states, 0)
    latent = np.random.default_rng(0).standard_normal((4, 6, 16)).astype(np.float32)
    pipeline = Pipeline.of(functional.merge(trained, frozen, CONFIG), CONFIG, object.__new__(FeatureExtractor))
    wanted = pipeline.sample(states, [[latent]], [5], SETTINGS)
    references = pad_references([[latent]], (2, 2), CONFIG.model.dit.reference_positions)
    found = jax.jit(drawn)(trained, frozen, states, references, jax.random.key(5))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_the_velocity_is_the_systems(parts):
    trained, frozen, batch = parts
    t = jnp.array([0.0, 0.2, 0.7, 1.0])
    system = functional.merge(trained, frozen, CONFIG)
    wanted = system.velocity(batch.target, (2, 2), t, system.aggregate(batch.hidden_states), batch.references)
    found = functional.velocity(trained, frozen, batch.target, t, batch.hidden_states, batch.references, CONFIG)
    np.testing.assert_array_equal(found, wanted)


LOAD = """
import sys
import jax, numpy as np
from pathlib import Path
folder = Path(sys.argv[1])
program = jax.export.deserialize(bytearray((folder / "sampler.bin").read_bytes()))
inputs = dict(np.load(folder / "inputs.npz"))
np.save(folder / "found.npy", program.call(inputs))
assert not any(name.startswith(("squeeze_jax", "flax")) for name in sys.modules), "the program needs no package"
"""


@pytest.mark.telling
@pytest.mark.slow
def test_an_exported_sampler_runs_where_the_package_is_not(parts, tmp_path):
    trained, frozen, batch = parts
    states, references = row(batch.hidden_states, 0), row(batch.references, 1)
    inputs = {f"states.{k}": np.asarray(v) for k, v in states._asdict().items()}
    inputs |= {f"references.{k}": np.asarray(v) for k, v in references._asdict().items()}
    inputs["key"] = np.asarray(jax.random.key_data(KEY))

    def program(inputs):
        def part(kind, prefix):
            return kind(**{k: inputs[f"{prefix}.{k}"] for k in kind._fields})

        key = jax.random.wrap_key_data(inputs["key"])
        return drawn(trained, frozen, part(HiddenStates, "states"), part(References, "references"), key)

    exported = jax.export.export(jax.jit(program))(inputs)
    (tmp_path / "sampler.bin").write_bytes(exported.serialize())
    np.savez(tmp_path / "inputs.npz", **inputs)
    subprocess.run([sys.executable, "-c", LOAD, str(tmp_path)], check=True, cwd=tmp_path)
    wanted = jax.jit(drawn)(trained, frozen, states, references, KEY)
    np.testing.assert_allclose(np.load(tmp_path / "found.npy"), wanted, rtol=1e-4, atol=1e-4)
