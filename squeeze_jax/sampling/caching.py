"""Cache policies: how a velocity is had for less than a whole evaluation. They wrap a denoiser from
outside.

All change the image: compare with simply fewer steps. They have the names of diffusers'
`TaylorSeerCacheConfig` and `FirstBlockCacheConfig`. TaylorSeer extrapolates the guided velocity
(diffusers' lite mode: the last projection), so that its state is as large as the latents.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from squeeze_jax.array_types import Array, Bool, Float, Int, PyTree
from squeeze_jax.models.backbone import Backbone, BlockInputs, Streams
from squeeze_jax.sampling.denoiser import Denoiser
from squeeze_jax.sampling.schedule import STAGES, UNCONDITIONAL, Conditions

ALWAYS_EVALUATED = 3
"""Steps at the start of a run that TaylorSeer evaluates (diffusers' `disable_cache_before_step`)."""


@runtime_checkable
class CachePolicy(Protocol):
    """Decides at each step whether the denoiser is evaluated."""

    def init(self, noise: Float[Array, "B N c"], width: int) -> PyTree:
        """The state before the first step; `width` is that of the backbone's hidden states."""
        ...

    def velocity(
        self,
        denoiser: Denoiser,
        i: Int[Array, ""],
        x: Float[Array, "B N c"],
        stage: int,
        start: Int[Array, ""],
        state: PyTree,
    ) -> tuple[Float[Array, "B N c"], PyTree]:
        """The guided velocity at step i of a stage that began at step `start`, and the next state."""
        ...


@dataclass(frozen=True)
class NoCache:
    """Evaluates every step."""

    def init(self, noise: Array, width: int) -> None:
        return None

    def velocity(
        self, denoiser: Denoiser, i: Array, x: Array, stage: int, start: Array, state: None
    ) -> tuple[jax.Array, None]:
        return denoiser.velocity(jnp.asarray(i), x, stage), None


class TaylorState(NamedTuple):
    """Velocities of a stage's last evaluations."""

    factors: Float[Array, "orders B N c"]
    """Finite differences of the velocity at the last evaluation, by order."""
    evaluations: Int[Array, ""]
    """Number of evaluations in this stage."""
    last: Int[Array, ""]
    """The step of the last one."""


@dataclass(frozen=True)
class TaylorSeer:
    """Evaluates one of `interval` steps in a row and extrapolates the others; each stage begins
    with an evaluation."""

    interval: int
    """Steps of which one is evaluated; at least 2."""
    order: int
    """Of the Taylor expansion: 0, 1 or 2."""

    def init(self, noise: Array, width: int) -> TaylorState:
        zero = jnp.zeros((), jnp.int32)
        return TaylorState(jnp.zeros((self.order + 1, *noise.shape), noise.dtype), zero, zero)

    def velocity(
        self, denoiser: Denoiser, i: Array, x: Array, stage: int, start: Array, state: TaylorState
    ) -> tuple[jax.Array, TaylorState]:
        state = state._replace(evaluations=jnp.where(i == start, 0, state.evaluations))

        def evaluate(state: TaylorState) -> tuple[jax.Array, TaylorState]:
            v = denoiser.velocity(jnp.asarray(i), x, stage)
            return v, update_factors(state, v, jnp.asarray(i))

        def reuse(state: TaylorState) -> tuple[jax.Array, TaylorState]:
            return extrapolate(state, jnp.asarray(i)), state

        wanted = ((i - start) % self.interval == 0) | (i < ALWAYS_EVALUATED)
        return jax.lax.cond(wanted, evaluate, reuse, state)


def update_factors(
    state: TaylorState, velocity: Float[Array, "B N c"], i: Int[Array, ""]
) -> TaylorState:
    """The state after an evaluation at step i: each order's difference to the evaluation before,
    per step."""
    distance = jnp.maximum(i - state.last, 1).astype(velocity.dtype)
    factors = [velocity]
    for order in range(len(state.factors) - 1):
        known = state.evaluations > order  # an order needs as many evaluations before this one
        factors.append(jnp.where(known, (factors[order] - state.factors[order]) / distance, 0.0))
    return TaylorState(jnp.stack(factors), state.evaluations + 1, i)


def extrapolate(state: TaylorState, i: Int[Array, ""]) -> Float[Array, "B N c"]:
    """The velocity at step i by the Taylor expansion around the last evaluation."""
    offset = (i - state.last).astype(state.factors.dtype)
    velocity = state.factors[0]
    for order in range(1, len(state.factors)):
        velocity = velocity + state.factors[order] * offset**order / math.factorial(order)
    return velocity


class FirstBlockState(NamedTuple):
    """Residuals of the last velocity for which all blocks were run, of the target's tokens."""

    first: Float[Array, "B N C"]
    """What the first block added."""
    rest: Float[Array, "B N C"]
    """What all others added."""
    is_valid: Bool[Array, ""]
    """Whether there was one."""


@dataclass(frozen=True)
class FirstBlockCache:
    """Leaves all blocks but the first out where the first adds almost what it added before
    (diffusers).

    Almost: mean |difference| at most `threshold` · mean |what was added then|, over all of the
    batch. Diffusers looks at every image token; here the target's count, since references come and
    go.
    """

    threshold: float

    def init(self, noise: Array, width: int) -> tuple[FirstBlockState, FirstBlockState]:
        """One cache of zeros [B, N, width] for each branch of the guidance."""
        zeros = jnp.zeros((*noise.shape[:2], width), jnp.float32)
        state = FirstBlockState(zeros, zeros, jnp.zeros((), bool))
        return state, state

    def velocity(
        self,
        denoiser: Denoiser,
        i: Array,
        x: Array,
        stage: int,
        start: Array,
        state: tuple[FirstBlockState, FirstBlockState],
    ) -> tuple[jax.Array, tuple[FirstBlockState, FirstBlockState]]:
        i = jnp.asarray(i)
        conditional, unconditional = state

        def branch(
            conditions: Conditions, state: FirstBlockState
        ) -> tuple[jax.Array, FirstBlockState]:
            streams, inputs = denoiser.embed_inputs(i, x, conditions)
            return velocity_by_first_block(
                denoiser.system.dit, streams, inputs, x.shape[1], state, self.threshold
            )

        # A stage has other tokens than the one before, so the conditional branch begins anew.
        conditional = conditional._replace(is_valid=conditional.is_valid & (i != start))
        v, conditional = branch(STAGES[stage], conditional)
        if denoiser.guided[stage]:
            v_u, unconditional = branch(UNCONDITIONAL, unconditional)
            v = denoiser.guide(stage, v, v_u)
        return v, (conditional, unconditional)


def velocity_by_first_block(
    backbone: Backbone,
    streams: Streams,
    inputs: BlockInputs,
    length: int,
    state: FirstBlockState,
    threshold: float,
) -> tuple[Float[Array, "B N c"], FirstBlockState]:
    """The velocity of the first `length` image tokens (the target's), by a first-block cache."""
    first = backbone.apply_blocks(streams, inputs, 0, 1)
    before, after = (img[:, :length].astype(jnp.float32) for _, img in (streams, first))
    residual = after - before
    change = jnp.abs(residual - state.first).mean() / jnp.abs(state.first).mean()

    def run() -> tuple[jax.Array, FirstBlockState]:
        hidden = backbone.apply_blocks(first, inputs, 1)[1][:, :length]
        return hidden, FirstBlockState(
            residual, hidden.astype(jnp.float32) - after, jnp.ones((), bool)
        )

    def reuse() -> tuple[jax.Array, FirstBlockState]:
        return (after + state.rest).astype(first[1].dtype), state

    hidden, state = jax.lax.cond(~state.is_valid | (change > threshold), run, reuse)
    return backbone.predict_velocity(hidden, inputs), state
