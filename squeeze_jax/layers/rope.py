"""Rotary position embedding over several axes, as FLUX.1 uses it (neighbouring channels form a
pair)."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from squeeze_jax.array_types import Array, Float, Int
from squeeze_jax.layers.linear import FLOAT32
from squeeze_jax.sharding import platform

Rotation = tuple[Float[Array, "#B S 1 D"], Float[Array, "#B S 1 D"]]
"""Cosine and sine of every token's angles in float32; each angle stands twice, for both channels
of a pair."""


def rotation(
    positions: Int[Array, "#B S A"], axes: Sequence[int], theta: float = 10_000.0
) -> Rotation:
    """Angles of tokens at integer `positions` on A axes; axis a rotates `axes[a]` channels,
    sum(axes) = D.

    Channel pair i of an axis of width n turns by position · theta^(−2i/n). Phases are float32
    whatever the activations' dtype, so that neighbouring positions stay apart in bfloat16. RoPE as
    FLUX.1 has it.
    """
    angles = []
    for axis, width in enumerate(axes):
        frequencies = theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
        frequencies = np.repeat(frequencies, 2).astype(np.float32)
        angles.append(positions[..., axis, None].astype(jnp.float32) * frequencies[None, None])
    angle = jnp.concatenate(angles, axis=-1)[:, :, None, :]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Float[Array, "B S H D"], by: Rotation) -> Float[Array, "B S H D"]:
    """RoPE: turns each channel pair (a, b) to (a·cos − b·sin, b·cos + a·sin), in float32."""
    cos, sin = by
    y = x.astype(jnp.float32)
    return (y * cos + _partner(x) * sin).astype(x.dtype)


def _partner(x: Float[Array, "B S H D"]) -> Float[Array, "B S H D"]:
    """Channel pairs (a, b) as (−b, a), in float32.

    On TPU this is a product with a matrix of 0 and ±1. It is exact, since each sum has one term
    other than 0, and saves the four passes through memory that moving channels to their
    neighbours takes there.
    """
    if platform() == "tpu":
        swap = np.kron(
            np.eye(x.shape[-1] // 2, dtype=np.float32), np.array([[0, 1], [-1, 0]], np.float32)
        )
        return jnp.matmul(
            x, jnp.asarray(swap, x.dtype), precision=FLOAT32, preferred_element_type=jnp.float32
        )
    y = x.astype(jnp.float32)
    first = (jnp.arange(x.shape[-1]) % 2 == 0)[None, None, None]
    return jnp.where(first, -jnp.roll(y, -1, axis=-1), jnp.roll(y, 1, axis=-1))
