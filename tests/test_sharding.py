"""Meshes that can be and those that cannot, what lies where, and products whose matrices lie in slices."""

import math
import re
from itertools import pairwise
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from parity import relative_error

from squeeze_jax.checkpoints.build import build_system
from squeeze_jax.config import load_preset
from squeeze_jax.errors import InputError
from squeeze_jax.layers.linear import Linear
from squeeze_jax.layers.lora import LoRAConfig, add_lora, linears
from squeeze_jax.sharding import (
    MATRICES,
    arrange_devices,
    drop_indivisible,
    make_mesh,
    nearest_meshes,
    parameter_spec,
    use_mesh,
)

# --- products ----------------------------------------------------------------------------------------------------------


class Two(nnx.Module):
    """A feed-forward: its first matrix cut by outputs, its second by inputs, both with an adapter."""

    def __init__(self, width, hidden):
        self.up = Linear(width, hidden, rngs=nnx.Rngs(0))
        self.down = Linear(hidden, width, tensor_axis="in", rngs=nnx.Rngs(1))
        add_lora(self, LoRAConfig(rank=4, target="up|down"), rngs=nnx.Rngs(2))

    def __call__(self, x):
        return self.down(jnp.sin(self.up(x)))


@pytest.mark.parametrize("axes", [(2, 2, 2), (1, 4, 2), (2, 1, 4), (1, 1, 8)])
def test_products_of_sliced_matrices_equal_whole_ones(axes):
    """XLA's partitioner mixes up rows on 2 x 2 x 2 (JAX 0.10.2, 0.12.0) where matrices are not gathered first."""
    graph, state = nnx.split(Two(64, 64))
    rng = np.random.default_rng(0)
    leaves = {path: rng.standard_normal(v.shape).astype(np.float32) / 8 for path, v in nnx.to_flat_state(state)}
    x = rng.standard_normal((16, 4, 64)).astype(np.float32)
    mesh = make_mesh(*axes)
    names = {("up", "kernel"): "x.kernel", ("down", "kernel"): "x.proj.kernel"}
    where = {
        path: NamedSharding(mesh, parameter_spec(names.get(path, ".".join(map(str, path))), leaf.shape, mesh))
        for path, leaf in leaves.items()
    }
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))

    def gradients(mesh, leaves, x):
        def loss(leaves, x):
            with use_mesh(mesh):
                model = nnx.merge(
                    graph, nnx.from_flat_state([(p, v.replace(leaves[p])) for p, v in nnx.to_flat_state(state)])
                )
                return jnp.sum(jnp.sin(model(jnp.cos(x))))

        return jax.grad(loss, argnums=(0, 1))(leaves, x)

    wanted = jax.jit(gradients, static_argnums=0)(None, leaves, x)
    # As inside a block: what comes next wants the gradient of x cut by tensor.
    after = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor"))
    found = jax.jit(
        gradients, static_argnums=0, in_shardings=(where, rows), out_shardings=(where, after)
    )(mesh, leaves, x)  # fmt: skip
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
        assert relative_error(one, other) < 1e-5


@pytest.mark.parametrize(
    ("stored", "computed", "travels"),
    [("float32", "bfloat16", "bf16"), ("bfloat16", "float32", "bf16"), ("int8", "bfloat16", "i8")],
)
def test_a_matrix_travels_in_the_smaller_of_its_types(stored, computed, travels):
    layer = Linear(64, 32, dtype=jnp.dtype(computed), rngs=nnx.Rngs(0))
    layer.kernel.set_value(layer.kernel[...].astype(stored))
    graph, state = nnx.split(layer)

    def product(state, x):
        with use_mesh(make_mesh(1, 8, 1)):
            return nnx.merge(graph, state)(x)

    assert re.findall(r"(\w+)\[64,32\] = sharding_constraint", str(jax.make_jaxpr(product)(state, jnp.zeros((8, 64))))) == [
        travels
    ]


PRESETS = ("flux_stage2", "flux_schnell", "demo")


@pytest.mark.parametrize("preset", PRESETS)
def test_layers_cut_what_the_table_cuts(preset):
    """A layer says which axis of its kernel tensor cuts, the table says it by name: one truth."""
    config = load_preset(f"configs/{preset}.py")
    system = nnx.eval_shape(lambda: build_system(config, with_base=False))
    mesh = make_mesh(2, 2, 2)
    for name, linear in linears(system):
        shape = linear.kernel.shape
        cut = PartitionSpec(*(None,) * (len(shape) - 2), *MATRICES[linear.tensor_axis])
        assert parameter_spec(f"{name}.kernel", shape, mesh) == drop_indivisible(cut, shape, mesh), name


# --- meshes ------------------------------------------------------------------------------------------------------------


def test_one_axis_takes_what_is_left():
    assert dict(make_mesh().shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    assert dict(make_mesh(data=-1, fsdp=2, tensor=2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    ("sizes", "heads", "words"),
    [
        ((3, -1, 1), 0, ["data=3, fsdp=-1, tensor=1", "needs 6 devices, there are 8", "data=4, fsdp=2, tensor=1; "]),
        ((2, 3, 1), 0, ["needs 6 devices, there are 8", "nearest that work: data=2, fsdp=4, tensor=1; "]),
        ((1, 16, 1), 0, ["needs 16 devices", "nearest that work: data=1, fsdp=8, tensor=1; "]),
        ((1, 1, 8), 12, ["tensor=8 does not divide the transformer's 12", "nearest that work: data=1, fsdp=2, tensor=4; "]),
        ((1, 2, 4), 2, ["tensor=4 does not divide", "nearest that work: data=1, fsdp=4, tensor=2; "]),
        ((0, -1, 1), 0, ["sizes are at least 1"]),
        ((-1, -1, 1), 0, ["one of them may be -1"]),
    ],
)
def test_a_mesh_that_cannot_be_is_refused_with_the_nearest_that_can(sizes, heads, words):
    with pytest.raises(InputError) as stop:
        make_mesh(*sizes, heads=heads)
    for word in words:
        assert word in str(stop.value)
    assert str(stop.value).count("data=") <= 4


@pytest.mark.parametrize(("devices", "wanted", "slices", "heads"), [
    (8, (3, 3, 1), 1, 0), (256, (1, 100, 3), 4, 24), (48, (5, 5, 2), 3, 24), (7, (2, 2, 2), 1, 24), (1, (1, 8, 1), 1, 2),
])  # fmt: skip
def test_nearest_meshes_can_all_be_and_none_is_nearer(devices, wanted, slices, heads):
    """Against every triple of sizes."""

    def far(mesh):
        return sum(abs(math.log(a / b)) for a, b in zip(mesh, wanted))

    some = range(1, devices + 1)
    can = [
        (data, devices // data // tensor, tensor)
        for data in some for tensor in some
        if devices % (data * tensor) == 0 and data % slices == 0 and (not heads or heads % tensor == 0)
    ]  # fmt: skip
    found = nearest_meshes(devices, wanted, slices=slices, heads=heads)
    assert len(found) == min(3, len(can))
    assert set(found) <= set(can)
    np.testing.assert_allclose([far(mesh) for mesh in found], sorted(map(far, can))[: len(found)], rtol=1e-9, atol=1e-9)


def chips(slices, side):
    """Devices of TPU slices of side x side chips, a host of 2 x 2 each; a lone slice has no number, as a topology's."""
    return [
        SimpleNamespace(
            id=s * side * side + x * side + y, platform="tpu", device_kind="TPU v6 lite", coords=(x, y, 0), core_on_chip=0,
            process_index=(s * side + x // 2 * 2) * side // 4 + y // 2, **({"slice_index": s} if slices > 1 else {}),
        )
        for s in range(slices) for x in range(side) for y in range(side)
    ]  # fmt: skip


def test_slices_are_joined_over_data_alone():
    array = arrange_devices(chips(4, 2), (8, 2, 1))
    assert array.shape == (8, 2, 1)
    for group in array.reshape(4, 2, 2):  # two rows of data lie on one slice
        assert len({chip.slice_index for chip in group.flat}) == 1
    with pytest.raises(InputError, match=r"lies on 4 slices, so data must be a multiple of 4.*data=4, fsdp=4, tensor=1"):
        make_mesh(devices=chips(4, 2), data=2, fsdp=8)


@pytest.mark.parametrize("sizes", [(1, 16, 1), (2, 8, 1), (1, 4, 4), (2, 4, 2), (8, 1, 2)])
def test_neighbours_on_the_mesh_are_neighbours_on_the_chips(sizes):
    """Of a tensor group, whose traffic is the most; 2 x 8 has to split a physical axis."""
    array = arrange_devices(chips(1, 4), sizes)
    assert array.shape == sizes
    assert len({chip.id for chip in array.flat}) == 16
    for group in array.reshape(-1, sizes[2]):
        for one, other in pairwise(group):
            apart = (abs(a - b) for a, b in zip(one.coords, other.coords))
            assert sum(min(steps, 4 - steps) for steps in apart) == 1  # a ring on each axis
