"""Scaled dot-product attention behind one function."""

import jax
import jax.numpy as jnp

from squeeze_jax.array_types import Array, Bool, Float

# Large and finite: a row that may attend to nothing becomes a mean over everything, never NaN, in any dtype.
MASKED = -1e30


def attention(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K D"],
    *,
    mask: Bool[Array, "B S"] | Bool[Array, "B T S"] | None = None,
) -> Float[Array, "B T H D"]:
    """softmax(q·kᵀ / sqrt(D))·v with the softmax in float32.

    `mask` is True where a query may attend: one row of keys for the whole sample [B, S], or one per query
    [B, T, S]. Fewer key/value heads than query heads (H a multiple of K) are shared by neighbouring query heads.
    A query that may attend to nothing gives a finite, meaningless value: mask it out further on.
    """
    groups = query.shape[2] // key.shape[2]
    if groups > 1:
        key, value = jnp.repeat(key, groups, axis=2), jnp.repeat(value, groups, axis=2)
    # Heads beside the batch first: products over neighbouring memory, which CPUs do several times faster.
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
    scores = jnp.einsum("BHTD,BHSD->BHTS", query, key, preferred_element_type=jnp.float32)
    scores = scores * (query.shape[-1] ** -0.5)
    if mask is not None:
        allowed = mask[:, None, None, :] if mask.ndim == 2 else mask[:, None, :, :]
        scores = jnp.where(allowed, scores, MASKED)
    # The softmax's sum divides the result [.., D], not the weights [.., S].
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1, keepdims=True)
    mixed = jnp.einsum("BHTS,BHSD->BHTD", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
    return (mixed / total).astype(value.dtype).swapaxes(1, 2)
