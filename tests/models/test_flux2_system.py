"""FLUX.2's transformer in the whole system: train step, sampler, caches, adapters, meshes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from naive_sampler import sample_naively
from parity import relative_error
from small_flux2 import CONFIG, REFERENCES, arrays_of, inputs, random_flux2
from tiny import STAGE, tiny_batch, tiny_config

from squeeze_jax.diffusion.latents import timed_reference_positions
from squeeze_jax.layers.lora import UNO, LoRAConfig, add_lora, linears
from squeeze_jax.models.aggregator import Aggregator
from squeeze_jax.models.flux2 import Flux2, Flux2Config
from squeeze_jax.models.system import System
from squeeze_jax.sampling.sampler import make_sampler
from squeeze_jax.sampling.schedule import make_schedule, noise_for
from squeeze_jax.sampling.solver_config import SolverConfig
from squeeze_jax.sharding import (
    MATRICES,
    batch_sharding,
    drop_indivisible,
    make_mesh,
    parameter_spec,
    shardings,
    use_mesh,
)
from squeeze_jax.training.optimizer import make_optimizer
from squeeze_jax.training.state import initial_state, split_system
from squeeze_jax.training.step import make_train_step

GRID, TOKENS = (2, 2), 4
TINY = tiny_config()
SMALL = Flux2Config(
    in_channels=64, context_width=24, heads=2, head_width=8, num_double_blocks=1, num_single_blocks=2,
    mlp_ratio=2.0, rope_axes=(2, 2, 2, 2),
)  # fmt: skip


def small_system(attention):
    config = dataclasses.replace(SMALL, reference_attention=attention)
    return System(Aggregator(TINY.aggregator, rngs=nnx.Rngs(0)), random_flux2(config))


def batch_of(rows):
    """Random records with FLUX.2's positions of a reference of 2 x 3 tokens."""
    batch = tiny_batch(rows=rows)
    positions = np.tile(timed_reference_positions([(2, 3)]), (rows, 1, 1))
    return batch._replace(references=batch.references._replace(positions=positions))


@pytest.mark.telling
@pytest.mark.slow
@pytest.mark.parametrize("attention", ["joint", "cached"])
def test_the_train_step_learns(attention):
    params, split = split_system(small_system(attention), TINY)
    optimizer, batch = make_optimizer(TINY), jax.tree.map(jnp.asarray, batch_of(4))
    state = initial_state(jax.tree.map(jnp.copy, params), optimizer, TINY)
    stage, losses = dataclasses.replace(STAGE, steps=30), []
    step = make_train_step(split, optimizer, TINY, stage)
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
    sample_both_ways(attention, solver, np.float32([2.0, 1.5, 3.0]), steps=6)


def test_four_steps_without_guidance_equal_the_naive_ones():
    """As the distilled model is drawn from: each condition is evaluated alone."""
    sample_both_ways("joint", SolverConfig(), np.ones(3, np.float32), steps=4)


def sample_both_ways(attention, solver, scales, steps):
    system, batch = small_system(attention), batch_of(2)
    graphdef, state = nnx.split(system)
    noise = noise_for([0, 1], TOKENS, 64)
    shift = SMALL.schedule_shift
    schedule = make_schedule(steps, TOKENS, 0.9, 0.8, references=True, shift=shift)
    sampler = make_sampler(
        graphdef,
        target_grid=GRID,
        guided=(bool((scales != 1).any()),) * 3,
        guidance=1.0,
        solver=solver,
        width=SMALL.width,
    )
    sampled = sampler((state,), noise, batch.hidden_states, batch.references, schedule, scales)
    naive = sample_naively(
        system, noise, GRID, batch.hidden_states, batch.references, schedule, scales
    )
    assert relative_error(sampled, naive) < 1e-5


# --- adapters and meshes --------------------------------------------------------------------------


def test_adapters_go_where_unos_go():
    """On a single block's first layer they cover q, k and v alone, not the feed-forward's rows."""
    model = random_flux2()
    streams = [
        f"double_blocks.{s}_attn.{layer}" for s in ("img", "txt") for layer in ("proj", "qkv")
    ]
    paths = add_lora(model, LoRAConfig(4, target=UNO), rngs=nnx.Rngs(0))
    assert paths == [*streams, "single_blocks.linear1", "single_blocks.linear2"]
    (part,) = model.single_blocks.linear1.adapter.parts
    assert (part.start, part.size) == (0, 3 * CONFIG.width)


def test_layers_of_klein_cut_what_the_sharding_table_cuts():
    model = nnx.eval_shape(lambda: Flux2(Flux2Config(guidance=True), rngs=nnx.Rngs(0)))
    mesh, cut_in = make_mesh(2, 2, 2), set()
    for name, linear in linears(model):
        shape = linear.kernel.shape
        cut = jax.sharding.PartitionSpec(*(None,) * (len(shape) - 2), *MATRICES[linear.tensor_axis])
        found = parameter_spec(f"{name}.kernel", shape, mesh)
        assert found == drop_indivisible(cut, shape, mesh), name
        assert {"fsdp", "tensor"} <= set(found), name
        if linear.tensor_axis == "in":
            cut_in.add(name.split(".", 1)[1])
    assert cut_in == {
        "img_attn.proj",
        "txt_attn.proj",
        "img_mlp.out_layer",
        "txt_mlp.out_layer",
        "linear2",
    }


@pytest.mark.telling
@pytest.mark.slow
@pytest.mark.parametrize("axes", [(2, 2, 2), pytest.param((2, 1, 4), marks=pytest.mark.slow)])
def test_a_mesh_gives_what_one_device_gives(axes):
    """Velocity, and gradients of inputs and weights."""
    config = dataclasses.replace(CONFIG, heads=4, context_width=48, mlp_ratio=2.0)
    x = inputs(batch=8, config=config)
    graph, state = nnx.split(random_flux2(config))
    flat = nnx.to_flat_state(state)
    leaves = {".".join(map(str, path)): leaf.get_value() for path, leaf in flat}
    arrays = arrays_of(x)
    arrays = {k: v for k, v in arrays.items() if v is not None}

    def program(mesh, leaves, arrays):
        def loss(leaves, arrays):
            with use_mesh(mesh):
                values = [
                    (path, leaf.replace(leaves[".".join(map(str, path))])) for path, leaf in flat
                ]
                model, arrays = nnx.merge(graph, nnx.from_flat_state(values)), dict(arrays)
                references = list(zip(arrays.pop("references"), REFERENCES, strict=True))
                out = model(**arrays, target_grid=x["target_grid"], references=references)
                return jnp.sum(jnp.sin(out)), out

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(leaves, arrays)

    mesh = make_mesh(*axes)
    where = shardings(leaves, mesh), jax.tree.map(lambda _: batch_sharding(mesh), arrays)
    wanted = jax.jit(program, static_argnums=0)(None, leaves, arrays)
    found = jax.jit(program, static_argnums=0, in_shardings=where)(mesh, leaves, arrays)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
        assert relative_error(one, other) < 1e-5
