"""The staged sampler: `prepare` computes what all steps share, `denoise` takes steps.

A sampler is a denoiser (conditions of a stage, guidance), a solver and a cache policy. The number
of steps, the stage borders and the guidance scales are arguments of the compiled programs, so that
changing them compiles nothing.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from squeeze_jax.array_types import Array, Float, Int, PyTree
from squeeze_jax.batch import HiddenStates, References
from squeeze_jax.models.system import System
from squeeze_jax.sampling.denoiser import Denoiser, Prepared
from squeeze_jax.sampling.schedule import MAX_STEPS, STAGES, Schedule
from squeeze_jax.sampling.solver_config import DEFAULT_SOLVER, SolverConfig
from squeeze_jax.sampling.solvers import SOLVERS, Step
from squeeze_jax.sharding import compiler_options, use_mesh


class SolverState(NamedTuple):
    """Everything that a step hands to the next."""

    x: Float[Array, "B N c"]
    """Latent tokens."""
    velocity: Float[Array, "B N c"] | None
    """The guided velocity of the step before; None for solvers that do not read it."""
    cache: Any
    """The cache policy's own state."""


def prepare(
    system: System,
    states: HiddenStates,
    references: References | None,
    schedule: Schedule,
    guidance: float,
) -> Prepared:
    """Computes the context, the references as the backbone reads them, and all modulation: once,
    whatever the steps."""
    shown = None if references is None else system.prepare_references(references, guidance)
    modulation = system.make_modulation(jnp.asarray(schedule.times), guidance)
    return Prepared(system.aggregate(states), shown, modulation)


def initial_state(noise: Float[Array, "B N c"], solver: SolverConfig, width: int) -> SolverState:
    """The state before the first step of `denoise`; `width` is that of the backbone's hidden
    states."""
    velocity = None if solver.solver == "euler" else jnp.zeros_like(noise)
    return SolverState(noise, velocity, solver.cache.init(noise, width))


def denoise(
    system: System,
    state: SolverState,
    target_grid: tuple[int, int],
    prepared: Prepared,
    schedule: Schedule,
    scales: Float[Array, " 3"],
    span: Int[Array, " 2"],
    *,
    guided: tuple[bool, ...],
    solver: SolverConfig = DEFAULT_SOLVER,
) -> SolverState:
    """Takes the steps `span[0]` to `span[1]` - 1 of the schedule, stage by stage.

    `guided` and `scales` have one entry a stage; a stage that is not guided evaluates the
    conditional branch alone.
    """
    times, take_step, cache = jnp.asarray(schedule.times), SOLVERS[solver.solver], solver.cache
    denoiser = Denoiser(system, target_grid, prepared, times, scales, guided, state.x.shape[0])

    def run_stage(stage: int, start: jax.Array, end: jax.Array, state: SolverState) -> SolverState:
        def body(i: jax.Array, state: SolverState) -> SolverState:
            v, cached = cache.velocity(denoiser, i, state.x, stage, start, state.cache)
            step = Step(times[jnp.maximum(i - 1, 0)], times[i], times[i + 1], i == start)
            before = v if state.velocity is None else state.velocity
            x = take_step(state.x, v, before, step)
            return SolverState(x, None if state.velocity is None else v, cached)

        return jax.lax.fori_loop(jnp.clip(start, *span), jnp.clip(end, *span), body, state)

    start = jnp.zeros((), jnp.int32)
    for stage in range(len(STAGES) if prepared.references is not None else 1):
        end = jnp.asarray(schedule.borders[stage])
        state = run_stage(stage, start, end, state)
        start = end
    return state


class Sampler(NamedTuple):
    """The compiled programs of one size."""

    prepare: Callable[..., Prepared]
    """(params, states, references, schedule) to `Prepared`."""
    denoise: Callable[..., SolverState]
    """(params, state, prepared, schedule, scales [3], span [2]) to the state."""
    solver: SolverConfig
    width: int
    """Of the backbone's hidden states."""

    def __call__(
        self,
        params: tuple[nnx.State, ...],
        noise: Array,
        states: HiddenStates,
        references: References | None,
        schedule: Schedule,
        scales: Array,
    ) -> jax.Array:
        """Samples latent tokens from noise."""
        prepared = self.prepare(params, states, references, schedule)
        state = initial_state(noise, self.solver, self.width)
        return self.denoise(
            params, state, prepared, schedule, scales, np.array([0, MAX_STEPS], np.int32)
        ).x


def make_sampler(
    graphdef: nnx.GraphDef,
    *,
    target_grid: tuple[int, int],
    guided: tuple[bool, ...],
    guidance: float,
    solver: SolverConfig = DEFAULT_SOLVER,
    width: int = 0,
    mesh: Mesh | None = None,
) -> Sampler:
    """Compiles `prepare` and `denoise`, with the system's params as first argument; `mesh` is what
    these lie on.

    `width` is that of the backbone's hidden states, which a first-block cache keeps.
    """

    def compiled(function: Callable[..., PyTree]) -> PyTree:
        return jax.jit(function, compiler_options=compiler_options(mesh))

    @compiled
    def prepare_on_mesh(
        params: tuple[nnx.State, ...],
        states: HiddenStates,
        references: References | None,
        schedule: Schedule,
    ) -> Prepared:
        with use_mesh(mesh):
            return prepare(nnx.merge(graphdef, *params), states, references, schedule, guidance)

    @compiled
    def denoise_on_mesh(
        params: tuple[nnx.State, ...],
        state: SolverState,
        prepared: Prepared,
        schedule: Schedule,
        scales: Array,
        span: Array,
    ) -> SolverState:
        with use_mesh(mesh):
            return denoise(
                nnx.merge(graphdef, *params), state, target_grid, prepared, schedule, scales, span,
                guided=guided, solver=solver,
            )  # fmt: skip

    return Sampler(prepare_on_mesh, denoise_on_mesh, solver, width)
