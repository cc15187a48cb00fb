"""The trained system: aggregator and backbone. The frozen encoders stay outside, except for
on-line extraction."""

import jax
import jax.numpy as jnp
from flax import nnx

from squeeze_jax.array_types import Array, Float, Int
from squeeze_jax.batch import Context, HiddenStates, RawBatch, References, TrainingBatch
from squeeze_jax.models.aggregator import Aggregator
from squeeze_jax.models.backbone import Backbone, CachedReferences, Modulation
from squeeze_jax.models.online_encoders import Encoders


class System(nnx.Module):
    """Predicts a velocity from hidden states of the MLLM and reference tokens."""

    def __init__(
        self, aggregator: Aggregator, dit: Backbone, encoders: Encoders | None = None
    ) -> None:
        self.aggregator = aggregator
        self.dit = dit
        self.encoders = encoders

    def encode_batch(self, batch: TrainingBatch | RawBatch) -> TrainingBatch:
        """Returns the batch's features: raw examples go through the encoders, without gradient."""
        return batch.features(self._encode)

    def _encode(self, raw: RawBatch) -> TrainingBatch:
        if self.encoders is None:
            raise ValueError("raw examples need a system with encoders (data.online)")
        reads, positions_of = self.aggregator.config.reads, self.dit.config.reference_positions
        return jax.lax.stop_gradient(self.encoders(raw, reads, positions_of))

    def aggregate(self, states: HiddenStates) -> Context:
        """Makes the context of hidden states; a sampler does so once a prompt, before its steps."""
        return self.aggregator(states)

    def make_modulation(self, times: Float[Array, " T"], guidance: float = 1.0) -> Modulation:
        """Computes the modulation of every block at these times, before a loop over them."""
        return self.dit.make_modulation(self.embed_timestep(times, guidance))

    def prepare_references(
        self, references: References, guidance: float = 1.0
    ) -> References | CachedReferences:
        """Makes of references what `velocity` takes; a sampler does so once a prompt, before its
        steps.
        """
        if self.dit.config.reference_attention == "joint":
            return references
        temb = self.embed_timestep(jnp.zeros(references.tokens.shape[0]), guidance)
        return self.dit.cache_references(references, temb)

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
        """Predicts the velocity of noisy target tokens; masked context and reference tokens have
        no influence.

        `target_grid` is (rows, columns) of tokens, one for all samples or one for each.
        `references=None` leaves reference tokens out. `guidance` is the distilled value (1.0:
        docs/decisions.md, "Classifier-free guidance"), unused by a backbone that takes none; the
        pooled vector is zero (docs/decisions.md, "Entry to the backbone"). `modulation` is what
        `make_modulation` gave for `t`, where all samples have the same time.
        """
        if isinstance(references, References):
            references = self.prepare_references(references, guidance)
        temb = self.embed_timestep(t, guidance) if modulation is None else modulation
        return self.dit.velocity(
            target, target_grid, temb, context.tokens, context.mask, references
        )

    def embed_timestep(self, t: Float[Array, " T"], guidance: float = 1.0) -> Float[Array, "T C"]:
        """The conditioning vector of times, with one distilled guidance value for all."""
        value = jnp.full(t.shape, guidance, jnp.float32) if self.dit.config.guidance else None
        return self.dit.embed_timestep(t, value)
