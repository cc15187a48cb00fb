"""How a transformer is told the noise level: embeddings of scalars, and shift, scale and gate
(AdaLN)."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from squeeze_jax.array_types import Array, DType, Float
from squeeze_jax.layers.linear import FLOAT32, Linear, silu
from squeeze_jax.layers.norm import layer_norm

NORM_EPS = 1e-6
"""FLUX.1's, of every LayerNorm and of q's and k's RMSNorm."""


def sinusoidal(x: Float[Array, " B"], width: int = 256) -> Float[Array, "B {width}"]:
    """cos then sin of 1000·x·10000^(−i/(width/2)), in float32. `x` is a time or guidance value as
    the user gives it. FLUX.1's embedding of times."""
    half = width // 2
    # The exponent is rounded to float32 before exp, as in the published model. Phases reach 1000
    # radians, where the rounding of a frequency shows.
    exponent = np.float32(-np.log(10_000.0)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequencies = np.exp(exponent.astype(np.float64)).astype(np.float32)
    angles = 1000.0 * x.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


float32_linear = partial(Linear, dtype=jnp.float32, precision=FLOAT32)
"""A linear layer that multiplies in float32 on every device, whatever the model's dtype."""


class Embedder(nnx.Module):
    """Linear, SiLU, linear in float32 (FLUX.1's MLPEmbedder; FLUX.2's has no biases)."""

    def __init__(
        self,
        in_features: int,
        width: int,
        *,
        use_bias: bool = True,
        param_dtype: DType,
        rngs: nnx.Rngs,
    ) -> None:
        kinds: Any = {"use_bias": use_bias, "param_dtype": param_dtype, "rngs": rngs}
        self.in_layer = float32_linear(in_features, width, **kinds)
        self.out_layer = float32_linear(width, width, **kinds)

    def __call__(self, x: Float[Array, "B _"]) -> Float[Array, "B C"]:
        return self.out_layer(silu(self.in_layer(x)))


class AdaLN(nnx.Module):
    """`count` vectors a sample from the conditioning vector: lin(silu(vec)), in float32; zero at
    the start.
    """

    def __init__(
        self, width: int, count: int, *, use_bias: bool = True, param_dtype: DType, rngs: nnx.Rngs
    ) -> None:
        kinds: Any = {"use_bias": use_bias, "param_dtype": param_dtype, "rngs": rngs}
        self.lin = float32_linear(width, count * width, gain=0.0, **kinds)
        self.count = count

    def __call__(self, vec: Float[Array, "B C"]) -> tuple[Float[Array, "B 1 C"], ...]:
        return tuple(jnp.split(self.lin(silu(vec))[:, None, :], self.count, axis=-1))


def modulate(
    x: Float[Array, "B T C"], shift: Float[Array, "#B 1 C"], scale: Float[Array, "#B 1 C"]
) -> Float[Array, "B T C"]:
    """(1 + scale)·layer_norm(x) + shift (AdaLN) in float32, returned in the dtype of `x`."""
    return ((1.0 + scale) * layer_norm(x.astype(jnp.float32), NORM_EPS) + shift).astype(x.dtype)


def add_gated(
    x: Float[Array, "B T C"], gate: Float[Array, "#B 1 C"], update: Float[Array, "B T C"]
) -> jax.Array:
    """x + gate·update [B, T, C], AdaLN's residual step: in float32, returned in the dtype of
    `x`."""
    return (x.astype(jnp.float32) + gate * update.astype(jnp.float32)).astype(x.dtype)
