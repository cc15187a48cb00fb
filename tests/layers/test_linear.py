"""A linear layer on inputs side by side, cut into pieces, against NumPy in float64."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from parity import relative_error

from squeeze_jax.layers.linear import Linear
from squeeze_jax.layers.lora import Adapter, LowRank
from squeeze_jax.sharding import make_mesh, trace_for_platform, use_mesh

WIDTHS, SIZES = (3, 4, 1), (4, 1, 5)
PARTS = {
    "none": (),
    "one across pieces": ((2, 7),),
    "three": ((0, 3), (3, 1), (4, 6)),
    "whole": ((0, 10),),
}


@pytest.fixture(autouse=True, params=["tpu", "cpu"])
def platform(request):
    """Traced as for TPU, where products are cut, and as for a CPU, where there is one."""
    with trace_for_platform(request.param):
        yield request.param


def random(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng((seed, *shape)).standard_normal(shape), dtype)


def layer(parts, dtype=jnp.float32, **kinds):
    linear = Linear(8, 10, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0), **kinds)
    linear.bias.set_value(random(10, dtype=dtype))
    scale = jnp.asarray(1 / 3, jnp.float32)
    if parts:
        linear.adapter = Adapter(
            [
                LowRank(random(8, 2, seed=start), random(2, size, seed=start), scale, start)
                for start, size in parts
            ]
        )
    return linear


def expected(linear, inputs, wide=None):
    """The layer's definition, in float64, cut along its channels."""
    exact = lambda x: np.asarray(x, np.float64)  # noqa: E731
    x = np.concatenate([exact(each) for each in inputs], axis=-1)
    y = x @ (exact(linear.kernel[...]) if wide is None else wide) + exact(linear.bias[...])
    for part in () if linear.adapter is None else linear.adapter.parts:
        delta = (x @ exact(part.down[...])) @ exact(part.up[...]) / 3
        y[..., part.start : part.start + part.size] += delta
    return np.split(y, np.cumsum(SIZES)[:-1], axis=-1)


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_inputs_side_by_side_are_multiplied_and_cut(parts):
    linear, inputs = layer(parts), [random(2, 5, width) for width in WIDTHS]
    found = linear.multiply(inputs, SIZES)
    assert [piece.shape for piece in found] == [(2, 5, size) for size in SIZES]
    for piece, wanted in zip(found, expected(linear, inputs), strict=True):
        assert relative_error(piece, wanted) < 1e-5
    whole = linear(jnp.concatenate(inputs, axis=-1))
    assert relative_error(jnp.concatenate(found, axis=-1), whole) < 1e-5


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_gradients_are_those_of_the_whole_product(parts):
    linear, inputs = layer(parts), [random(2, 5, width) for width in WIDTHS]
    graph, leaves = nnx.split(linear)
    weights = random(2, 5, 10, seed=9)

    def cut(leaves, inputs):
        return jnp.sum(
            jnp.sin(jnp.concatenate(nnx.merge(graph, leaves).multiply(inputs, SIZES), axis=-1))
            * weights
        )

    def whole(leaves, inputs):
        return jnp.sum(
            jnp.sin(nnx.merge(graph, leaves)(jnp.concatenate(inputs, axis=-1))) * weights
        )

    found, wanted = (
        jax.tree.leaves(jax.grad(f, argnums=(0, 1))(leaves, inputs)) for f in (cut, whole)
    )
    assert len(found) == len(jax.tree.leaves(leaves)) + len(inputs)
    for one, other in zip(found, wanted, strict=True):
        assert relative_error(one, other) < 1e-5


def test_products_of_several_inputs_are_rounded_once():
    """In bfloat16: with partial products rounded, about a third of all values would differ."""
    linear = Linear(
        512, 64, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, use_bias=False, rngs=nnx.Rngs(0)
    )
    inputs = [random(64, 256, seed=seed, dtype=jnp.bfloat16) for seed in (1, 2)]
    [found] = linear.multiply(inputs, (64,))
    x = np.concatenate([np.asarray(each, np.float64) for each in inputs], axis=-1)
    wanted = (x @ np.asarray(linear.kernel[...], np.float64)).astype(ml_dtypes.bfloat16)
    assert found.dtype == jnp.bfloat16
    assert np.mean(np.asarray(found) != wanted) < 0.01


def test_an_int8_kernel_is_scaled_by_its_own_channels():
    linear, inputs = layer(()), [random(2, 5, width) for width in WIDTHS]
    values = jnp.asarray(np.random.default_rng(1).integers(-127, 128, (8, 10)), jnp.int8)
    scale = jnp.abs(random(10, seed=4)) + 0.5
    linear.kernel.set_value(values)
    linear.kernel_scale = nnx.Param(scale)
    wide = np.asarray(values, np.float64) * np.asarray(scale, np.float64)
    for piece, wanted in zip(
        linear.multiply(inputs, SIZES), expected(linear, inputs, wide), strict=True
    ):
        assert relative_error(piece, wanted) < 1e-5


@pytest.mark.parametrize(
    ("widths", "sizes"), [((3, 4), SIZES), ((3, 4, 2), SIZES), (WIDTHS, (4, 5)), (WIDTHS, (4, 7))]
)
def test_what_does_not_add_up_is_refused(widths, sizes):
    """A slice of rows or columns alone would leave channels out."""
    with pytest.raises(ValueError, match="8 to 10 channels"):
        layer(()).multiply([random(2, 5, width) for width in widths], sizes)
    with pytest.raises(ValueError, match=r"inputs of \[7\] channels"):
        layer(())(random(2, 5, 7))


@pytest.mark.parametrize("tensor_axis", ["in", "out"])
def test_on_a_mesh_it_is_the_same(tensor_axis, platform):
    """Where the tensor axis splits what would be cut, one product is cut afterwards; however many
    there are, the kernel and the adapter's two matrices are gathered once each."""
    widths, sizes, mesh = (8, 24), (8, 8, 16), make_mesh(2, 2, 2)
    linear = Linear(32, 32, tensor_axis=tensor_axis, rngs=nnx.Rngs(0))
    linear.adapter = Adapter([LowRank(random(32, 4), random(4, 32), jnp.asarray(0.5), 0)])
    inputs = [random(4, 6, width) for width in widths]
    graph, leaves = nnx.split(linear)

    @jax.jit
    def run(leaves, inputs):
        with use_mesh(mesh):
            return nnx.merge(graph, leaves).multiply(inputs, sizes)

    for piece, wanted in zip(run(leaves, inputs), linear.multiply(inputs, sizes), strict=True):
        assert relative_error(piece, wanted) < 1e-5
    traced = str(jax.make_jaxpr(run)(leaves, inputs))
    cut = {"in": (len(sizes), 1), "out": (1, len(widths))}[tensor_axis]
    pieces, rows = cut if platform == "tpu" else (1, 1)
    assert traced.count("dot_general[") == pieces * rows + rows + pieces  # of the base, down, up
    assert traced.count("_moved") == 3
