"""In a bfloat16 model: which products are float32 on every device, and that scales are not rounded.

Products are looked up in the traced programs, since on CPUs all precisions give the same numbers.
"""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.extend import core
from tiny import tiny_config

from squeeze_jax.batch import HiddenStates
from squeeze_jax.layers import splash
from squeeze_jax.layers.lora import LoRAConfig, LowRank
from squeeze_jax.layers.modulation import add_gated
from squeeze_jax.models.aggregator import Aggregator, AggregatorConfig, FusionBlock
from squeeze_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from squeeze_jax.planning.train_program import abstract_input, loss_of

HIGHEST = (jax.lax.Precision.HIGHEST,) * 2
BF16 = ml_dtypes.bfloat16
RNG = np.random.default_rng(0)


def products(function, *arguments):
    """(operands' shapes, precision) of every product and convolution of float32 with float32."""

    def inside(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name in ("dot_general", "conv_general_dilated"):
                operands = [x.aval for x in equation.invars[:2]]
                if all(x.dtype == jnp.float32 for x in operands):
                    yield tuple(x.shape for x in operands), equation.params["precision"]
            for value in jax.tree.leaves(tuple(equation.params.values()), is_leaf=is_program):
                if is_program(value):
                    yield from inside(getattr(value, "jaxpr", value))

    def is_program(value):
        return isinstance(value, core.Jaxpr | core.ClosedJaxpr)

    with jax.default_matmul_precision(None):  # conftest sets the highest for everything
        jaxpr = jax.make_jaxpr(lambda *given: function(*given))(*arguments)
    return list(inside(jaxpr.jaxpr))


def test_a_bfloat16_models_products_of_float32_are_exact_on_every_device():
    """Time, guidance and pooled embedders, every modulation, its adapters, and their gradients."""
    config = tiny_config(lora=LoRAConfig(rank=2, target=r"(double|single)_blocks\..*"))
    model = dataclasses.replace(config.model, dtype="bfloat16", frozen_dtype="bfloat16")
    config = dataclasses.replace(config, model=model)
    stage = config.training.stages[0]
    loss, (trained, frozen) = loss_of(config, stage)
    batch = abstract_input(config, 1)
    width = config.model.dit.width
    forward = products(loss, trained, frozen, batch)
    kernels = {shapes[1] for shapes, _ in forward}
    assert {
        (256, width),
        (8, width),
        (width, 6 * width),
        (width, 3 * width),
        (2, 6 * width),
    } <= kernels
    for found in (forward, products(jax.grad(loss), trained, frozen, batch)):
        assert len(found) > 12
        assert [shapes for shapes, precision in found if precision != HIGHEST] == []


def test_the_autoencoders_products_of_float32_are_exact_on_every_device():
    config = AutoencoderConfig(latent_channels=4, block_out_channels=(8, 16), norm_groups=4)
    autoencoder = nnx.eval_shape(lambda: Autoencoder(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(autoencoder)

    def there_and_back(state, images):
        module = nnx.merge(graph, state)
        return module.decode(module.encode(images))

    images = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    found = products(there_and_back, state, images)
    assert len(found) > 30
    assert [shapes for shapes, precision in found if precision != HIGHEST] == []


def bf16(*shape):
    return RNG.standard_normal(shape).astype(BF16)


def assert_rounded_once(found, exact):
    """All but a few values, where float32's own rounding tips the scale, are the nearest
    bfloat16."""
    assert found.dtype == jnp.bfloat16
    assert np.mean(np.asarray(found) != np.asarray(exact, np.float64).astype(BF16)) < 0.004


def test_an_adapters_scale_is_not_rounded():
    """1/3 is 0.3340 in bfloat16. Inputs of one channel make the products exact."""
    up = bf16(1, 512)
    part = LowRank(jnp.ones((1, 1)), jnp.asarray(up), jnp.asarray(1 / 3, jnp.float32), 0)
    x = jnp.ones((8, 1), jnp.bfloat16)
    [delta] = part([x], [slice(None)])
    assert_rounded_once(delta, np.repeat(up.astype(np.float64) / 3, 8, axis=0))


def test_a_residual_gate_is_not_rounded():
    x, update = bf16(4, 16, 64), bf16(4, 16, 64)
    gate = RNG.standard_normal((4, 1, 64)).astype(np.float32)
    exact = x.astype(np.float64) + gate.astype(np.float64) * update.astype(np.float64)
    assert_rounded_once(add_gated(*(jnp.asarray(value) for value in (x, gate, update))), exact)


@pytest.mark.parametrize("tokens", [128, 300])
def test_the_kernels_queries_are_scaled_in_float32(tokens, monkeypatch):
    """128^-1/2 has no short binary fraction; the kernel here gives back the queries that it
    gets."""
    monkeypatch.setattr(
        splash.splash, "make_splash_mha_single_device", lambda *_, **__: lambda q, k, v, segments: q
    )
    query = bf16(2, tokens, 2, 128)
    found = splash.splash_attention(*(jnp.asarray(query),) * 3, None)
    assert_rounded_once(found, query.astype(np.float64) * 128**-0.5)


def test_the_aggregators_gate_is_not_rounded():
    """What the output projection is given: with one token alone, its own value times the gate."""
    config = AggregatorConfig(width=64, heads=2, mlp_width=32)
    block = FusionBlock(config, dtype=jnp.bfloat16, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    x, given = jnp.asarray(bf16(256, 1, 64)), []
    project = block.to_out
    block.to_out = lambda mixed: given.append(mixed) or project(mixed)
    block(x)
    y = block.norm1(x)
    value = np.asarray(block.to_qkv(y)[..., -64:], np.float64)
    gate = 1 / (1 + np.exp(-np.asarray(block.to_gate(y), np.float64)))
    assert_rounded_once(given[0], value * gate)


def test_the_vision_towers_weight_is_not_rounded():
    config = AggregatorConfig(
        kind="last_layer_vit",
        layers=(0, 1),
        width=64,
        out_width=8,
        heads=2,
        mlp_width=8,
        refiner_blocks=0,
    )
    aggregator = Aggregator(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    aggregator.vision_weight.set_value(jnp.float32(0.3))
    given = []
    aggregator.out = lambda tokens: given.append(tokens) or tokens
    text, image = bf16(1, 2, 1, 64), bf16(1, 2, 64, 64)
    places = np.arange(65, dtype=np.int32)[None]
    states = HiddenStates(
        text, np.ones((1, 1), bool), places[:, :1], image, np.ones((1, 64), bool), places[:, 1:]
    )
    aggregator(HiddenStates(*(jnp.asarray(leaf) for leaf in states)))
    weight = 1 / (1 + np.exp(-np.float64(np.float32(0.3))))
    last, vision = image[:, 1].astype(np.float64), image[:, 0].astype(np.float64)
    assert_rounded_once(given[0][:, 1:], last * (1 - weight) + vision * weight)
