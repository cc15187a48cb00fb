"""The denoiser: one velocity of a stage, with its conditions and classifier-free guidance."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from squeeze_jax.array_types import Array, Float, Int
from squeeze_jax.batch import Context, References
from squeeze_jax.models.backbone import BlockInputs, CachedReferences, Modulation, Streams
from squeeze_jax.models.system import System
from squeeze_jax.sampling.schedule import STAGES, UNCONDITIONAL, Conditions


class Prepared(NamedTuple):
    """What every step of a run reads, one row a prompt."""

    context: Context
    references: References | CachedReferences | None
    modulation: Modulation
    """Of every time of the schedule."""


class Denoiser:
    """Predicts velocities of a batch of images.

    Conditions that a stage does not use are left out of its sequence (shorter, not masked). Row i
    of `prepared` serves the next batch / prompts images.
    """

    def __init__(
        self,
        system: System,
        target_grid: tuple[int, int],
        prepared: Prepared,
        times: Float[Array, " steps"],
        scales: Float[Array, " 3"],
        guided: tuple[bool, ...],
        batch: int,
    ) -> None:
        def repeat(x: Array) -> jax.Array:
            return (
                jnp.repeat(x, batch // x.shape[0], axis=0)
                if x.shape[0] != batch
                else jnp.asarray(x)
            )

        references = prepared.references
        if isinstance(references, CachedReferences):  # keys and values are repeated block by block
            references = references._replace(mask=repeat(references.mask))
        else:
            references = jax.tree.map(repeat, references)
        self.system, self.target_grid, self.times, self.batch = (
            system,
            target_grid,
            jnp.asarray(times),
            batch,
        )
        self.context: Context = jax.tree.map(repeat, prepared.context)
        self.references = references
        self.modulation, self.scales, self.guided = prepared.modulation, scales, guided
        # `jax.jit` caches one trace for each `Conditions`, so that all stages share the unconditional one.
        self._branch = jax.jit(self._evaluate, static_argnums=2)

    def velocity(
        self, i: Int[Array, ""], x: Float[Array, "B N c"], stage: int
    ) -> Float[Array, "B N c"]:
        """v_u + scale·(v_c − v_u) at step i; a stage that is not guided leaves the unconditional
        branch out (scale 1).

        The branches differ in length, so they are two calls, not one of twice the rows.
        Classifier-free guidance as diffusers computes it.
        """
        v = self._branch(i, x, STAGES[stage])
        return self.guide(stage, v, self._branch(i, x, UNCONDITIONAL)) if self.guided[stage] else v

    def guide(self, stage: int, conditional: Array, unconditional: Array) -> Float[Array, "B N c"]:
        """Combines the velocities [B, N, c] of both branches with the stage's guidance scale."""
        return unconditional + self.scales[stage] * (conditional - unconditional)

    def embed_inputs(
        self, i: Int[Array, ""], x: Float[Array, "B N c"], conditions: Conditions
    ) -> tuple[Streams, BlockInputs]:
        """The backbone's hidden states before block 0, for caches that skip blocks."""
        context, references = self._tokens(conditions)
        return self.system.dit.embed_inputs(
            x, self.target_grid, self.modulation.at(i), context.tokens, context.mask, references
        )

    def _evaluate(self, i: jax.Array, x: jax.Array, conditions: Conditions) -> jax.Array:
        context, references = self._tokens(conditions)
        t, modulation = jnp.full((self.batch,), self.times[i]), self.modulation.at(i)
        return self.system.velocity(
            x, self.target_grid, t, context, references, modulation=modulation
        )

    def _tokens(
        self, conditions: Conditions
    ) -> tuple[Context, References | CachedReferences | None]:
        empty = Context(self.context.tokens[:, :0], self.context.mask[:, :0])
        return (
            self.context if conditions.mllm else empty,
            self.references if conditions.vae else None,
        )
