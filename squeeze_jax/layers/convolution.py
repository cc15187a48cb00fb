"""Convolutions and group norms over pictures, alone or in the corner of a larger canvas."""

from typing import TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from squeeze_jax.array_types import Array, Bool, DType, Float, Int
from squeeze_jax.layers.linear import FLOAT32
from squeeze_jax.layers.norm import per_channel

NORM_EPS = 1e-6
"""Of group norms, as in diffusers' AutoencoderKL."""

Inside: TypeAlias = Bool[Array, "B h w 1"] | None
"""Which places of a canvas are each picture's; None: all."""


class Conv(nnx.Module):
    """A convolution with bias; `kernel` is [h, w, in, out]. Initial values as `Linear`'s, zeros
    for a `gain` of 0.

    With stride 1 the size stays; with stride 2 it halves, padded below and on the right only, as
    the original does.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        size: int = 3,
        stride: int = 1,
        gain: float = 1.0,
        dtype: DType,
        param_dtype: DType,
        rngs: nnx.Rngs,
    ) -> None:
        init = (
            nnx.initializers.normal(gain * (size * size * in_channels) ** -0.5)
            if gain
            else nnx.initializers.zeros
        )
        self.kernel = nnx.Param(
            init(rngs.params(), (size, size, in_channels, out_channels), param_dtype)
        )
        self.bias = nnx.Param(jnp.zeros((out_channels,), param_dtype))
        self.stride = stride
        self.padding = (0, 1) if stride == 2 else (size // 2, size // 2)
        self.dtype = jnp.dtype(dtype)

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h2 w2 F"]:
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            self.kernel[...].astype(self.dtype),
            window_strides=(self.stride, self.stride),
            padding=(self.padding, self.padding),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=FLOAT32,
        )
        return y + per_channel(self.bias[...].astype(self.dtype), y)


class GroupNorm(nnx.Module):
    """Normalises groups of neighbouring channels over the whole picture; statistics in float32."""

    def __init__(self, features: int, groups: int, *, param_dtype: DType) -> None:
        self.scale = nnx.Param(jnp.ones((features,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((features,), param_dtype))
        self.groups = groups

    def __call__(
        self, x: Float[Array, "B h w C"], inside: Inside = None
    ) -> Float[Array, "B h w C"]:
        y = x.astype(jnp.float32)
        y = y - self._group_mean(y, inside)
        scale, bias = (
            per_channel(vector[...].astype(jnp.float32), y) for vector in (self.scale, self.bias)
        )
        multiplier = jax.lax.rsqrt(self._group_mean(jnp.square(y), inside) + NORM_EPS) * scale
        return (y * multiplier + bias).astype(x.dtype)

    def _group_mean(self, x: Float[Array, "B h w C"], inside: Inside) -> Float[Array, "B 1 1 C"]:
        batch, channels = x.shape[0], x.shape[-1]
        if inside is None:
            means = x.mean(axis=(1, 2))
        else:
            count = inside.sum(axis=(1, 2), dtype=jnp.float32)
            means = within(x, inside).sum(axis=(1, 2)) / count
        means = means.reshape(batch, self.groups, -1).mean(axis=-1)
        return jnp.repeat(means, channels // self.groups, axis=-1)[:, None, None, :]


def inside_of(sizes: Int[Array, "B 2"], height: int, width: int) -> Bool[Array, "B height width 1"]:
    """Which pixels of a canvas are each picture's."""
    rows = jnp.arange(height)[None] < sizes[:, :1]
    columns = jnp.arange(width)[None] < sizes[:, 1:]
    return rows[:, :, None, None] & columns[:, None, :, None]


def within(x: Float[Array, "B h w C"], inside: Inside) -> Float[Array, "B h w C"]:
    """Zeros beyond each picture, as a convolution's own padding is."""
    return x if inside is None else jnp.where(inside, x, jnp.zeros((), x.dtype))


def upsample(x: Float[Array, "B h w C"]) -> Float[Array, "B h2 w2 C"]:
    """Twice the size, nearest neighbour."""
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (batch, height, 2, width, 2, channels))
    return x.reshape(batch, 2 * height, 2 * width, channels)
