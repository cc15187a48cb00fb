"""Solvers: how a step follows from velocities. One function each; add another to `SOLVERS`, and its
name to `solver_names.py`."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from squeeze_jax.array_types import Array, Bool, Float
from squeeze_jax.diffusion.flow import euler_step
from squeeze_jax.sampling.solver_names import SolverName


class Step(NamedTuple):
    """One step from `t` to `t_next`."""

    t_before: Float[Array, ""]
    """Time of the step before; equal to `t` at the first step of a run."""
    t: Float[Array, ""]
    t_next: Float[Array, ""]
    is_first: Bool[Array, ""]
    """Whether this is the first step of a stage, whose conditions differ from those of the step
    before."""


Solver = Callable[
    [Float[Array, "B N c"], Float[Array, "B N c"], Float[Array, "B N c"], Step], jax.Array
]
"""(x at t, velocity at t, velocity at `t_before`, step) to x at `t_next`."""


def euler(x: Array, velocity: Array, before: Array, step: Step) -> Float[Array, "B N c"]:
    """Euler's step x + (t_next − t)·v of tokens [B, N, c]."""
    return euler_step(x, velocity, step.t, step.t_next)


def multistep(x: Array, velocity: Array, before: Array, step: Step) -> Float[Array, "B N c"]:
    """Adams-Bashforth of order 2 for steps of any length; Euler's step at the start of a stage.
    Tokens and velocities are [B, N, c]."""
    ratio = (step.t_next - step.t) / (step.t - step.t_before)
    weighted = velocity + 0.5 * jnp.where(step.is_first, 0.0, ratio) * (velocity - before)
    return euler_step(x, weighted, step.t, step.t_next)


SOLVERS: dict[SolverName, Solver] = {"euler": euler, "multistep": multistep}
