"""FLOPs from the traced program: against closed forms, a count by hand and XLA's own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import STAGE, tiny_config

from squeeze_jax.config import SamplingConfig, load_preset
from squeeze_jax.layers import cudnn, splash
from squeeze_jax.layers.lora import LoRAConfig
from squeeze_jax.models.dit import DiT, DiTConfig
from squeeze_jax.planning.estimate import sequence
from squeeze_jax.planning.flops import matmul_flops
from squeeze_jax.planning.sampler_program import image_flops
from squeeze_jax.planning.train_program import forward_flops, step_flops


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def test_products_loops_and_convolutions():
    assert matmul_flops(jnp.matmul, shape(3, 4), shape(4, 5)) == 2 * 3 * 4 * 5
    assert matmul_flops(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), shape(7, 3, 4), shape(7, 4, 5)) == 7 * 120

    def looped(x, w):
        return jax.lax.scan(lambda x, w: (jax.jit(jnp.matmul)(x, w), None), x, w)[0]

    assert matmul_flops(looped, shape(3, 4), shape(6, 4, 4)) == 6 * 2 * 3 * 4 * 4
    assert matmul_flops(jax.checkpoint(jnp.matmul), shape(3, 4), shape(4, 5)) == 120
    assert matmul_flops(jnp.matmul, shape(3, 0), shape(0, 5)) == 0

    def convolved(x, w):
        return jax.lax.conv_general_dilated(x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    assert matmul_flops(convolved, shape(1, 8, 8, 3), shape(3, 3, 3, 5)) == 2 * 4 * 4 * 5 * 3 * 9
    with pytest.raises(ValueError, match="unknown length"):
        matmul_flops(lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x, x), shape(2, 2))


def velocity(config, side, dtype=jnp.float32):
    """The transformer as a function of shapes, its blocks unrolled, and the shapes."""
    dit = nnx.eval_shape(lambda: DiT(config, dtype=dtype, unroll=True, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(dit)
    inputs = (shape(1, side * side, 64), shape(1, side * 8, config.context_width), shape(1), shape(1))
    return lambda state, *x: nnx.merge(graph, state)(*x, target_grid=(side, side)), (state, *inputs)


def test_a_megapixel_of_flux_is_what_it_is_by_hand():
    """57 blocks of 1.044 TFLOP of products and 0.261 of attention at 4,096 + 512 tokens (docs of the peers' figures)."""
    function, arguments = velocity(DiTConfig(), side=64)
    assert matmul_flops(function, *arguments) / 1e12 == pytest.approx(57 * (1.044 + 0.261), rel=1e-3)


def test_xla_counts_the_same_in_an_unrolled_program():
    config = DiTConfig(heads=8, num_double_blocks=1, num_single_blocks=2, context_width=512)
    function, arguments = velocity(config, side=16)
    counted = jax.jit(function).lower(*arguments).cost_analysis()["flops"]
    ours = matmul_flops(function, *arguments)
    assert ours < counted < 1.02 * ours  # it also counts elementwise operations


KERNELS = {"gpu": (cudnn, "cudnn_attention"), "tpu": (splash, "splash_attention")}


@pytest.mark.parametrize("platform", KERNELS)
def test_kernels_hide_nothing(monkeypatch, platform):
    """A running step's utilisation is counted where it runs, and there attention is a kernel."""
    config = DiTConfig(heads=4, num_double_blocks=1, num_single_blocks=1, context_width=512)
    function, arguments = velocity(config, side=32, dtype=jnp.bfloat16)
    on_cpu = matmul_flops(function, *arguments)

    def asked(*inputs, **how):
        raise NotImplementedError("the kernel")

    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(*KERNELS[platform], asked)
    function, arguments = velocity(config, side=32, dtype=jnp.bfloat16)  # another: JAX remembers what it traced
    assert matmul_flops(function, *arguments) == on_cpu
    with pytest.raises(NotImplementedError, match="the kernel"):
        jax.eval_shape(function, *arguments)
    assert matmul_flops(function, *arguments) == on_cpu


@pytest.mark.parametrize("attention", ["joint", "cached"])
def test_a_step_of_everything_trained_is_three_forwards_less_the_first_layers_inputs(attention):
    model = tiny_config().model
    dit = dataclasses.replace(model.dit, reference_attention=attention)
    config = tiny_config(model=dataclasses.replace(model, dit=dit))
    forward, step = forward_flops(config, STAGE), step_flops(config, STAGE, rows=1)
    assert 2.8 * forward < step < 3 * forward
    assert step_flops(config, STAGE, rows=4) == 4 * step
    remat = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, remat="block"))
    assert step_flops(remat, STAGE, rows=1) == step


def test_frozen_weights_have_no_gradient_to_pay_for():
    config = load_preset("configs/flux_stage2.py")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, max_text_tokens=128))
    stage = config.training.stages[0]
    forward, step = forward_flops(config, stage), step_flops(config, stage, rows=1)
    assert 2.1 * forward < step < 2.4 * forward
    assert np.isclose(step / 1e12, 98.7, atol=0.1)


def test_a_merged_lora_costs_nothing_and_one_beside_its_kernels_what_its_products_do():
    """Of an image: 2 FLOPs for each value of a pair of matrices, token and evaluation."""
    sampling = SamplingConfig(steps=4, tau1=0.0, tau2=0.0, cfg_scale=1.0)
    bare = tiny_config(sampling=sampling)
    config = dataclasses.replace(bare, lora=LoRAConfig(rank=2, target=r"single_blocks\.linear2"))
    merged, beside = (image_flops(config, merge_lora=merge) for merge in (True, False))
    assert merged == image_flops(bare)
    width, hidden = 16, 5 * 16  # linear2 takes attention's and the feed-forward's channels
    context, _ = sequence(config, 1)
    tokens, blocks = 4 + context, 2
    assert beside - merged == 2 * 4 * blocks * tokens * 2 * (hidden + width)
