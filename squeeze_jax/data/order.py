"""Which records make up a batch: a function of (seed, batch number) alone.

A batch comes from one bucket. Its rows come from record folders in proportion to their weights
(`data.mix`), and of each folder every example once before one comes again, in a new order each time
(an epoch of that folder). Of an example with several captions an epoch draws one.

No JAX is imported here, since data workers run this file.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from squeeze_jax.data.buckets import Bucket, BucketSchedule, permutation, random_bits

Numbers = tuple[int, np.ndarray]
"""A bucket, and the numbers of some of its records."""
SHARE, BLOCK = 2**20, 2**10
"""Shares of folders are whole numbers of SHARE. Within BLOCK rows of a bucket each folder has its
share, to one row."""
TURNS, CAPTIONS = 1, 2
"""What tells these draws from the orders of epochs, whose keys are shorter."""


class Stream:
    """The examples of one folder in one bucket, epoch behind epoch."""

    def __init__(
        self,
        records: Int[np.ndarray, " examples"],
        captions: Int[np.ndarray, " examples"] | None,
        *key: int,
    ) -> None:
        """key: the seed, the bucket, the folder."""
        self.records, self.captions, self.key = records, captions, key
        self._epochs: dict[int, np.ndarray] = {}

    def __call__(self, places: Int[np.ndarray, " rows"]) -> Int[np.ndarray, " rows"]:
        """The records at some places of the stream, 0 the first that is ever drawn."""
        epochs, within = np.divmod(places, len(self.records))
        return np.array(
            [self._epoch(epoch)[place] for epoch, place in zip(epochs.tolist(), within.tolist())],
            np.int64,
        )

    def _epoch(self, epoch: int) -> Int[np.ndarray, " examples"]:
        """The records of an epoch in order. The last two are kept: batches run over their
        border."""
        found = self._epochs.get(epoch)
        if found is None:
            seed, bucket, folder = self.key
            order = permutation(len(self.records), seed, bucket, epoch, folder)
            found = self.records[order]
            if self.captions is not None:
                bits = random_bits(len(order), seed, bucket, epoch, folder, CAPTIONS)
                found = found + (bits % self.captions.astype(np.uint64)).astype(np.int64)[order]
            self._epochs = {**dict(list(self._epochs.items())[-1:]), epoch: found}
        return found

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_epochs": {}}


class Order:
    """For Grain: the records that this process reads of every batch, by the batch's number."""

    def __init__(
        self,
        buckets: Sequence[Bucket],
        batch: int,
        seed: int,
        rows: np.ndarray,
        starts: Sequence[int] = (0,),
        weights: Sequence[float] = (1.0,),
    ) -> None:
        """rows: those of a batch that this process reads. starts: the number of each folder's first
        record; weights: how often each folder's examples come, in proportion.
        """
        self.batch, self.rows = batch, rows
        ends = [*starts[1:], np.iinfo(np.int64).max]
        inside = [
            [(b.records >= start) & (b.records < end) for start, end in zip(starts, ends)]
            for b in buckets
        ]
        counts = np.array([[own.sum() for own in of_bucket] for of_bucket in inside])
        # How many examples of each folder a bucket has in an epoch of the mix, in which as many
        # come as there are. With one folder these are its own numbers.
        shares = counts / counts.sum(axis=0) * (weights / np.sum(weights)) * counts.sum()
        scale = SHARE if len(weights) > 1 else 1
        self.turns = BucketSchedule(_whole(shares.sum(axis=1) * scale), batch * scale, seed)
        self.streams: list[list[Stream]] = []
        self.folders: list[BucketSchedule] = []
        for number, (bucket, of_bucket) in enumerate(zip(buckets, inside)):
            there = [folder for folder, count in enumerate(counts[number]) if count]
            captions = bucket.captions
            self.streams.append(
                [
                    Stream(
                        bucket.records[of_bucket[folder]],
                        None if captions is None else captions[of_bucket[folder]],
                        *(seed, number, folder),
                    )
                    for folder in there
                ]
            )
            of_folders = shares[number, there] / shares[number].sum() * SHARE
            turns = BucketSchedule(_whole(of_folders), SHARE // BLOCK, seed, number, 0, 0, TURNS)
            self.folders.append(turns)

    def __len__(self) -> int:
        return 2**48  # for ever

    def __getitem__(self, index: int) -> Numbers:
        bucket, batch = self.turns(int(index))
        # Epochs run into each other. Processes share out the rows of a shuffled batch: slicing the
        # records after a shuffle instead would hand a process other records in every epoch.
        places = [
            self.folders[bucket](place) for place in (batch * self.batch + self.rows).tolist()
        ]
        folders, places = np.array(places, np.int64).reshape(-1, 2).T
        records = np.empty_like(places)
        for folder, stream in enumerate(self.streams[bucket]):
            own = folders == folder
            records[own] = stream(places[own])
        return bucket, records


def _whole(shares: np.ndarray) -> list[int]:
    """Shares as whole numbers, none of them 0."""
    return [max(1, round(share)) for share in shares.tolist()]
