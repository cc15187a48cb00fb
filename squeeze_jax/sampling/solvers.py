"""Ways to spend less on an image: velocities foretold between evaluations, blocks left out, and steps of second order.

All change the image: compare with simply fewer steps. The caches have the names of diffusers' `TaylorSeerCacheConfig` and
`FirstBlockCacheConfig`. TaylorSeer foretells the guided velocity alone (diffusers' lite mode: the last projection), so that
the state is as large as the latents.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from squeeze_jax.array_types import Array, Float, Int
from squeeze_jax.diffusion.flow import euler_step
from squeeze_jax.errors import InputError
from squeeze_jax.models.dit import FirstBlock

Solver = Literal["euler", "heun", "multistep"]
EVALUATED = 3
"""Steps of a run that are evaluated in any case (diffusers' `disable_cache_before_step`); as is the first of each stage."""


@dataclass(frozen=True)
class Cheaper:
    """What a compiled program of the sampler does beside plain Euler steps; the default is these."""

    solver: Solver = "euler"
    """`heun`: two evaluations a step (the last has one). `multistep`: one, beside that of the step before
    (Adams-Bashforth of order 2 for steps of any length). Both begin anew in each stage."""
    cache_interval: int = 1
    """TaylorSeer: of so many steps in a row, one is evaluated; 1 evaluates all."""
    max_order: int = 1
    """Order of the expansion, 0 to 2, in steps since the last evaluation."""
    first_block_threshold: float = 0.0
    """First-block cache: where the first block's work changes by at most this share since all blocks were run, the others
    are left out (`DiT.velocity_after_first`; diffusers' default is 0.05). 0: never. Decided for all images of a batch."""

    def __post_init__(self) -> None:
        if self.solver not in get_args(Solver):
            raise InputError(f"solver is {self.solver!r}; choose one of {', '.join(get_args(Solver))}")
        if self.cache_interval < 1 or self.max_order not in (0, 1, 2):
            raise InputError(
                f"cache_interval {self.cache_interval} must be at least 1, max_order {self.max_order} 0, 1 or 2"
            )
        if self.solver == "heun" and self.cache_interval > 1:
            raise InputError("heun evaluates twice a step, which foretold velocities are to avoid; choose one of them")
        if self.first_block_threshold < 0:
            raise InputError(f"first_block_threshold is {self.first_block_threshold}; it must be at least 0 (0 is off)")
        if self.first_block_threshold and (self.solver != "euler" or self.cache_interval > 1):
            raise InputError("a first-block cache goes with solver euler and cache_interval 1; choose one of them")


PLAIN = Cheaper()
"""Every step evaluated, Euler's."""


class Memory(NamedTuple):
    """What a step knows of those before, within its stage."""

    factors: Float[Array, "orders B N c"]
    """Finite differences of the velocity at the last evaluation, by order."""
    evaluated: Int[Array, ""]
    """Evaluations in this stage."""
    last: Int[Array, ""]
    """The step of the last one."""
    before: Float[Array, "B N c"]
    """The velocity that the step before took."""


def empty(like: Float[Array, "B N c"], cheaper: Cheaper) -> Memory:
    zero = jnp.zeros((), jnp.int32)
    return Memory(jnp.zeros((cheaper.max_order + 1, *like.shape), like.dtype), zero, zero, jnp.zeros_like(like))


class FirstBlocks(NamedTuple):
    """First-block caches of the guidance's two branches."""

    conditional: FirstBlock
    """Begun anew in each stage, which sees other tokens."""
    unconditional: FirstBlock


State = tuple[Float[Array, "B N c"], Memory | FirstBlocks | None]
"""Latent tokens, and what the next step has to know; None where it needs nothing."""


def first_state(noise: Float[Array, "B N c"], cheaper: Cheaper, width: int = 0) -> State:
    """The state before the first step; `width` is the transformer's, for a first-block cache."""
    if cheaper.first_block_threshold:
        nothing = jnp.zeros((*noise.shape[:2], width), jnp.float32)
        return noise, FirstBlocks(*(FirstBlock(nothing, nothing, jnp.zeros((), bool)) for _ in range(2)))
    return noise, None if cheaper == PLAIN else empty(noise, cheaper)


def remembered(memory: Memory, velocity: Float[Array, "B N c"], i: Int[Array, ""]) -> Memory:
    """After an evaluation at step i: each order's difference to the evaluation before, a step."""
    distance = jnp.maximum(i - memory.last, 1).astype(velocity.dtype)
    factors = [velocity]
    for order in range(len(memory.factors) - 1):
        known = memory.evaluated > order  # as many evaluations as an order has to look back on
        factors.append(jnp.where(known, (factors[order] - memory.factors[order]) / distance, 0.0))
    return Memory(jnp.stack(factors), memory.evaluated + 1, i, memory.before)


def foretold(memory: Memory, i: Int[Array, ""]) -> Float[Array, "B N c"]:
    """The velocity at step i by the Taylor expansion around the last evaluation."""
    offset = (i - memory.last).astype(memory.factors.dtype)
    velocity = memory.factors[0]
    for order in range(1, len(memory.factors)):
        velocity = velocity + memory.factors[order] * offset**order / math.factorial(order)
    return velocity


def step(
    cheaper: Cheaper,
    velocity: Callable[[jax.Array, jax.Array], jax.Array],
    times: Float[Array, " steps"],
    i: Int[Array, ""],
    begin: Int[Array, ""],
    state: State,
) -> State:
    """The state after step i of a stage that began at step `begin`. `velocity(i, x)` evaluates at the schedule's time i."""
    x, memory = state
    if memory is None:
        return euler_step(x, velocity(i, x), times[i], times[i + 1]), None
    assert isinstance(memory, Memory)
    memory = memory._replace(evaluated=jnp.where(i == begin, 0, memory.evaluated))
    if cheaper.cache_interval > 1:
        wanted = ((i - begin) % cheaper.cache_interval == 0) | (i < EVALUATED)

        def evaluate(memory: Memory) -> tuple[jax.Array, Memory]:
            v = velocity(i, x)
            return v, remembered(memory, v, i)

        v, memory = jax.lax.cond(wanted, evaluate, lambda memory: (foretold(memory, i), memory), memory)
    else:
        v = velocity(i, x)
    taken = v
    if cheaper.solver == "multistep":
        ratio = (times[i + 1] - times[i]) / (times[i] - times[jnp.maximum(i - 1, 0)])
        taken = v + 0.5 * jnp.where(i == begin, 0.0, ratio) * (v - memory.before)
    elif cheaper.solver == "heun":

        def corrected() -> jax.Array:
            return 0.5 * (v + velocity(i + 1, euler_step(x, v, times[i], times[i + 1])))

        taken = jax.lax.cond(times[i + 1] == 0.0, lambda: v, corrected)  # a velocity at t = 0 says nothing
    return euler_step(x, taken, times[i], times[i + 1]), memory._replace(before=v)
