"""The staged sampler: plain functions in order, one compiled program for a size.

Conditions that a stage does not use are left out of its sequence (shorter, not masked). The number of steps, the stage
borders and the guidance scale are arguments of the compiled program, so that changing them compiles nothing.
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
from squeeze_jax.models.system import System
from squeeze_jax.sharding import compiler_options, on_mesh

MAX_STEPS = 100
"""Steps that one compiled program can take: its list of times has this many places."""


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
    for kind in ((True, False), (True, True), (False, True)):
        done = stages.get(kind, done)
        borders.append(done)
    return Schedule(np.pad(times, (0, MAX_STEPS - steps)), np.array(borders, np.int32))


def noise_for(seeds: list[int], tokens: int, channels: int) -> Float[Array, "B N c"]:
    """Standard normal noise of each seed: the same for a seed, whatever batch it is in."""
    return _noise(np.array([seed % 2**32 for seed in seeds], np.uint32), tokens, channels)


@partial(jax.jit, static_argnums=(1, 2))
def _noise(seeds: Array, tokens: int, channels: int) -> jax.Array:
    return jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), (tokens, channels)))(seeds)


def denoise(
    system: System,
    noise: Float[Array, "B N c"],
    target_grid: tuple[int, int],
    states: HiddenStates,
    references: References | None,
    schedule: Schedule,
    cfg_scale: Float[Array, ""],
    *,
    guided: bool,
    guidance: float,
    masked: bool = False,
) -> Float[Array, "B N c"]:
    """Latent tokens from noise: aggregate once, then up to three stages of Euler steps.

    v = v_u + cfg_scale·(v_c − v_u), where the unconditional branch sees the target alone; `guided=False` leaves that
    branch out (scale 1). A leading axis of 1 in `states` and `references` serves all images. `masked=True` keeps all
    tokens in every stage and masks them instead: the slow twin that tests compare with.
    """
    batch = noise.shape[0]

    def spread(x: Array) -> jax.Array:
        return jnp.broadcast_to(x, (batch, *x.shape[1:])) if x.shape[0] != batch else jnp.asarray(x)

    context = jax.tree.map(spread, system.context(states))
    references = jax.tree.map(spread, references)
    nothing = Context(context.tokens[:, :0], context.mask[:, :0])

    def velocity(x: jax.Array, t: jax.Array, mllm: bool, vae: bool) -> jax.Array:
        t = jnp.full((batch,), t)
        if masked:
            kept = Context(context.tokens, context.mask & mllm)
            shown = references and References(references.tokens, references.mask & vae, references.positions)
            return system.velocity(x, target_grid, t, kept, shown, guidance)
        return system.velocity(
            x, target_grid, t, context if mllm else nothing, references if vae else None, guidance
        )

    def stage(mllm: bool, vae: bool):
        def step(i: jax.Array, x: jax.Array) -> jax.Array:
            t, t_next = schedule.times[i], schedule.times[i + 1]
            v = velocity(x, t, mllm, vae)
            if guided:
                v_u = velocity(x, t, False, False)
                v = v_u + cfg_scale * (v - v_u)
            return euler_step(x, v, t, t_next)

        return step

    first, second, third = schedule.borders[0], schedule.borders[1], schedule.borders[2]
    x = jax.lax.fori_loop(0, first, stage(True, False), noise)
    if references is not None:
        x = jax.lax.fori_loop(first, second, stage(True, True), x)
        x = jax.lax.fori_loop(second, third, stage(False, True), x)
    return x


def make_sampler(
    graph: Any,
    *,
    target_grid: tuple[int, int],
    guided: bool,
    guidance: float,
    masked: bool = False,
    mesh: Mesh | None = None,
):
    """`denoise` compiled: (leaves of the system, noise, states, references, schedule, cfg scale) to latent tokens.

    `mesh` is what the arrays lie on.
    """

    @partial(jax.jit, compiler_options=compiler_options(mesh))
    def sample(
        leaves: Any,
        noise: Array,
        states: HiddenStates,
        references: References | None,
        schedule: Schedule,
        cfg_scale: Array,
    ) -> jax.Array:
        system = nnx.merge(graph, *leaves)
        with on_mesh(mesh):
            return denoise(
                system, noise, target_grid, states, references, schedule, cfg_scale,
                guided=guided, guidance=guidance, masked=masked,
            )  # fmt: skip

    return sample
