"""When which condition is on: condition dropout in training, the stages (τ1, τ2) of sampling."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from squeeze_jax.array_types import Array, Bool, Key
from squeeze_jax.diffusion.flow import Shift, schedule_shift, shift_time
from squeeze_jax.errors import InputError

MAX_TAU = 1.1
"""The largest τ. All above 1 mean the same, since no step has t ≥ τ then; the bound finds typing
errors such as 95 for 0.95 (our decision: docs/decisions.md, "Thresholds above 1")."""


@dataclass(frozen=True)
class ConditionDropout:
    """Probabilities of one categorical draw a sample: which conditions it keeps.

    Without references (stage 1, text only) the outcomes fold: `both` and `mllm` keep the MLLM, the
    others drop it. Source: docs/decisions.md, "Condition dropout".
    """

    both: float = 0.6
    mllm: float = 0.1
    """The MLLM alone."""
    vae: float = 0.2
    """The references alone."""
    neither: float = 0.1
    """Nothing: what guidance calls unconditional."""

    def __post_init__(self) -> None:
        values = (self.both, self.mllm, self.vae, self.neither)
        if min(values) < 0 or not abs(sum(values) - 1.0) <= 1e-6:
            raise ValueError(
                f"dropout (both, mllm, vae, neither) is {values}: "
                "it must be probabilities that sum to 1"
            )

    def draw(self, key: Key, batch: int) -> tuple[Bool[Array, " B"], Bool[Array, " B"]]:
        """For each sample, whether the MLLM's tokens and whether the references' tokens stay."""
        edges = np.cumsum([self.both, self.mllm, self.vae])
        outcome = jnp.searchsorted(
            jnp.asarray(edges, jnp.float32), jax.random.uniform(key, (batch,)), side="right"
        )
        return (outcome == 0) | (outcome == 1), (outcome == 0) | (outcome == 2)


class Stage(NamedTuple):
    """Consecutive sampling steps with the same conditions."""

    mllm: bool
    vae: bool
    steps: tuple[int, int]
    """First step, and the one after the last."""


def time_steps(steps: int, target_tokens: int, shift: Shift = schedule_shift) -> np.ndarray:
    """The sampler's times, float32 [steps + 1] from 1 to 0: evenly spaced ones, shifted by μ."""
    s = 1.0 - np.arange(steps + 1, dtype=np.float64) / steps
    return np.asarray(shift_time(s, shift(target_tokens, steps)), np.float32)


def carry_tau(tau: float, base_tokens: int, tokens: int) -> float:
    """A threshold stated for `base_tokens` target tokens, at equal signal-to-noise for `tokens`.

    logit(t) moves by half the logarithm of the ratio, since t/(1 − t) grows with the square root of
    the number of tokens that show the same picture (docs/decisions.md, "τ at other sizes"). 0 stays
    as it is, and so do 1 and what is above it.
    """
    if tau == 0.0 or tau >= 1.0:
        return tau
    odds = tau / (1.0 - tau) * math.sqrt(tokens / base_tokens)
    return odds / (1.0 + odds)


def check_thresholds(tau1: float, tau2: float) -> None:
    """Raises InputError unless 0 ≤ tau2 ≤ tau1 ≤ `MAX_TAU`."""
    for name, tau in (("tau1", tau1), ("tau2", tau2)):
        if not 0.0 <= tau <= MAX_TAU:
            raise InputError(f"{name} is {tau:g}; it must be from 0 to {MAX_TAU:g}")
    if tau2 > tau1:
        raise InputError(f"tau2 {tau2:g} is larger than tau1 {tau1:g}; it must not be")


def plan_stages(
    times: np.ndarray, tau1: float, tau2: float, references: bool = True
) -> tuple[Stage, ...]:
    """The stages of a run at `times` [steps + 1], from 1 to 0, without those that have no step.

    A step belongs to the stage of the time at its start: the MLLM alone at t ≥ τ1, both at
    τ2 ≤ t < τ1, the VAE alone at t < τ2 (docs/decisions.md, "Multi-stage denoising"). The first
    step begins at t = 1, so that with τ1 > 1 none has the MLLM alone; with τ2 = 0 all have both.
    Without references the MLLM stays on throughout. Raises InputError for impossible thresholds.
    """
    check_thresholds(tau1, tau2)
    starts = times[:-1]
    first = int(np.sum(starts >= tau1)) if references else len(starts)
    second = int(np.sum(starts >= tau2)) if references else len(starts)
    stages = (
        Stage(mllm=True, vae=False, steps=(0, first)),
        Stage(mllm=True, vae=True, steps=(first, second)),
        Stage(mllm=False, vae=True, steps=(second, len(starts))),
    )
    return tuple(stage for stage in stages if stage.steps[0] < stage.steps[1])
