"""The trained system: aggregator and transformer. The frozen encoders stay outside, but for on-line extraction."""

import jax
import jax.numpy as jnp
from flax import nnx

from squeeze_jax.array_types import Array, Float, Int
from squeeze_jax.batch import Context, HiddenStates, RawBatch, References, TrainingBatch
from squeeze_jax.models.aggregator import Aggregator
from squeeze_jax.models.dit import DiT
from squeeze_jax.models.encoders import Encoders


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

    def velocity(
        self,
        target: Float[Array, "B N c"],
        target_grid: tuple[int, int] | Int[Array, "B 2"],
        t: Float[Array, " B"],
        context: Context,
        references: References | None,
        guidance: float = 1.0,
    ) -> Float[Array, "B N c"]:
        """Velocity of noisy target tokens; masked context and reference tokens have no influence.

        `target_grid` is (rows, columns) of tokens, one for all or one a row of the batch.
        `references=None` leaves reference tokens out. `guidance` is the distilled value (PAPER, decision 5: 1.0), unused
        by a transformer that takes none; the pooled vector is zero (decision 2).
        """
        value = jnp.full(t.shape, guidance, jnp.float32) if self.dit.config.guidance else None
        vec = self.dit.vector(t, value)
        return self.dit.velocity(target, target_grid, vec, context.tokens, context.mask, references)
