"""Scaled dot-product attention behind one function: a kernel where there is one for the platform, else plain products."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from squeeze_jax.array_types import Array, Bool, Float
from squeeze_jax.sharding import platform

# Large and finite: a row that may attend to nothing becomes a mean over everything, never NaN, in any dtype.
MASKED = -1e30
QUERIES = 256
"""Queries of a block where sequences are long: on two cores the fastest or near it (`benchmarks/attention.py`)."""


def attention(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K D"],
    *,
    mask: Bool[Array, "B S"] | Bool[Array, "B T S"] | None = None,
    name: str | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "B T H D"]:
    """softmax(q·kᵀ / sqrt(D))·v with the softmax in float32.

    `mask` is True where a query may attend: one row of keys for the whole sample [B, S], or one per query
    [B, T, S]. Fewer key/value heads than query heads (H a multiple of K) are shared by neighbouring query heads.
    A query that may attend to nothing gives a finite, meaningless value: mask it out further on. `name` is the
    `checkpoint_name` of the result, or of what a kernel keeps for its backward pass. `precision` is that of
    the two products; where it is given no kernel is used, since kernels choose their own.
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
    """`x` itself; on TPU laid out head by head, as the kernel reads it.

    Without it the compiler turns the array round only after norms and rotation, in float32 and several times.
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
    """`attention` as matrix products, on CPUs for long sequences a block of queries after the other.

    The scores of a block stay in the caches, where those of all queries would go to memory and back.
    """
    groups = query.shape[2] // key.shape[2]
    if groups > 1:
        key, value = jnp.repeat(key, groups, axis=2), jnp.repeat(value, groups, axis=2)
    # Heads beside the batch first: products over neighbouring memory, which CPUs do several times faster.
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
    allowed = None if mask is None else mask[:, None, None] if mask.ndim == 2 else mask[:, None]
    count = query.shape[2] // QUERIES
    if count < 4 or platform() != "cpu":  # short: nothing to gain
        return _mixed(query, key, value, allowed, precision).swapaxes(1, 2)

    many = count * QUERIES

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
