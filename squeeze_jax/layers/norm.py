"""Normalisations, all computed in float32 and returned in the input's dtype."""

import jax
import jax.numpy as jnp
from flax import nnx

from squeeze_jax.array_types import Array, DType, Float


def per_channel(vector: Array, like: Array) -> Array:
    """A vector [C] with axes of size 1 in front, as many as `like` needs: nothing is broadcast
    implicitly.
    """
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)


def scaled(x: Array, scale: Array | float) -> Array:
    """x · scale, both [..., C], multiplied in float32 and rounded once to the dtype of `x` (our
    decision).

    A float32 scale that were rounded to bfloat16 first would be off by up to 0.4 % for all of `x`
    alike.
    """
    return (x.astype(jnp.float32) * scale).astype(x.dtype)


def layer_norm(x: Float[Array, "*B C"], eps: float) -> Float[Array, "*B C"]:
    """(x − mean) / sqrt(variance + eps) over the last axis, without scale and bias."""
    y = x.astype(jnp.float32)
    y = y - y.mean(axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return y.astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer normalisation with scale and bias."""

    def __init__(self, features: int, *, eps: float, param_dtype: DType = jnp.float32) -> None:
        self.scale = nnx.Param(jnp.ones((features,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((features,), param_dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
        y = layer_norm(x.astype(jnp.float32), self.eps)
        scale, bias = (
            per_channel(leaf[...].astype(jnp.float32), x) for leaf in (self.scale, self.bias)
        )
        return (y * scale + bias).astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x²) + eps) · scale; with `zero_centred` the multiplier is 1 + scale (Krea 2's
    convention).
    """

    def __init__(
        self,
        features: int,
        *,
        eps: float,
        zero_centred: bool = False,
        param_dtype: DType = jnp.float32,
    ) -> None:
        start = jnp.zeros if zero_centred else jnp.ones
        self.scale = nnx.Param(start((features,), param_dtype))
        self.eps = eps
        self.zero_centred = zero_centred

    def __call__(self, x: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        scale = per_channel(self.scale[...].astype(jnp.float32), x)
        return (y * (1.0 + scale if self.zero_centred else scale)).astype(x.dtype)
