"""What flows through the system: one NamedTuple a thing, with axes, dtype and range of every field.

Letters are those of `array_types`. Padding stands at the end of an axis, is masked out, and never
changes a result.
"""

from collections.abc import Callable
from typing import NamedTuple

from squeeze_jax.array_types import Array, Bool, Float, Int, UInt8


class HiddenStates(NamedTuple):
    """All hidden states of the MLLM for a batch, text and image tokens apart.

    Source: docs/decisions.md, "Hidden states".
    """

    text: Float[Array, "B M Lt C"]
    text_mask: Bool[Array, "B Lt"]
    text_positions: Int[Array, "B Lt"]
    """Place of each text token in the MLLM's sequence, 0 .. Lt + Li - 1."""
    image: Float[Array, "B M Li C"]
    image_mask: Bool[Array, "B Li"]
    image_positions: Int[Array, "B Li"]


class Context(NamedTuple):
    """The aggregator's output, which takes the place of the T5 features in the transformer."""

    tokens: Float[Array, "B L C"]
    mask: Bool[Array, "B L"]


class References(NamedTuple):
    """Clean latents of the references as packed tokens, all references of a sample in one row."""

    tokens: Float[Array, "B R c"]
    mask: Bool[Array, "B R"]
    positions: Int[Array, "B R axes"]
    """Each token's place on the rotary axes, as the backbone's `reference_positions` gives it:
    FLUX.1's row and column, already shifted past the target's (UNO); FLUX.2's t, row and column."""


class TrainingBatch(NamedTuple):
    """One batch of feature records, as the data pipeline hands it to the train step."""

    target: Float[Array, "B N c"]
    """Packed latents x_0 of the target after shift and scale: about zero mean and unit variance."""
    hidden_states: HiddenStates
    references: References
    index: Int[Array, " B"]  # pyright: ignore[reportIncompatibleMethodOverride]
    """The record's index in the data set."""
    grid: Int[Array, "B 2"] | None = None
    """Rows and columns of each target's tokens, where targets are of several sizes; None: the
    config's."""

    def features(self, encode: "Callable[[RawBatch], TrainingBatch]") -> "TrainingBatch":
        """The batch itself: it holds features already."""
        return self


class RawBatch(NamedTuple):
    """One batch of examples before the frozen encoders, for programs that run these themselves."""

    target: UInt8[Array, "B height width 3"]
    references: UInt8[Array, "B R h w 3"]
    """All of one size; R is the most of a sample."""
    reference_count: Int[Array, " B"]
    """References that a sample has; the rest of its places are padding."""
    ids: Int[Array, "B T"]
    """Token ids of the MLLM's sequence, image tokens among them; padding at the end."""
    valid: Bool[Array, "B T"]
    tiles: UInt8[Array, "B tiles size size 3"]
    """What the MLLM sees of the references, sample by sample; unused places at the end of a
    sample's."""
    index: Int[Array, " B"]  # pyright: ignore[reportIncompatibleMethodOverride]
    """The example's number."""

    def features(self, encode: "Callable[[RawBatch], TrainingBatch]") -> TrainingBatch:
        """What the encoders make of the examples."""
        return encode(self)
