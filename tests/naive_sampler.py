"""The sampler as one would write it first: all tokens in every step, masked, and everything made anew.

It shares nothing with `sampler` but the schedule; tests and benchmarks compare the two.
"""

import jax
import jax.numpy as jnp

from squeeze_jax.array_types import Array, Float
from squeeze_jax.batch import Context, HiddenStates, References
from squeeze_jax.models.system import System
from squeeze_jax.sampling.schedule import Schedule


def sample_naively(
    system: System,
    noise: Float[Array, "B N c"],
    target_grid: tuple[int, int],
    states: HiddenStates,
    references: References,
    schedule: Schedule,
    scales: Float[Array, " 3"],
    guidance: float = 1.0,
) -> Float[Array, "B N c"]:
    """Latent tokens from noise; every image has a row of states and references."""
    times, borders = jnp.asarray(schedule.times), jnp.asarray(schedule.borders)

    def step(i: jax.Array, x: jax.Array) -> jax.Array:
        t = jnp.full((x.shape[0],), times[i])

        def velocity(mllm: jax.Array, vae: jax.Array) -> jax.Array:
            context = system.aggregate(states)
            context = Context(context.tokens, context.mask & mllm)
            shown = References(references.tokens, references.mask & vae, references.positions)
            return system.velocity(x, target_grid, t, context, shown, guidance)

        scale = jnp.asarray(scales)[jnp.sum(i >= borders[:2])]
        never = i < 0  # no constant, which the compiler would multiply out for minutes
        bare, conditioned = velocity(never, never), velocity(i < borders[1], i >= borders[0])
        return x + (times[i + 1] - times[i]) * (bare + scale * (conditioned - bare))

    return jax.lax.fori_loop(0, borders[2], step, noise)
