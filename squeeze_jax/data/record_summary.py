"""What is known of records without reading them: how many there are, and how large."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import chain
from typing import Any

import numpy as np

from squeeze_jax.data.buckets import Sizes
from squeeze_jax.data.record_format import FeatureRecord, Shape, record_shape
from squeeze_jax.diffusion.latents import PATCH
from squeeze_jax.errors import InputError


@dataclass(frozen=True)
class ShardSummary:
    """Count and largest sizes of one shard's records (or, merged, of a data set's)."""

    records: int
    shape: Shape
    max_text: int
    max_image: int
    max_references: int
    max_reference_tokens: int
    """Largest number of packed reference tokens of a record, all its references together."""
    sizes: tuple[Sizes, ...] = ()
    """Each record's; empty in folders from before they were kept."""
    captions: tuple[int, ...] = ()
    """Records of each example, in order, one for each of its captions; empty where all have one."""

    @property
    def examples(self) -> int:
        """Examples that the records are of."""
        return len(self.captions) or self.records


@dataclass(frozen=True)
class Metadata:
    """What a reader must know of a data set before it reads a record."""

    summary: ShardSummary
    shards: tuple[int, ...]
    """Records of each shard."""
    settings: dict[str, Any] = field(default_factory=dict)
    """How it was extracted: sizes, fingerprints of the encoders, chat-template settings."""
    codec: str = "bf16"
    """Of `CODECS`."""
    layers: tuple[int, ...] = ()
    """Which of the MLLM's hidden states the records hold, ascending, 0 = input embeddings."""

    @property
    def target_shapes(self) -> list[tuple[int, int, int]]:
        """Heights, widths and channels that targets' latents have."""
        height, width, channels = self.summary.shape.target
        if height is None or width is None:
            return [
                (*size, channels)
                for size in sorted({(one.height, one.width) for one in self.summary.sizes})
            ]
        return [(height, width, channels)]


def merge(summaries: Sequence[ShardSummary]) -> ShardSummary:
    """The summary of all records together.

    Raises ValueError where their shapes differ, InputError where there is no record.
    """
    summaries = [summary for summary in summaries if summary.records]
    if not summaries:
        raise InputError("there are no records: none of the rows could be used")
    shapes = {summary.shape for summary in summaries}
    if len(shapes) != 1:
        raise ValueError(
            f"records of one data set must share one shape, found {sorted(map(str, shapes))}"
        )
    largest = {f: max(getattr(s, f) for s in summaries) for f in MAXIMA}
    sizes = tuple(chain.from_iterable(s.sizes for s in summaries))
    return ShardSummary(
        records=sum(s.records for s in summaries),
        shape=shapes.pop(),
        sizes=sizes,
        captions=join_captions(summaries),
        **largest,
    )


def join_captions(summaries: Sequence[ShardSummary]) -> tuple[int, ...]:
    """The `captions` of all records together."""
    if not any(summary.captions for summary in summaries):
        return ()
    return tuple(chain.from_iterable(s.captions or (1,) * s.records for s in summaries))


MAXIMA = [f.name for f in fields(ShardSummary) if f.name.startswith("max_")]
EMPTY = ShardSummary(0, Shape(0, 0, (0, 0, 0)), 0, 0, 0, 0)
"""Of a shard of whose rows none could be used."""


def summarise(record: FeatureRecord, mixed: bool) -> ShardSummary:
    """Of one record; mixed: targets are of several sizes."""
    tokens = sum(r.shape[0] // PATCH * (r.shape[1] // PATCH) for r in record.references)
    (height, width, _), text, image = (
        record.target.shape,
        record.text.shape[1],
        record.image.shape[1],
    )
    sizes = Sizes(height, width, text, image, len(record.references), tokens)
    return ShardSummary(
        1, record_shape(record, mixed), text, image, len(record.references), tokens, (sizes,)
    )


def check_sizes(record: FeatureRecord, summary: ShardSummary) -> None:
    """Raises ValueError where a record's parts do not fit each other or the data set."""
    for states, positions in (
        (record.text, record.text_positions),
        (record.image, record.image_positions),
    ):
        if states.shape[1:] != (len(positions), summary.shape.width):
            raise ValueError(f"hidden states of shape {states.shape} of {len(positions)} tokens")
    own = summarise(record, mixed=True)
    for name in MAXIMA:
        if getattr(own, name) > getattr(summary, name):
            raise ValueError(f"{name} is {getattr(own, name)}, more than the data set's")


def summary_values(summary: ShardSummary) -> dict[str, Any]:
    """As JSON; where each example has one caption, as it was written before there were several."""
    values = asdict(summary)
    return values if summary.captions else {k: v for k, v in values.items() if k != "captions"}


def read_summary(value: dict[str, Any]) -> ShardSummary:
    """The inverse of `summary_values`. Raises KeyError, TypeError or ValueError for what no
    `summarise` has made."""
    shape = Shape(**{**value["shape"], "target": tuple(value["shape"]["target"])})
    sizes = tuple(Sizes(*one) for one in value.get("sizes", ()))
    captions = tuple(value.get("captions", ()))
    found = ShardSummary(**{**value, "shape": shape, "sizes": sizes, "captions": captions})
    height, width, channels = shape.target
    known = () if height is None and width is None else (height, width)
    check_counts(found.records, *(getattr(found, name) for name in MAXIMA), *captions)
    check_counts(shape.layers, shape.width, channels, *known, *chain.from_iterable(sizes))
    if sizes:
        largest = [max(column) for column in zip(*sizes)][2:]
        if len(sizes) != found.records or largest != [getattr(found, name) for name in MAXIMA]:
            raise ValueError("the sizes of its records do not fit what it says of all of them")
    if captions and (sum(captions) != found.records or min(captions) < 1):
        raise ValueError("the captions of its examples are not as many as its records")
    return found


def check_counts(*values: object) -> None:
    """Raises ValueError unless all are whole numbers from 0 to 2³¹ − 1."""
    found = np.asarray(values)
    if found.dtype.kind != "i" or (found.size and not 0 <= found.min() <= found.max() < 2**31):
        raise ValueError("a size or a count is no whole number, or out of range")
