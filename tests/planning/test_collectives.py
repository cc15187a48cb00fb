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


GATHER = "  %all-gather.1 = bf16[64,128]{1,0:T(8,128)(2,1)} all-gather(%x), channel_id=2, replica_groups="
PROGRAM = "HloModule m\n\nENTRY %main.1 (x: bf16[64,128]) -> bf16[64,128] {\n" + GATHER


@pytest.mark.parametrize(
    ("groups", "axes", "members"),
    [
        ("{{0,2,4,6},{1,3,5,7}}, dimensions={0}", ("data", "fsdp"), 4),
        ("[2,4]<=[4,2]T(1,0), dimensions={0}", ("data", "fsdp"), 4),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}", ("fsdp", "tensor"), 4),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, dimensions={0}", ("data",), 2),
        ("mesh['a'=2,'b'=2,'c'=2] {'a','c'}, dimensions={0}", ("data", "tensor"), 4),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}, dimensions={0}", ("data",), 2),
        ("mesh['a'=8] {'a':(2)2}, dimensions={0}", ("fsdp",), 2),
        ("mesh['a'=8] {'a':(1)4}, dimensions={0}", ("data", "fsdp"), 4),
    ],
)
def test_every_way_to_write_a_group(groups, axes, members):
    """The TPU compiler writes groups as a mesh of its own; each is one of data=2, fsdp=2, tensor=2."""
    (found,) = collectives(f"{PROGRAM}{groups}\n}}\n", MESH)
    assert found.axes == axes
    assert found.sent == round(64 * 128 * 2 * (members - 1) / members)


def test_loops_without_a_known_end_run_as_often_as_is_said():
    def function(x, n):
        def body(_, x):
            return jax.lax.psum(x, "fsdp") * 0.1

        x = jax.lax.fori_loop(0, n, body, x)
        return jax.lax.fori_loop(n, 2 * n, body, x)

    mesh = make_mesh(**MESH)
    inner = jax.shard_map(function, mesh=mesh, in_specs=(P(), P()), out_specs=P(), check_vma=False)
    text = jax.jit(inner).lower(jnp.zeros(64), jnp.int32(3)).compile().as_text()
    assert [one.times for one in collectives(text, MESH)] == [1, 1]
    assert sorted(one.times for one in collectives(text, MESH, (3, 5))) == [3, 5]


@pytest.mark.parametrize(("slices", "share"), [("1,2", 1.0), ("0:3", 1.5)])
def test_what_goes_between_slices_is_found_though_it_is_no_collective_there(slices, share):
    """A sum as the TPU compiler hands it to the hosts: each of n chips sends 2·(n − 1) / n of its part."""
    line = (
        "  %send.3 = (bf16[5,8,128]{2,1,0:T(8,128)(2,1)}, u32[], token[]) send(%x, %token), channel_id=2, "
        'is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
        f'_xla_megascale_target="{{{slices}}}x{{0:3}}",_xla_megascale_transfer_type="ALL_REDUCE"}}'
    )
    (found,) = collectives(f"HloModule m\n\nENTRY %main.1 (x: f32[1]) -> f32[1] {{\n{line}\n}}\n", MESH)
    assert (found.kind, found.axes, found.hidden) == ("all-reduce", ("data",), True)
    assert found.sent == 5 * 8 * 128 * 2 * share


def test_a_gather_carried_by_several_products_is_one_and_is_hidden():
    """The TPU compiler writes it into each fusion that carries a part of it, under one channel."""
    gather = GATHER.replace("channel_id=2", "channel_id=7") + "[2,4]<=[8], dimensions={0}"
    start = "  ROOT %c = (bf16[16,128]{1,0}) custom-call(%all-gather.1), custom_call_target=\"AsyncCollectiveStart\""
    text = f"""HloModule m

%fused_computation.1 (p: bf16[16,128]) -> (bf16[16,128]) {{
{gather}
{start}
}}

%async_collective_fusion.2 (p: bf16[16,128]) -> (bf16[16,128]) {{
{gather}
}}

ENTRY %main.1 (x: bf16[16,128]) -> bf16[64,128] {{
  %a = (bf16[16,128]) fusion(%x), kind=kCustom, calls=%fused_computation.1
  %b = (bf16[16,128]) fusion(%a), kind=kCustom, calls=%async_collective_fusion.2
{GATHER}[2,4]<=[8], dimensions={{0}}
}}
"""
    found = collectives(text, MESH)
    assert sorted((one.sent, one.times, one.hidden) for one in found) == [(12288, 1, False), (12288, 1, True)]
