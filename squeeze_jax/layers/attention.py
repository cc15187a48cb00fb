"""Scaled dot-product attention: one function that takes a kernel of the platform, or plain matrix
products."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from squeeze_jax.array_types import Array, Bool, Float
from squeeze_jax.sharding import platform

# Large, but finite in every dtype: a query that may attend to nothing gets a mean over all
# values, never NaN.
MASKED = -1e30
"""Logit of what is masked: finite, so that a row of them gives no NaN (our decision)."""
QUERIES = 256
"""Queries that a CPU takes at a time from a long sequence (our decision:
`benchmarks/attention.py` compares sizes)."""


def attention(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K D"],
    *,
    mask: Bool[Array, "B S"] | Bool[Array, "B T S"] | None = None,
    name: str | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "B T H D"]:
    """Scaled dot-product attention: softmax(q·kᵀ / sqrt(D))·v with the softmax in float32.

    `mask` is True where a query may attend: one row of keys for all queries of a sample [B, S],
    or one row per query [B, T, S]. Where there are fewer key and value heads than query heads (H
    is a multiple of K), neighbouring query heads share them. A query that may attend to nothing
    gives a finite value without meaning: the caller masks it out.

    `name` is the `checkpoint_name` of the result, or of what a kernel keeps for its backward
    pass. `precision` is that of the two products. Kernels choose their own, so with a `precision`
    plain products are taken.
    """
    if precision is not None:
        mixed = plain_attention(query, key, value, mask, precision)
        return mixed if name is None else checkpoint_name(mixed, name)
    if platform() == "tpu":
        from squeeze_jax.layers.splash import splash_attention, suits  # Pallas is slow to import

        if suits(query, key, mask):
            return splash_attention(query, key, value, mask, name=name)
    if platform() in ("gpu", "cuda"):
        from squeeze_jax.layers import cudnn

        kernel = cudnn.cudnn_attention if cudnn.suits(query, key) else plain_attention
        mixed = kernel(query, key, value, mask)
    else:
        mixed = plain_attention(query, key, value, mask)
    return mixed if name is None else checkpoint_name(mixed, name)


def heads_first(x: Float[Array, "B T H D"]) -> Float[Array, "B T H D"]:
    """Returns `x` itself; on TPU its memory is laid out head by head, as the kernel reads it.

    Otherwise the compiler transposes after norms and rotation: in float32, and several times.
    """
    if platform() != "tpu":
        return x
    return jax.lax.optimization_barrier(x.swapaxes(1, 2)).swapaxes(1, 2)


def plain_attention(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K D"],
    mask: Bool[Array, "B S"] | Bool[Array, "B T S"] | None,
    precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "B T H D"]:
    """`attention` as matrix products.

    On CPUs a long sequence goes one block of queries after the other: the scores of a block fit
    into the caches, those of all queries do not.
    """
    groups = query.shape[2] // key.shape[2]
    if groups > 1:
        key, value = jnp.repeat(key, groups, axis=2), jnp.repeat(value, groups, axis=2)
    # Heads go next to the batch axis, so that each product reads neighbouring memory: several
    # times faster on CPUs.
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
    allowed = None if mask is None else mask[:, None, None] if mask.ndim == 2 else mask[:, None]
    count = query.shape[2] // QUERIES
    if count < 4 or platform() != "cpu":  # a short sequence gains nothing from blocks
        return _mixed(query, key, value, allowed, precision).swapaxes(1, 2)

    many = count * QUERIES  # queries in whole blocks; what is left follows at the end

    def blocks(x: Array) -> jax.Array:
        """[B, h, many, _] as [count, B, h, QUERIES, _]."""
        return jnp.moveaxis(x.reshape(*x.shape[:2], count, QUERIES, x.shape[-1]), 2, 0)

    if allowed is None or allowed.shape[2] == 1:
        mixed = jax.lax.map(
            lambda part: _mixed(part, key, value, allowed, precision), blocks(query[:, :, :many])
        )
        left = allowed
    else:
        cut = blocks(query[:, :, :many]), blocks(allowed[:, :, :many])
        mixed, left = (
            jax.lax.map(lambda part: _mixed(part[0], key, value, part[1], precision), cut),
            allowed[:, :, many:],
        )
    mixed = jnp.moveaxis(mixed, 0, 2).reshape(*query.shape[:2], many, query.shape[-1])
    if query.shape[2] > many:
        mixed = jnp.concatenate(
            [mixed, _mixed(query[:, :, many:], key, value, left, precision)], axis=2
        )
    return mixed.swapaxes(1, 2)


def _mixed(
    query: Float[Array, "B H T D"],
    key: Float[Array, "B H S D"],
    value: Float[Array, "B H S D"],
    allowed: Bool[Array, "B 1 #T S"] | None,
    precision: jax.lax.PrecisionLike,
) -> Float[Array, "B H T D"]:
    scores = jnp.einsum(
        "BHTD,BHSD->BHTS", query, key, precision=precision, preferred_element_type=jnp.float32
    )
    scores = scores * (query.shape[-1] ** -0.5)
    if allowed is not None:
        scores = jnp.where(allowed, scores, MASKED)
    # The softmax's sum divides the result [.., D], not the weights [.., S].
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1, keepdims=True)
    mixed = jnp.einsum(
        "BHTS,BHSD->BHTD",
        weights.astype(value.dtype),
        value,
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    return (mixed / total).astype(value.dtype)
