"""Attention against float64 NumPy, and what masks must never let through."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import relative_error

from squeeze_jax.layers import attention as module
from squeeze_jax.layers.attention import attention
from squeeze_jax.planning.flops import matmul_flops


def some(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def reference(query, key, value, mask=None):
    """Head by head and row by row, in float64; query head h uses key/value head h // (H / K)."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, length, heads, width = query.shape
    out = np.zeros_like(query)
    for b in range(batch):
        for h in range(heads):
            shared = h * key.shape[2] // heads
            for t in range(length):
                keep = np.ones(key.shape[1], bool) if mask is None else mask[b] if mask.ndim == 2 else mask[b, t]
                scores = key[b, keep, shared] @ query[b, t, h] / np.sqrt(width)
                weights = np.exp(scores - scores.max())
                out[b, t, h] = (weights / weights.sum()) @ value[b, keep, shared]
    return out


MASKS = {
    "none": None,
    "keys": np.array([[1, 1, 1, 0, 0, 0, 0], [0, 1, 1, 1, 0, 1, 1]], bool),
    "queries": np.tril(np.ones((5, 7), bool), 1)[None].repeat(2, axis=0),
}


@pytest.mark.parametrize("shared", [4, 2, 1])
@pytest.mark.parametrize("kind", MASKS)
def test_equals_float64(kind, shared):
    q, k, v = some((2, 5, 4, 6), (2, 7, shared, 6), (2, 7, shared, 6))
    assert relative_error(attention(q, k, v, mask=MASKS[kind]), reference(q, k, v, MASKS[kind])) < 1e-6


@pytest.mark.parametrize("length", [8, 9, 11])
@pytest.mark.parametrize("kind", MASKS)
def test_long_sequences_in_blocks_are_the_same(kind, length, monkeypatch):
    """Output, gradients and FLOPs, with and without queries left over."""
    q, k, v = some((2, length, 4, 6), (2, 7, 2, 6), (2, 7, 2, 6))
    mask = MASKS[kind] if kind != "queries" else np.tril(np.ones((length, 7), bool), 1)[None].repeat(2, axis=0)
    whole, flops = attended(q, k, v, mask), matmul_flops(lambda *x: attention(*x, mask=mask), q, k, v)
    monkeypatch.setattr(module, "QUERIES", 2)
    blocks = attended(q, k, v, mask)
    assert relative_error(blocks[0], reference(q, k, v, mask)) < 1e-6
    for ours, theirs in zip(blocks, whole):
        assert relative_error(ours, theirs) < 1e-6
    assert matmul_flops(lambda *x: attention(*x, mask=mask), q, k, v) == flops
    text = jax.jit(lambda *x: attention(*x, mask=mask)).lower(q, k, v).as_text()
    assert f"2x4x{length}x7x" not in text, "no scores of all queries"


def test_bfloat16_keeps_its_dtype_and_a_float32_softmax():
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in some((2, 5, 4, 6), (2, 7, 2, 6), (2, 7, 2, 6)))
    out = attention(q, k, v, mask=MASKS["keys"])
    assert out.dtype == jnp.bfloat16
    # The inputs are rounded before both: what is left is the rounding of weights and output (2^-8 each).
    theirs = reference(*(np.asarray(x, np.float32) for x in (q, k, v)), MASKS["keys"])
    assert relative_error(out.astype(jnp.float32), theirs) < 6e-3


def attended(q, k, v, mask):
    """Output and gradient of a loss that sees every entry of the output."""
    loss = lambda q, k, v: jnp.sum(jnp.sin(attention(q, k, v, mask=mask).astype(jnp.float32)))  # noqa: E731
    return jax.jit(lambda q, k, v: (attention(q, k, v, mask=mask), *jax.grad(loss, argnums=(0, 1, 2))(q, k, v)))(q, k, v)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_rows_that_may_attend_to_nothing_stay_finite_and_leave_the_others_alone(dtype):
    q, k, v = (jnp.asarray(x, dtype) for x in some((2, 3, 2, 4), (2, 5, 2, 4), (2, 5, 2, 4)))
    mask = np.array([[0, 0, 0, 0, 0], [1, 0, 1, 1, 0]], bool)
    results = attended(q, k, v, mask)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in results)
    alone = attended(*(x[1:] for x in (q, k, v)), mask[1:])
    for both, one in zip(results, alone):
        np.testing.assert_allclose(both[1:].astype(jnp.float32), one.astype(jnp.float32), atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)])
def test_large_numbers_in_masked_keys_change_neither_output_nor_gradient(dtype, tolerance):
    q, k, v = (jnp.asarray(x, dtype) for x in some((2, 5, 4, 6), (2, 7, 2, 6), (2, 7, 2, 6)))
    short = attended(q, k, v, None)
    padding = jnp.full((2, 6, 2, 6), 1e4, dtype)
    mask = np.arange(13)[None].repeat(2, axis=0) < 7
    long = attended(q, jnp.concatenate([k, padding], 1), jnp.concatenate([v, -padding], 1), mask)
    for i, (padded, plain) in enumerate(zip(long, short)):
        kept = padded if i < 2 else padded[:, :7]
        np.testing.assert_allclose(kept.astype(jnp.float32), plain.astype(jnp.float32), atol=tolerance)
    assert not jnp.any(long[2][:, 7:])
    assert not jnp.any(long[3][:, 7:])
