"""The trained system: aggregator and transformer. The frozen encoders stay outside, but for on-line extraction."""

import jax
import jax.numpy as jnp
from flax import nnx

from squeeze_jax.array_types import Array, Float, Int
from squeeze_jax.batch import Context, HiddenStates, RawBatch, References, TrainingBatch
from squeeze_jax.models.aggregator import Aggregator
from squeeze_jax.models.dit import CachedReferences, DiT, FirstBlock, Modulation
from squeeze_jax.models.online_encoders import Encoders


class System(nnx.Module):
    """Hidden states and references in, velocity out."""

    def __init__(self, aggregator: Aggregator, dit: DiT, encoders: Encoders | None = None) -> None:
        self.aggregator = aggregator
        self.dit = dit
        self.encoders = encoders

    def encoded(self, batch: TrainingBatch | RawBatch) -> TrainingBatch:
        """What the encoders make of raw examples; a batch of features as it is. No gradient goes through."""
        if isinstance(batch, TrainingBatch):
            return batch
        if self.encoders is None:
            raise ValueError("raw examples need a system with encoders (data.online)")
        return jax.lax.stop_gradient(self.encoders(batch, self.aggregator.config.reads))

    def context(self, states: HiddenStates) -> Context:
        """Aggregates a prompt's hidden states: once a prompt, whatever the number of steps."""
        return self.aggregator(states)

    def modulation(self, times: Float[Array, " T"], guidance: float = 1.0) -> Modulation:
        """What these times do to every block of the transformer, before a loop over them."""
        return self.dit.modulation(self._vector(times, guidance))

    def shown(self, references: References, guidance: float = 1.0) -> References | CachedReferences:
        """References as `velocity` wants them: once a prompt, whatever the number of steps."""
        if self.dit.config.reference_attention == "joint":
            return references
        return self.dit.cached(references, self._vector(jnp.zeros(references.tokens.shape[0]), guidance))

    def velocity(
        self,
        target: Float[Array, "B N c"],
        target_grid: tuple[int, int] | Int[Array, "B 2"],
        t: Float[Array, " B"],
        context: Context,
        references: References | CachedReferences | None,
        guidance: float = 1.0,
        modulation: Modulation | None = None,
    ) -> Float[Array, "B N c"]:
        """Velocity of noisy target tokens; masked context and reference tokens have no influence.

        `target_grid` is (rows, columns) of tokens, one for all or one a row of the batch.
        `references=None` leaves reference tokens out. `guidance` is the distilled value (PAPER, decision 5: 1.0), unused
        by a transformer that takes none; the pooled vector is zero (decision 2). `modulation` is that of `t`, where all
        samples have one and it is known already.
        """
        if isinstance(references, References):
            references = self.shown(references, guidance)
        at = self._vector(t, guidance) if modulation is None else modulation
        return self.dit.velocity(target, target_grid, at, context.tokens, context.mask, references)

    def velocity_after_first(
        self,
        target: Float[Array, "B N c"],
        target_grid: tuple[int, int],
        context: Context,
        references: References | CachedReferences | None,
        modulation: Modulation,
        kept: FirstBlock,
        threshold: float,
    ) -> tuple[Float[Array, "B N c"], FirstBlock]:
        """`velocity` with a first-block cache: `DiT.velocity_after_first`."""
        return self.dit.velocity_after_first(
            target, target_grid, modulation, context.tokens, context.mask, references, kept, threshold
        )

    def _vector(self, t: Float[Array, " T"], guidance: float) -> Float[Array, "T C"]:
        value = jnp.full(t.shape, guidance, jnp.float32) if self.dit.config.guidance else None
        return self.dit.vector(t, value)
