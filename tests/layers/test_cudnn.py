"""GPU attention as far as it goes without a GPU: what it is asked for, and that JAX lowers it to cuDNN's kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as kernels
from jax.sharding import NamedSharding, PartitionSpec

from squeeze_jax.layers import attention as module
from squeeze_jax.layers.attention import attention, plain_attention
from squeeze_jax.layers.cudnn import cudnn_attention, suits
from squeeze_jax.sharding import make_mesh, use_mesh


def arrays(batch=2, tokens=6, heads=4, width=8, dtype=jnp.bfloat16, shared=1):
    rng = np.random.default_rng(0)
    sizes = (heads, heads // shared, heads // shared)
    q, k, v = (jnp.asarray(rng.standard_normal((batch, tokens, h, width)), dtype) for h in sizes)
    return q, k, v, jnp.asarray(rng.random((batch, tokens)) < 0.7).at[:, 0].set(True)


@pytest.fixture
def reference(monkeypatch):
    """JAX's own plain attention in the place of cuDNN's, with the same arguments."""
    real, asked = jax.nn.dot_product_attention, []

    def stand_in(*inputs, implementation, **rest):
        asked.append((implementation, rest["mask"], rest["key_value_seq_lengths"]))
        with jax.numpy_dtype_promotion("standard"):
            return real(*inputs, implementation="xla", **rest)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    return asked


@pytest.mark.parametrize("shared", [1, 2])
@pytest.mark.parametrize("kind", ["none", "rows", "queries"])
def test_masks_mean_what_they_mean_elsewhere(reference, kind, shared):
    q, k, v, mask = arrays(shared=shared)
    if kind == "queries":
        mask = jnp.tril(jnp.ones((6, 6), bool))[None] & mask[:, None]
    mask = None if kind == "none" else mask
    got = cudnn_attention(q, k, v, mask)
    np.testing.assert_allclose(
        got.astype(jnp.float32), plain_attention(q, k, v, mask).astype(jnp.float32), atol=2e-2
    )
    implementation, rows, lengths = reference[0]
    assert implementation == "cudnn"
    if kind == "queries":
        assert rows.shape == (2, 1, 6, 6)
    else:  # keys that count go first: no mask is read
        assert rows is None
        assert (lengths is None) == (mask is None)


def test_gradients_of_keys_put_in_order(reference):
    q, k, v, mask = arrays(dtype=jnp.float32)

    def loss(function):
        return lambda *inputs: (function(*inputs, mask).astype(jnp.float32) * q).sum()

    for got, expected in zip(*(jax.grad(loss(f), (0, 1, 2))(q, k, v) for f in (cudnn_attention, plain_attention))):
        np.testing.assert_allclose(got, expected, atol=1e-5)
    masked = ~np.asarray(mask)
    assert np.abs(np.asarray(jax.grad(loss(cudnn_attention), 1)(q, k, v)))[masked].max() == 0.0


@pytest.mark.parametrize("kind", ["none", "rows", "queries"])
@pytest.mark.parametrize("tokens", [5, 7])
def test_odd_lengths_are_made_even(reference, kind, tokens):
    """Of five tokens and of seven keys; the kernel sees six and eight."""
    q, k, v, mask = arrays(tokens=7, dtype=jnp.float32)
    q = q[:, :tokens]
    if kind == "queries":
        mask = jnp.tril(jnp.ones((tokens, 7), bool))[None] & mask[:, None]
    mask = None if kind == "none" else mask
    got = cudnn_attention(q, k, v, mask)
    np.testing.assert_allclose(got, plain_attention(q, k, v, mask), atol=1e-5)


def test_of_a_sample_without_keys_the_others_learn_nothing(reference):
    """A dropped condition can leave nothing to look at: any finite value, and no NaN."""
    q, k, v, mask = arrays(dtype=jnp.float32)
    nothing = mask.at[0].set(False)
    assert np.isfinite(cudnn_attention(q, k, v, nothing)).all()
    np.testing.assert_allclose(
        cudnn_attention(q, k, v, nothing)[1], plain_attention(q, k, v, mask)[1], atol=1e-5
    )


@pytest.mark.parametrize("shared", [1, 2])
def test_on_a_mesh_rows_and_heads_are_cut(reference, shared):
    q, k, v, mask = arrays(batch=4, shared=shared)
    mesh = make_mesh(1, 2, 4)
    placed = jax.device_put((q, k, v, mask), NamedSharding(mesh, PartitionSpec()))
    with use_mesh(mesh):
        got = jax.jit(cudnn_attention)(*placed)
    np.testing.assert_allclose(
        got.astype(jnp.float32), plain_attention(q, k, v, mask).astype(jnp.float32), atol=2e-2
    )


def test_what_it_is_not_made_for_stays_plain(monkeypatch):
    q, k, _, _ = arrays(tokens=128)
    assert suits(q, k)
    assert not suits(q.astype(jnp.float32), k)
    assert not suits(q[:, :6], k[:, :6]), "few tokens are faster as whole products"
    assert not suits(q[..., :4], k[..., :4])
    monkeypatch.setattr(module, "platform", lambda: "gpu")
    x, y, z, mask = arrays(dtype=jnp.float32)
    np.testing.assert_array_equal(attention(x, y, z, mask=mask), plain_attention(x, y, z, mask))


def test_forward_and_backward_lower_to_cudnn(monkeypatch):
    monkeypatch.setattr(kernels, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(kernels, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(kernels, "is_cuda_compute_capability_equal", lambda capability: False)
    monkeypatch.setattr(module, "platform", lambda: "gpu")
    q, k, v, mask = arrays(tokens=128, width=64)

    def loss(q, k, v):
        return attention(q, k, v, mask=mask).astype(jnp.float32).sum()

    text = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, v).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmha" in text
    assert "Backward" in text
    assert "2x4x128x128xf32" not in text, "no scores in memory"
