"""The staged sampler: what stays the same in every step is made once (`prepare`), then steps are taken (`advance`).

Conditions that a stage does not use are left out of its sequence (shorter, not masked). The number of steps, the stage
borders and the guidance scales are arguments of the compiled programs, so that changing them compiles nothing.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from squeeze_jax.array_types import Array, Float, Int
from squeeze_jax.batch import Context, HiddenStates, References
from squeeze_jax.diffusion.flow import euler_step
from squeeze_jax.diffusion.stages import plan_stages, time_steps
from squeeze_jax.errors import InputError
from squeeze_jax.models.dit import CachedReferences, FirstBlock, Modulation
from squeeze_jax.models.system import System
from squeeze_jax.sampling.solvers import PLAIN, Cheaper, FirstBlocks, State, first_state, step
from squeeze_jax.sharding import compiler_options, on_mesh

MAX_STEPS = 100
"""Steps that one compiled program can take: its list of times has this many places."""
STAGES = ((True, False), (True, True), (False, True))
"""Whether a stage sees the MLLM's tokens, and whether it sees the references'."""


class Schedule(NamedTuple):
    """Times and stage borders of a run, padded to a static shape."""

    times: Float[Array, " steps"]
    """float32 [MAX_STEPS + 1], from 1 to 0, then zeros."""
    borders: Int[Array, " 3"]
    """Steps before which each stage ends: MLLM alone, both, VAE alone."""


def make_schedule(
    steps: int, target_tokens: int, tau1: float, tau2: float, *, references: bool, shifted: bool = True
) -> Schedule:
    """The schedule of a run (see `diffusion.stages`). Raises InputError for impossible numbers."""
    if not 1 <= steps <= MAX_STEPS:
        raise InputError(f"steps is {steps}; it must be from 1 to {MAX_STEPS}")
    if not (0 <= tau2 <= tau1 <= 1):
        raise InputError(f"tau1 is {tau1} and tau2 is {tau2}; they must satisfy 0 <= tau2 <= tau1 <= 1")
    times = time_steps(steps, target_tokens, shifted)
    borders, done = [], 0
    stages = {(stage.mllm, stage.vae): stage.steps[1] for stage in plan_stages(times, tau1, tau2, references)}
    for kind in STAGES:
        done = stages.get(kind, done)
        borders.append(done)
    return Schedule(np.pad(times, (0, MAX_STEPS - steps)), np.array(borders, np.int32))


def noise_for(seeds: list[int], tokens: int, channels: int) -> Float[Array, "B N c"]:
    """Standard normal noise of each seed: the same for a seed, whatever batch it is in."""
    return _noise(np.array([seed % 2**32 for seed in seeds], np.uint32), tokens, channels)


@partial(jax.jit, static_argnums=(1, 2))
def _noise(seeds: Array, tokens: int, channels: int) -> jax.Array:
    return jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), (tokens, channels)))(seeds)


class Prepared(NamedTuple):
    """What every step of a run reads, one row a prompt."""

    context: Context
    references: References | CachedReferences | None
    modulation: Modulation
    """Of every time of the schedule."""


def prepare(
    system: System, states: HiddenStates, references: References | None, schedule: Schedule, guidance: float
) -> Prepared:
    """The context, the references as the transformer sees them, and all modulation: once, whatever the number of steps."""
    shown = None if references is None else system.shown(references, guidance)
    return Prepared(system.context(states), shown, system.modulation(jnp.asarray(schedule.times), guidance))


def advance(
    system: System,
    state: State,
    target_grid: tuple[int, int],
    prepared: Prepared,
    schedule: Schedule,
    scales: Float[Array, " 3"],
    span: Int[Array, " 2"],
    *,
    guided: tuple[bool, ...],
    cheaper: Cheaper = PLAIN,
) -> State:
    """The state after the steps `span[0]` to `span[1]` - 1 of the schedule, stage by stage; `begun` makes the first.

    v = v_u + scale·(v_c − v_u), where the unconditional branch sees the target alone; a stage that is not `guided` leaves
    that branch out (scale 1). `guided` and `scales` have one entry a stage. The branches differ in length, so they are two
    calls, not one of twice the rows. Row i of `prepared` serves the next B / P images.
    """
    batch = state[0].shape[0]

    def spread(x: Array) -> jax.Array:
        return jnp.repeat(x, batch // x.shape[0], axis=0) if x.shape[0] != batch else jnp.asarray(x)

    times, shown = jnp.asarray(schedule.times), prepared.references
    context = jax.tree.map(spread, prepared.context)
    cached = isinstance(shown, CachedReferences)  # their keys and values are spread block by block
    shown = shown._replace(mask=spread(shown.mask)) if cached else jax.tree.map(spread, shown)
    nothing = Context(context.tokens[:, :0], context.mask[:, :0])

    @partial(jax.jit, static_argnums=(2, 3))  # so that stages share what is traced of the unconditional branch
    def velocity(i: jax.Array, x: jax.Array, mllm: bool, vae: bool) -> jax.Array:
        seen, references = context if mllm else nothing, shown if vae else None
        t, at = jnp.full((batch,), times[i]), prepared.modulation.at(i)
        return system.velocity(x, target_grid, t, seen, references, modulation=at)

    threshold = cheaper.first_block_threshold

    def after_first(i: jax.Array, x: jax.Array, mllm: bool, vae: bool, kept: FirstBlock) -> tuple[jax.Array, FirstBlock]:
        seen, references = context if mllm else nothing, shown if vae else None
        return system.velocity_after_first(x, target_grid, seen, references, prepared.modulation.at(i), kept, threshold)

    begin: Any = 0
    for number, (mllm, vae) in enumerate(STAGES if shown is not None else STAGES[:1]):
        end = schedule.borders[number]

        def guided_velocity(
            i: jax.Array, x: jax.Array, mllm: bool = mllm, vae: bool = vae, number: int = number
        ) -> jax.Array:
            v = velocity(i, x, mllm, vae)
            if not guided[number]:
                return v
            v_u = velocity(i, x, False, False)
            return v_u + scales[number] * (v - v_u)

        def take(i: jax.Array, state: State, begin: Any = begin, velocity: Any = guided_velocity) -> State:
            return step(cheaper, velocity, times, i, jnp.asarray(begin), state)

        def take_after_first(
            i: jax.Array, state: Any, begin: Any = begin, mllm: bool = mllm, vae: bool = vae, number: int = number
        ) -> State:
            x, (own, bare) = state
            v, own = after_first(i, x, mllm, vae, own._replace(known=own.known & (i != begin)))
            if guided[number]:
                v_u, bare = after_first(i, x, False, False, bare)
                v = v_u + scales[number] * (v - v_u)
            return euler_step(x, v, times[i], times[i + 1]), FirstBlocks(own, bare)

        body = take_after_first if threshold else take
        state = jax.lax.fori_loop(jnp.clip(begin, *span), jnp.clip(end, *span), body, state)
        begin = end
    return state


def begun(noise: Float[Array, "B N c"], prepared: Prepared, cheaper: Cheaper) -> State:
    """The state before the first step of `advance`."""
    return first_state(noise, cheaper, prepared.modulation.final[0].shape[-1] if cheaper.first_block_threshold else 0)


class Sampler(NamedTuple):
    """The compiled programs of one size."""

    prepare: Any
    """(leaves, states, references, schedule) to `Prepared`."""
    advance: Any
    """(leaves, state, prepared, schedule, scales [3], span [2]) to the state."""
    cheaper: Cheaper

    def __call__(
        self,
        leaves: Any,
        noise: Array,
        states: HiddenStates,
        references: References | None,
        schedule: Schedule,
        scales: Array,
    ) -> jax.Array:
        """From noise to latent tokens."""
        prepared = self.prepare(leaves, states, references, schedule)
        state = begun(noise, prepared, self.cheaper)
        return self.advance(leaves, state, prepared, schedule, scales, np.array([0, MAX_STEPS], np.int32))[0]


def make_sampler(
    graph: Any,
    *,
    target_grid: tuple[int, int],
    guided: tuple[bool, ...],
    guidance: float,
    cheaper: Cheaper = PLAIN,
    mesh: Mesh | None = None,
) -> Sampler:
    """`prepare` and `advance`, compiled, with the leaves of the system as first argument; `mesh` is what these lie on."""

    def compiled(function: Any) -> Any:
        return jax.jit(function, compiler_options=compiler_options(mesh))

    @compiled
    def prepared(leaves: Any, states: HiddenStates, references: References | None, schedule: Schedule) -> Prepared:
        with on_mesh(mesh):
            return prepare(nnx.merge(graph, *leaves), states, references, schedule, guidance)

    @compiled
    def advanced(
        leaves: Any, state: State, prepared: Prepared, schedule: Schedule, scales: Array, span: Array
    ) -> State:
        with on_mesh(mesh):
            return advance(
                nnx.merge(graph, *leaves), state, target_grid, prepared, schedule, scales, span,
                guided=guided, cheaper=cheaper,
            )  # fmt: skip

    return Sampler(prepared, advanced, cheaper)
