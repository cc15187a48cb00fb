"""The schedule of a run: its times, its stages, and the noise that it begins with."""

from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from squeeze_jax.array_types import Array, Float, Int
from squeeze_jax.diffusion.flow import Shift, schedule_shift
from squeeze_jax.diffusion.stages import plan_stages, time_steps
from squeeze_jax.errors import InputError

MAX_STEPS = 100
"""Steps that one compiled program can take: its list of times has this many places."""


class Conditions(NamedTuple):
    """What a velocity is conditioned on."""

    mllm: bool
    """The MLLM's tokens."""
    vae: bool
    """The references' tokens."""


STAGES = (Conditions(True, False), Conditions(True, True), Conditions(False, True))
"""The stages in order: MLLM alone, both, VAE alone (docs/decisions.md, "Multi-stage denoising")."""
UNCONDITIONAL = Conditions(False, False)
"""The other branch of classifier-free guidance: the target alone (docs/decisions.md,
"Classifier-free guidance")."""
STAGE_NAMES = ("MLLM", "MLLM + VAE", "VAE")
"""What the stages are called wherever they are shown or noted."""


class Schedule(NamedTuple):
    """Times and stage borders of a run, padded to a static shape."""

    times: Float[Array, " steps"]
    """float32 [MAX_STEPS + 1], from 1 to 0, then zeros."""
    borders: Int[Array, " 3"]
    """For each stage, the step before which it ends."""

    def stage_names(self, steps: int) -> list[str]:
        """Returns the name of the stage of each of the first `steps` steps."""
        stages = np.searchsorted(self.borders, np.arange(steps), side="right")
        return [STAGE_NAMES[stage] for stage in stages]


def make_schedule(
    steps: int,
    target_tokens: int,
    tau1: float,
    tau2: float,
    *,
    references: bool,
    shift: Shift = schedule_shift,
) -> Schedule:
    """Builds the schedule of a run (see `diffusion.stages`).

    Raises InputError for impossible numbers.
    """
    if not 1 <= steps <= MAX_STEPS:
        raise InputError(f"steps is {steps}; it must be from 1 to {MAX_STEPS}")
    times = time_steps(steps, target_tokens, shift)
    borders, end = [], 0
    ends = {
        (stage.mllm, stage.vae): stage.steps[1]
        for stage in plan_stages(times, tau1, tau2, references)
    }
    for conditions in STAGES:
        end = ends.get(conditions, end)
        borders.append(end)
    return Schedule(np.pad(times, (0, MAX_STEPS - steps)), np.array(borders, np.int32))


def noise_for(seeds: list[int], tokens: int, channels: int) -> Float[Array, "B N c"]:
    """Draws standard normal noise of each seed: the same for a seed, whatever batch it is in."""
    return _noise(np.array([seed % 2**32 for seed in seeds], np.uint32), tokens, channels)


@partial(jax.jit, static_argnums=(1, 2))
def _noise(seeds: Array, tokens: int, channels: int) -> jax.Array:
    return jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), (tokens, channels)))(seeds)
