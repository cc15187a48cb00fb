"""The estimate: kernels counted by hand against traced products, and the compiler's own figure of
a known forward."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny import tiny_config

from squeeze_jax.commands.plan import ENVIRONMENT
from squeeze_jax.config import load_preset
from squeeze_jax.layers.attention import plain_attention
from squeeze_jax.layers.lora import LoRAConfig
from squeeze_jax.planning import train_program
from squeeze_jax.planning.estimate import KERNEL_SHARE, Estimate, Kernel, block_program
from squeeze_jax.planning.flops import matmul_flops
from squeeze_jax.planning.report import holds_square
from squeeze_jax.planning.search import traced
from squeeze_jax.planning.train_program import compiled, topology_mesh


def attention(q, k, v):
    return plain_attention(q, k, v, None)


def test_a_kernels_flops_are_those_of_whole_products():
    """Forward the same; backward the scores once more, since no [tokens, tokens] array is kept."""
    x = jax.ShapeDtypeStruct((1, 2560, 24, 128), jnp.float32)
    kernel = Kernel(2560, 24 * 128, calls=3)
    once = matmul_flops(attention, x, x, x)
    assert kernel.flops(backward=False, again=False) == 3 * once
    both = matmul_flops(lambda *x: jax.vjp(attention, *x)[1](x[0]), x, x, x)
    assert kernel.flops(backward=True, again=False) == pytest.approx(3 * (both + once / 2))
    assert kernel.flops(backward=True, again=True) == pytest.approx(3 * (both + 1.5 * once))


def test_padding_is_paid_for():
    assert Kernel(2432, 128, 1).flops(False, False) == Kernel(2560, 128, 1).flops(False, False)


def test_what_is_not_hidden_is_waited_for_and_nothing_is_faster_than_its_links():
    waiting = Estimate(compute=2.0, kernels=1.0, links=0.5, network=0.25, exposed=0.75, moved=0.0)
    assert waiting.total == 3.75
    assert dataclasses.replace(waiting, exposed=0.0).total == 3.0
    assert dataclasses.replace(waiting, exposed=0.0, links=5.0).total == 5.25


@pytest.mark.telling
@pytest.mark.slow
def test_selective_saving_lies_between_saving_all_and_saving_nothing():
    """Products that are run and bytes that are kept, of one example, traced."""
    config = tiny_config(lora=LoRAConfig(rank=2))
    stage = config.training.stages[0]
    flops, kept = {}, {}
    for remat in ("none", "save_products", "save_attention", "block"):
        parallel = dataclasses.replace(config.parallel, remat=remat)
        flops[remat], kept[remat] = traced(dataclasses.replace(config, parallel=parallel), stage)
    assert flops["none"] < flops["save_products"] < flops["save_attention"] <= flops["block"]
    assert kept["none"] > kept["save_products"] > kept["save_attention"] > kept["block"]


@pytest.mark.slow
def test_selective_saving_runs_no_linear_layer_twice():
    """At FLUX.1's sizes: beyond `none`, only scores that a kernel makes again inside itself."""
    config = load_preset("configs/flux_stage2.py")
    dit = dataclasses.replace(config.model.dit, num_double_blocks=1, num_single_blocks=1)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dit=dit))
    stage = config.training.stages[0]

    def products(remat):
        return traced(
            dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, remat=remat)),
            stage,
        )[0]

    none, products_saved, block = products("none"), products("save_products"), products("block")
    tokens = 384 + 2 * 1024
    layers = len(config.aggregator.layers)
    scores = (
        2 * 4 * tokens**2 * 3072 + 4 * (2 * 384**2 + 384 * layers**2) * 3584
    )  # both products of each attention
    assert none < products_saved <= none + scores
    assert block - none > 5 * (products_saved - none)


def test_an_attention_matrix_is_found_in_a_program():
    assert holds_square("%a = bf16[2,24,2432,2432]{3,2,1,0} fusion(", 2432)
    assert holds_square("%a = f32[24,2560,2560]{2,1,0} fusion(", 2432)
    assert not holds_square(
        "%a = bf16[2,24,2560,128]{3,2,1,0} fusion(%b, bf16[2432,9216] %c)", 2432
    )


@pytest.mark.slow
def test_a_megapixel_forward_takes_what_the_compiler_says_of_the_peers():
    """MaxDiffusion's FLUX forward at 1024 x 1024 on v5p, 512 text tokens, replicated: 74.5 TFLOP,
    163 GB, 237 ms."""
    pytest.importorskip("libtpu", reason="needs the `tpu` extra")
    os.environ.update({name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()})
    mesh, chip = topology_mesh("v5p:2x2x1", {"data": 4, "fsdp": 1, "tensor": 1})
    config = load_preset("configs/flux_stage2.py")
    config = dataclasses.replace(
        config, lora=LoRAConfig(rank=8, target=r"double_blocks\.img_attn\.proj")
    )
    seconds = moved = 0.0
    for kind, depth in (("double", 19), ("single", 38)):
        block = block_program(config, mesh, kind, 1, 512, 4096, backward=False)
        seconds, moved = seconds + depth * block.expected(chip), moved + depth * block.traffic
    kernels = Kernel(4608, 3072, 57).flops(backward=False, again=False)
    assert kernels == pytest.approx(57 * 0.261e12, rel=1e-2)
    total = seconds + kernels / (KERNEL_SHARE * chip.flops)
    assert total == pytest.approx(0.237, rel=0.1)
    assert moved < 163e9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "name"),
    [("v4:2x2x1", "v4"), ("v5e:2x2", "v5e"), ("v5p:2x2x1", "v5p"), ("v6e:2x2", "v6e")],
)
def test_what_the_compiler_reckons_with(topology, name):
    """A sum moves its operands at the recorded rate; a product whose operand is fetched ahead takes
    its FLOPs alone."""
    pytest.importorskip("libtpu", reason="needs the `tpu` extra")
    os.environ.update({name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()})
    mesh, chip = topology_mesh(topology, {"data": -1, "fsdp": 1, "tensor": 1})

    def shape(*sizes, where=None):
        return jax.ShapeDtypeStruct(sizes, jnp.bfloat16, sharding=NamedSharding(mesh, where or P()))

    x = shape(8192 * mesh.size, 8192, where=P("data"))
    added = compiled(jax.jit(jnp.add), mesh, x, x)
    assert added.expected(chip) == pytest.approx(added.traffic / chip.reckoned_rate, rel=1e-3)
    long = compiled(
        jax.jit(jnp.matmul),
        mesh,
        shape(16384 * mesh.size, 16384, where=P("data")),
        shape(16384, 16384),
    )
    product = compiled(
        jax.jit(jnp.matmul),
        mesh,
        shape(4608 * mesh.size, 3072, where=P("data")),
        shape(3072, 12288),
    )
    assert product.prefetched > 0 and long.prefetched == 0
    share = (4608 * 3072 * 12288) / 16384**3
    assert product.expected(chip) == pytest.approx(long.expected(chip) * share, rel=0.01)


@pytest.mark.slow
def test_little_work_on_machine_code_changes_no_figure(monkeypatch):
    """Memory, traffic, collectives and the estimate of a klein's block are the compiler's own."""
    pytest.importorskip("libtpu", reason="needs the `tpu` extra")
    os.environ.update({name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()})
    mesh, _ = topology_mesh("v5e:2x2", {"data": 1, "fsdp": 4, "tensor": 1})
    config = load_preset("configs/klein_small_stage2.py")
    dit = dataclasses.replace(config.model.dit, heads=8)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dit=dit))
    found = []
    for options in (train_program.CODE_OPTIONS, {}):
        monkeypatch.setattr(train_program, "CODE_OPTIONS", options)
        with jax.default_matmul_precision("default"):  # as `plan` has it; kernels take no other
            block = block_program(config, mesh, "single", 2, 128, 1024)
        found.append(dataclasses.replace(block, seconds=0.0, text=""))
    assert found[0] == found[1]
    assert found[0].collectives and found[0].prefetched > 0
