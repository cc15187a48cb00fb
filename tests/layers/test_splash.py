"""The TPU's attention kernel, interpreted on the CPU: the same numbers and gradients as whole products."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from parity import relative_error

from squeeze_jax.layers import splash
from squeeze_jax.layers.attention import plain_attention
from squeeze_jax.layers.splash import block_of, splash_attention, suits
from squeeze_jax.sharding import make_mesh, use_mesh


def inputs(batch=2, tokens=300, heads=2):
    """q, k, v with large numbers where the mask says padding; 300 tokens are no multiple of any block."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((batch, tokens, heads, 128)).astype(np.float32) for _ in "qkv")
    mask = np.ones((batch, tokens), bool)
    mask[0, 250:], mask[1, :40] = False, False
    for x in (q, k, v):
        x[~mask] = 1e4
    return q, k, v, mask


def with_gradients(attend, q, k, v, mask):
    """Output of valid tokens, and gradients of a loss that sees nothing else."""

    def loss(q, k, v):
        out = attend(q, k, v, mask)
        return jnp.sum(jnp.where(mask[..., None, None], jnp.sin(out), 0.0)), out

    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return np.asarray(out)[mask], *(np.asarray(g) for g in gradients)


@pytest.mark.parametrize("mesh", [None, (2, 2, 2), (2, 1, 4)])  # two heads: a tensor axis of 4 leaves them whole
def test_output_and_gradients_equal_whole_products(mesh):
    q, k, v, mask = inputs()
    if mesh is not None:
        q, k, v, mask = (np.concatenate([x, x]) for x in (q, k, v, mask))
        everywhere = NamedSharding(make_mesh(*mesh), PartitionSpec())
        q, k, v, mask = jax.device_put((q, k, v, mask), everywhere)

    def kernel(q, k, v, mask):
        with use_mesh(make_mesh(*mesh) if mesh else None):
            return splash_attention(q, k, v, jnp.asarray(mask), interpret=True)

    ours = with_gradients(kernel, q, k, v, mask)
    wanted = with_gradients(plain_attention, q, k, v, mask)
    for one, other in zip(ours, wanted):
        assert np.isfinite(one).all()
        assert relative_error(one, other) < 1e-5


def test_more_keys_than_queries():
    """As where reference tokens are only looked at: other lengths, other blocks; what no key is seen of stays finite."""
    _, k, v, mask = inputs(tokens=500)
    q = np.random.default_rng(1).standard_normal((2, 300, 2, 128)).astype(np.float32)

    def loss(attend, q, k, v):
        out = attend(q, k, v, jnp.asarray(mask))
        return jnp.sum(jnp.sin(out)), out

    def run(attend):
        gradients, out = jax.jit(jax.grad(partial(loss, attend), argnums=(0, 1, 2), has_aux=True))(q, k, v)
        return out, *gradients

    for one, other in zip(run(lambda *x: splash_attention(*x, interpret=True)), run(plain_attention)):
        assert relative_error(one, other) < 1e-5


def test_keys_in_pieces_of_several_blocks(monkeypatch):
    """512 tokens in blocks of 128, of which the backward kernel holds two: gradients of queries are sums of two."""
    monkeypatch.setattr(splash, "BLOCKS", (128,))
    monkeypatch.setattr(splash, "KEYS", 256)
    q, k, v, mask = inputs(tokens=500, heads=1)
    ours = with_gradients(lambda *x: splash_attention(*x, interpret=True), q, k, v, mask)
    for one, other in zip(ours, with_gradients(plain_attention, q, k, v, mask)):
        assert relative_error(one, other) < 1e-5


@pytest.mark.parametrize(
    ("length", "block", "keys"),
    [(2560, 640, 1280), (1536, 768, 1536), (4608, 768, 1536), (1024, 1024, 1024), (4096, 1024, 1024)],
)
def test_the_backward_kernel_holds_whole_blocks_that_fit(length, block, keys):
    assert splash._keys_at_once(length, block) == keys


def test_a_sample_that_sees_nothing_stays_finite():
    q, k, v, mask = inputs(batch=2, tokens=128, heads=1)
    mask[:] = False
    out, *gradients = with_gradients(lambda *x: splash_attention(*x, interpret=True), q, k, v, mask)
    assert all(np.isfinite(g).all() for g in gradients)
    assert out.size == 0


@pytest.mark.parametrize(
    ("tokens", "block"), [(128, 128), (300, 384), (1024, 1024), (1408, 768), (2432, 640), (4608, 768), (3456, 384)]
)
def test_blocks_waste_little(tokens, block):
    assert block_of(tokens) == block
    assert -(-tokens // block) * block <= 1.3 * tokens


def test_what_the_kernel_is_not_made_for():
    x = jnp.zeros((1, 256, 4, 128))
    assert suits(x, x, None)
    assert suits(x, x, jnp.ones((1, 256), bool))
    assert not suits(x, x, jnp.ones((1, 256, 256), bool))  # a mask for each query
    assert not suits(x, x[:, :, :2], None)  # shared heads
    assert not suits(x[:, :29], x[:, :29], None)  # the layer axis
    assert not suits(x[..., :64], x[..., :64], None)
