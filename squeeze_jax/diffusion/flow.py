"""Rectified flow: the path, the velocity, the loss, and how times are drawn.

x_t = (1 − t)·x_0 + t·ε with t in [0, 1], 1 = pure noise; the model predicts v = ε − x_0
(docs/decisions.md, "Training").
"""

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from squeeze_jax.array_types import Array, Float, Key

TimeSampling = Literal["shifted_uniform", "logit_normal"]

BASE_TOKENS, BASE_SHIFT = 256, 0.5
MAX_TOKENS, MAX_SHIFT = 4096, 1.15  # FLUX.1's scheduler


Shift = Callable[[int, int], float]
"""A schedule's μ, from the target's tokens and the number of steps."""


def schedule_shift(target_tokens: int, steps: int = 0) -> float:
    """FLUX.1-dev's μ for a picture of so many target tokens, whatever the steps.

    Linear, 0.5 at 256 tokens and 1.15 at 4,096. Source: docs/decisions.md, "Schedule and solver".
    """
    slope = (MAX_SHIFT - BASE_SHIFT) / (MAX_TOKENS - BASE_TOKENS)
    return BASE_SHIFT + slope * (target_tokens - BASE_TOKENS)


def no_shift(target_tokens: int, steps: int) -> float:
    """FLUX.1-schnell's μ: 0, which leaves times as they are."""
    return 0.0


def empirical_shift(target_tokens: int, steps: int) -> float:
    """FLUX.2's μ for a picture of that many target tokens, sampled in that many steps.

    It is linear in the tokens for 10 and for 200 steps, and linear in the steps through these two.
    Above 4,300 tokens it is that of 200 steps, whatever the steps; it jumps there.
    Source: diffusers 0.42.1, `compute_empirical_mu`, whose constants these are.
    """
    at_200 = 1.6927e-4 * target_tokens + 0.45666666
    if target_tokens > 4300:
        return at_200
    at_10 = 8.73809524e-5 * target_tokens + 1.89833333
    return at_200 + (at_10 - at_200) * (200 - steps) / 190


def shift_time(s: Float[Array, "*B"], mu: float) -> Float[Array, "*B"]:
    """t = e^μ / (e^μ + 1/s − 1), as diffusers' FLUX pipelines have it: moves times towards noise. 0
    and 1 stay, and with μ = 0 all do."""
    if mu == 0.0:
        return s
    return math.exp(mu) * s / (math.exp(mu) * s + (1.0 - s))  # the brackets keep 1 exactly at 1


def sample_times(key: Key, batch: int, sampling: TimeSampling, mu: float) -> Float[Array, " B"]:
    """Draws training times: uniform or logit-normal ones, shifted by the schedule's μ.

    Source: docs/decisions.md, "Training times".
    """
    if sampling == "shifted_uniform":
        s = jax.random.uniform(key, (batch,))
    else:
        s = jax.nn.sigmoid(jax.random.normal(key, (batch,)))
    return shift_time(s, mu)


def add_noise(
    clean: Float[Array, "B N c"], noise: Float[Array, "B N c"], t: Float[Array, " B"]
) -> Float[Array, "B N c"]:
    """x_t on the straight path from x_0 to ε."""
    t = t[:, None, None]
    return (1.0 - t) * clean + t * noise


def loss_per_sample(
    velocity: Float[Array, "B N c"], clean: Float[Array, "B N c"], noise: Float[Array, "B N c"]
) -> Float[Array, " B"]:
    """Mean squared error of the velocity against ε − x_0, in float32."""
    error = velocity.astype(jnp.float32) - (noise - clean).astype(jnp.float32)
    return jnp.mean(jnp.square(error), axis=(1, 2))


def euler_step(
    x: Float[Array, "B N c"],
    velocity: Float[Array, "B N c"],
    t: Float[Array, ""],
    t_next: Float[Array, ""],
) -> Float[Array, "B N c"]:
    """Euler's step x + (t_next − t)·v."""
    return x + (t_next - t).astype(x.dtype) * velocity.astype(x.dtype)
