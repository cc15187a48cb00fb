"""Traffic read from compiled programs whose traffic is known."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from squeeze_jax.planning.collectives import collectives
from squeeze_jax.sharding import make_mesh

MESH = {"data": 2, "fsdp": 2, "tensor": 2}


def compiled(function, in_specs, out_specs, *sizes):
    mesh = make_mesh(**MESH)
    inner = partial(jax.shard_map, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    shapes = [jax.ShapeDtypeStruct(size, jnp.float32, sharding=NamedSharding(mesh, s)) for size, s in zip(sizes, in_specs)]
    text = jax.jit(inner(function)).lower(*shapes).compile().as_text()
    return collectives(text, MESH)


@pytest.mark.parametrize("axes", [("data",), ("fsdp",), ("tensor",), ("data", "fsdp"), ("data", "tensor")])
def test_a_sum_in_a_loop_counts_as_often_as_it_runs(axes):
    def function(x):
        return jax.lax.scan(lambda x, _: (jax.lax.psum(x, axes) * 0.1, None), x, None, length=5)[0]

    (found,) = compiled(function, (P(),), P(), (1024,))
    assert (found.kind, found.axes, found.times) == ("all-reduce", axes, 5)
    group = 2 ** len(axes)
    assert found.sent == 2 * 4096 * (group - 1) // group


def test_gathering_and_scattering():
    def function(x):
        return jax.lax.psum_scatter(jax.lax.all_gather(x, "fsdp", tiled=True) ** 2, "tensor", tiled=True)

    found = compiled(function, (P("fsdp"),), P(("tensor",)), (1024,))
    kinds = {one.kind: one for one in found}
    assert kinds["all-gather"].axes == ("fsdp",)
    assert kinds["all-gather"].sent == 2048  # half of 4,096 bytes comes from the other chip
    scatter = kinds.get("reduce-scatter") or kinds["all-reduce"]
    assert scatter.axes == ("tensor",)


def test_a_program_alone_sends_nothing():
    assert compiled(lambda x: x @ x, (P(),), P(), (16, 16)) == []
