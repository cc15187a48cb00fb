"""A base in int8: what its values stand for, what it costs in exactness, and that training leaves it alone."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parity import relative_error
from small_dit import inputs, random_dit, run
from tiny import tiny_config

from squeeze_jax.checkpoints.build import build_system, load_base
from squeeze_jax.config_json import from_json, to_json
from squeeze_jax.errors import InputError
from squeeze_jax.interop.load import save_dit
from squeeze_jax.layers.int8 import quantise
from squeeze_jax.layers.linear import Linear
from squeeze_jax.layers.lora import LoRAConfig, LoRAParam, add_lora, linears, merge_lora
from squeeze_jax.layers.stack import stack_blocks
from squeeze_jax.models.dit import DiTConfig
from squeeze_jax.sharding import make_mesh, parameter_spec, use_mesh
from squeeze_jax.training.state import create_params, flatten_params, split_system

pytest.importorskip("qwix", reason="needs the `quantize` extra")

TINY = tiny_config(lora=LoRAConfig(rank=2))
INT8 = dataclasses.replace(TINY, model=dataclasses.replace(TINY.model, frozen_dtype="int8"))
ONE_BLOCK = DiTConfig(
    in_channels=4, context_width=4, pooled_width=4, heads=2, head_width=8,
    num_double_blocks=1, num_single_blocks=1,
    rope_axes=(2, 2, 4), guidance=False,
)  # fmt: skip


def dequantised(linear) -> np.ndarray:
    """The kernels [depth, in, out] that a quantised layer stands for, in float64."""
    values, scale = np.asarray(linear.kernel[...]), np.asarray(linear.kernel_scale[...], np.float64)
    assert values.dtype == np.int8
    return values * scale[:, None, :]


def test_products_equal_those_of_the_rounded_kernel():
    """In float64; every output channel of every layer has a scale of its own and is off by half a step at most."""
    block = stack_blocks(lambda rngs: Linear(32, 24, rngs=rngs), 3, nnx.Rngs(0))
    rng = np.random.default_rng(0)
    kernel = (rng.standard_normal((3, 32, 24)) * 10.0 ** rng.uniform(-3, 3, (3, 1, 24))).astype(np.float32)
    bias = rng.standard_normal((3, 24)).astype(np.float32)
    block.kernel.set_value(jnp.asarray(kernel))
    block.bias.set_value(jnp.asarray(bias))
    quantise(block)
    rounded = dequantised(block)
    assert (np.abs(rounded - kernel) <= 0.5001 * np.asarray(block.kernel_scale[...])[:, None, :]).all()
    assert (np.abs(np.asarray(block.kernel[...], int)).max(axis=1) >= 127).all()  # the largest of a channel fills the range
    x = rng.standard_normal((5, 7, 32)).astype(np.float32)
    graph, leaves = nnx.split(block)
    _, y = jax.lax.scan(lambda _, layer: (None, nnx.merge(graph, layer)(x)), None, leaves)
    wanted = np.einsum("btc,dcf->dbtf", x.astype(np.float64), rounded) + bias[:, None, None]
    for channel in range(24):
        assert relative_error(y[..., channel], wanted[..., channel]) < 1e-6


def test_the_velocity_of_a_random_transformer_is_off_by_a_hundredth():
    dit, given = random_dit(ONE_BLOCK), inputs(references=(), config=ONE_BLOCK)
    exact = run(dit, given)
    assert 1e-4 < relative_error(run(quantise(dit), given), exact) < 0.02


def test_gradients_of_adapters_equal_those_over_the_rounded_base():
    """The int8 one on a mesh; there are no other gradients, an int8 kernel cannot have one."""
    mesh, rng = make_mesh(2, 2, 2), np.random.default_rng(0)
    target, context = (rng.standard_normal((4, n, 4)).astype(np.float32) for n in (4, 3))
    t, found = np.full(4, 0.6, np.float32), []
    for int8 in (True, False):
        dit = quantise(random_dit(ONE_BLOCK))
        for _, linear in linears(dit):
            if linear.kernel_scale is not None and not int8:
                linear.kernel.set_value(jnp.asarray(dequantised(linear), jnp.float32))
                linear.kernel_scale = nnx.data(None)
        add_lora(dit, LoRAConfig(rank=2), rngs=nnx.Rngs(1))
        for _, leaf in nnx.to_flat_state(nnx.state(dit, LoRAParam)):
            leaf.set_value(jnp.asarray(np.random.default_rng(leaf.size).standard_normal(leaf.shape), jnp.float32) / 4)
        graph, adapters, base = nnx.split(dit, LoRAParam, ...)

        @jax.jit
        def gradient(adapters, base, graph=graph, mesh=mesh if int8 else None):
            def loss(adapters):
                with use_mesh(mesh):
                    return jnp.sum(jnp.sin(nnx.merge(graph, adapters, base)(target, context, t, target_grid=(2, 2))))

            return jax.grad(loss)(adapters)

        found.append(flatten_params(gradient(adapters, base)))
    ours, wanted = found
    assert len(wanted) == 12
    for name in wanted:
        assert relative_error(ours[name], wanted[name]) < 1e-5, name


def test_a_base_read_onto_a_mesh_lies_there_in_int8(tmp_path):
    """Beside the kernels of blocks, everything is bfloat16; nothing but the base changes its kind."""
    save_dit(tmp_path, random_dit(TINY.model.dit), jnp.float32)
    config = dataclasses.replace(INT8, model=dataclasses.replace(INT8.model, dit_weights=str(tmp_path)))
    plain = dataclasses.replace(TINY, model=dataclasses.replace(TINY.model, frozen_dtype="bfloat16"))
    mesh = make_mesh(2, 2, 2)
    trained, split = create_params(config, mesh)
    same, other = split_system(nnx.eval_shape(lambda: build_system(plain)), plain)
    assert {name: leaf.shape for name, leaf in trained.items()} == {name: leaf.shape for name, leaf in same.items()}
    frozen, bfloat16 = flatten_params(split.frozen), flatten_params(other.frozen)
    scales = {name for name in frozen if name.endswith("kernel_scale")}
    assert len(scales) == 13
    assert set(frozen) == scales | set(bfloat16)
    for name in bfloat16:
        leaf, kernel = frozen[name], f"{name}_scale" in scales
        assert leaf.dtype == ("int8" if kernel else bfloat16[name].dtype), name
        assert leaf.sharding.spec == parameter_spec(name, leaf.shape, mesh), name
    size = lambda leaves: sum(math.prod(x.shape) * x.dtype.itemsize for n, x in leaves.items() if "_blocks" in n)  # noqa: E731
    assert size(frozen) < 0.65 * size(bfloat16)
    for name, leaf in flatten_params(nnx.state(load_base(config))).items():
        np.testing.assert_array_equal(leaf, frozen[f"dit.{name}"], err_msg=name)


def test_what_int8_cannot_do_is_refused():
    assert from_json(to_json(INT8)) == INT8
    with pytest.raises(InputError, match="int8, which cannot be trained; set lora"):
        dataclasses.replace(INT8, lora=None)
    dit = quantise(random_dit(ONE_BLOCK))
    add_lora(dit, LoRAConfig(rank=2), rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match=r"double_blocks.*is kept in int8; load the base in bfloat16"):
        merge_lora(dit)
