"""Buckets: records whose batches have one shape, and which bucket a step draws from.

A batch's shape is its target's tokens and what text, image and reference tokens are padded to.
Records of mixed sizes go through a small, fixed set of shapes that is known before training, from
the metadata alone: one bucket for each number of target tokens and of references, padded to its own
largest. Pictures of 512 x 768 and 768 x 512 share a bucket, since each row of a batch carries its
target's grid.

Which bucket a step draws from is a function of (seed, step), the same on every process.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt64

from squeeze_jax.diffusion.latents import PATCH


class Sizes(NamedTuple):
    """How large one record is."""

    height: int
    """Of the target's latent."""
    width: int
    text: int
    """Text tokens of the MLLM."""
    image: int
    """Image tokens of the MLLM."""
    references: int
    """How many."""
    reference_tokens: int
    """Packed tokens of all references together."""


class Padding(NamedTuple):
    """How many tokens there are after padding: text and image tokens of the MLLM, packed ones of
    references."""

    text: int
    image: int
    references: int


@dataclass(frozen=True)
class Bucket:
    """Records whose batches have one shape."""

    records: Int[np.ndarray, " records"]
    """Their numbers in the data set, ascending; of examples with several captions the first."""
    target: int
    """Tokens of each of their targets."""
    padding: Padding
    captions: Int[np.ndarray, " records"] | None = None
    """How many records follow each other from there, one for each caption; None: always one."""

    @property
    def tokens(self) -> int:
        """Tokens that the transformer sees for a record, padding included."""
        return self.target + sum(self.padding)


def first_records(captions: Sequence[int]) -> Int[np.ndarray, " examples"]:
    """The number of each example's first record."""
    return np.cumsum([0, *captions[:-1]])


def make_buckets(
    sizes: Sequence[Sizes], batch: int, captions: Sequence[int] = ()
) -> tuple[Bucket, ...]:
    """Buckets of a data set, by target tokens and number of references.

    captions: records of each example, in order, which are of one bucket; empty: one of each.
    A bucket with fewer records than a step takes joins its neighbour of the same target tokens with
    more references, or with fewer where there is none: a program compiled for a handful of records
    costs more than the padding.
    """
    table = np.array(sizes, np.int64).reshape(len(sizes), len(Sizes._fields))
    first, counts = np.arange(len(sizes)), None
    if captions:  # an example is as large as its longest caption makes it
        first, counts = first_records(captions), np.array(captions)
        table = np.maximum.reduceat(table, first, axis=0)
    targets = table[:, 0] // PATCH * (table[:, 1] // PATCH)
    buckets = []
    for target in np.unique(targets).tolist():
        groups: list[np.ndarray] = []
        for references in np.unique(table[targets == target, 4]).tolist():
            own = np.flatnonzero((targets == target) & (table[:, 4] == references))
            if groups and len(groups[-1]) < batch:
                own = np.sort(np.concatenate([groups.pop(), own]))
            groups.append(own)
        if len(groups) > 1 and len(groups[-1]) < batch:
            groups[-2:] = [np.sort(np.concatenate(groups[-2:]))]
        for own in groups:
            text, image, _, reference_tokens = table[own, 2:].max(axis=0).tolist()
            padding = Padding(text, image, reference_tokens)
            of_own = None if counts is None else counts[own]
            buckets.append(Bucket(first[own], target, padding, of_own))
    return tuple(buckets)


def shapes(buckets: Sequence[Bucket]) -> int:
    """Distinct shapes of batches: how often the train step is compiled."""
    return len({(bucket.target, bucket.padding) for bucket in buckets})


def waste(buckets: Sequence[Bucket], sizes: Sequence[Sizes]) -> float:
    """The share of all tokens that is padding, 0 to 1, when every record comes once."""
    counts = [len(b.records) if b.captions is None else int(b.captions.sum()) for b in buckets]
    padded = sum(count * bucket.tokens for count, bucket in zip(counts, buckets))
    table = np.array(sizes, np.int64).reshape(len(sizes), len(Sizes._fields))
    used = (
        table[:, 0] // PATCH * (table[:, 1] // PATCH) + table[:, 2] + table[:, 3] + table[:, 5]
    ).sum()
    return 1.0 - float(used) / padded


class BucketSchedule:
    """Whose turn it is at each step, and how often it had been before.

    Epoch e holds the batches of each bucket that begin in its own epoch e, in an order of (key,
    e); a bucket's last batch runs into its next epoch. So each comes in proportion to its records,
    for ever.
    """

    def __init__(self, counts: Sequence[int], rows: int, *key: int) -> None:
        """counts: each bucket's records; rows: of a step; key: the seed."""
        self.counts, self.rows, self.key = tuple(counts), rows, key

    def before(self, epoch: int) -> list[int]:
        """Each bucket's batches in the epochs before."""
        return [-(-epoch * count // self.rows) for count in self.counts]

    def __call__(self, step: int) -> tuple[int, int]:
        """The bucket of a step, and which of its batches comes."""
        if len(self.counts) == 1:
            return 0, step
        epoch = (
            step * self.rows // sum(self.counts)
        )  # never too early, since batches are rounded up
        while sum(self.before(epoch)) > step:
            epoch -= 1
        order, earlier = _epoch(self.counts, self.rows, self.key, epoch)
        place = step - sum(self.before(epoch))
        bucket = int(order[place])
        return bucket, self.before(epoch)[bucket] + int(earlier[place])


def random_bits(count: int, *key: int) -> UInt64[np.ndarray, " count"]:
    """Bits that follow from the key alone, the same from every version of NumPy."""
    return np.random.Philox(np.random.SeedSequence([part % 2**32 for part in key])).random_raw(
        count
    )


def permutation(count: int, *key: int) -> Int[np.ndarray, " count"]:
    """0 .. count − 1 in an order of the key alone.

    Grain's own shuffle of a handful of records takes 10 ms each, since it searches among 65,536.
    """
    return np.argsort(random_bits(count, *key), kind="stable")


@lru_cache(maxsize=16)
def _epoch(
    counts: tuple[int, ...], rows: int, key: tuple[int, ...], epoch: int
) -> tuple[np.ndarray, np.ndarray]:
    """The buckets of an epoch's batches in order, and how often each had come before in this
    epoch."""
    turns = BucketSchedule(counts, rows, *key)
    batches = [
        after - before for after, before in zip(turns.before(epoch + 1), turns.before(epoch))
    ]
    order = np.repeat(np.arange(len(counts)), batches)[permutation(sum(batches), *key, epoch)]
    earlier = np.empty_like(order)
    for bucket in range(len(counts)):
        own = order == bucket
        earlier[own] = np.arange(own.sum())
    return order, earlier
