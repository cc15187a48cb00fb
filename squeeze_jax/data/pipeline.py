"""Feature records to training batches: shuffled for ever, shared out over processes, padded, prefetched (Grain).

The order of records is a function of (seed, process, batch number) alone, so an iterator's state is one number. Where
targets are of several sizes, every batch comes from one bucket (`buckets.py`), the same on every process.
"""

import json
import weakref
from collections.abc import Iterator, Sequence
from functools import lru_cache
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import grain
import ml_dtypes
import numpy as np
from absl import flags
from etils import epath

from squeeze_jax.data.buckets import Bucket, Padding, Turns, make_buckets, permutation, shapes, waste
from squeeze_jax.data.features import FeatureRecord, FeatureSource, ShardSummary
from squeeze_jax.diffusion.latents import PATCH, latent_grid, pack, reference_positions
from squeeze_jax.errors import InputError

if TYPE_CHECKING:
    from squeeze_jax.batch import TrainingBatch

Arrays = dict[str, np.ndarray]


def collate(records: Sequence[FeatureRecord], padding: Padding, with_grid: bool = False) -> Arrays:
    """Records with equally many target tokens as arrays padded to these lengths, whatever each record's own are.

    with_grid: each target's rows and columns are told, since they may differ. Every array has the leading axis B; hidden
    states are kept as the bits of bf16 in uint16 (`to_batch` names them), because workers hand arrays over in shared
    memory, which knows NumPy's types only.
    """
    count, (m, _, c) = len(records), records[0].text.shape
    lt, li, r = padding
    channels = PATCH * PATCH * records[0].target.shape[-1]
    arrays = {
        "index": np.array([record.number for record in records], np.int32),
        "target": np.stack([pack(record.target) for record in records]),
        "text": np.zeros((count, m, lt, c), np.uint16),
        "text_mask": np.zeros((count, lt), bool),
        "text_positions": np.zeros((count, lt), np.int32),
        "image": np.zeros((count, m, li, c), np.uint16),
        "image_mask": np.zeros((count, li), bool),
        "image_positions": np.zeros((count, li), np.int32),
        "references": np.zeros((count, r, channels), np.float32),
        "reference_mask": np.zeros((count, r), bool),
        "reference_positions": np.zeros((count, r, 2), np.int32),
    }
    if with_grid:
        arrays["grid"] = np.array([latent_grid(record.target) for record in records], np.int32)
    for i, record in enumerate(records):
        for name, states, positions in (
            ("text", record.text, record.text_positions),
            ("image", record.image, record.image_positions),
        ):
            length = states.shape[1]
            arrays[name][i, :, :length] = states.view(np.uint16)
            arrays[f"{name}_mask"][i, :length] = True
            arrays[f"{name}_positions"][i, :length] = positions
        grids = tuple(latent_grid(latent) for latent in record.references)
        positions = _positions(latent_grid(record.target), grids)
        arrays["reference_mask"][i, : len(positions)] = True
        arrays["reference_positions"][i, : len(positions)] = positions
        start = 0
        for latent, (rows, columns) in zip(record.references, grids, strict=True):
            arrays["references"][i, start : start + rows * columns] = pack(latent)
            start += rows * columns
    return arrays


_positions = lru_cache(maxsize=4096)(reference_positions)


def to_batch(arrays: Arrays) -> "TrainingBatch":
    """The arrays of `collate` under their names."""
    # Not at the top: the types import JAX, which data workers have no use for.
    from squeeze_jax.batch import HiddenStates, References, TrainingBatch

    return TrainingBatch(
        target=arrays["target"],
        hidden_states=HiddenStates(
            text=arrays["text"].view(ml_dtypes.bfloat16),
            text_mask=arrays["text_mask"],
            text_positions=arrays["text_positions"],
            image=arrays["image"].view(ml_dtypes.bfloat16),
            image_mask=arrays["image_mask"],
            image_positions=arrays["image_positions"],
        ),
        references=References(
            tokens=arrays["references"], mask=arrays["reference_mask"], positions=arrays["reference_positions"]
        ),
        index=arrays["index"],
        grid=arrays.get("grid"),
    )


Numbers = tuple[int, np.ndarray]
"""A bucket, and the numbers of some of its records."""


class _Order:
    """For Grain: the records of every batch of this process, by the batch's number."""

    def __init__(self, buckets: Sequence[Bucket], batch: int, seed: int, process_index: int, process_count: int):
        self.turns = Turns([len(bucket.records) for bucket in buckets], batch * process_count, seed)
        # Slice before the shuffle: after it, each epoch's shuffle would hand this process other records.
        self.own = [bucket.records[process_index::process_count] for bucket in buckets]
        self.batch, self.seed = batch, seed

    def __len__(self) -> int:
        return 2**48  # for ever

    def __getitem__(self, index: int) -> Numbers:
        bucket, batch = self.turns(int(index))
        own = self.own[bucket]
        epochs, places = np.divmod(np.arange(batch * self.batch, (batch + 1) * self.batch), len(own))
        orders = [permutation(len(own), self.seed, bucket, epoch) for epoch in epochs.tolist()]
        return bucket, own[[order[place] for order, place in zip(orders, places)]]


class _ReadBatch:
    """Record numbers to their padded arrays."""

    def __init__(self, source: FeatureSource, paddings: Sequence[Padding]):
        self.source, self.paddings = source, paddings
        self.with_grid = None in source.metadata.summary.shape.target

    def __call__(self, numbers: Numbers) -> Arrays:
        records = [self.source[number] for number in numbers[1].tolist()]
        return collate(records, self.paddings[numbers[0]], self.with_grid)


class _CachedBatch:
    """The same from memory: all of this process's records, padded once."""

    def __init__(self, read: _ReadBatch, own: Sequence[np.ndarray]):
        self.own = own
        self.arrays: list[Arrays] = []
        for bucket, numbers in enumerate(own):
            arrays: Arrays = {}
            for start in range(0, len(numbers), 256):
                for name, array in read((bucket, numbers[start : start + 256])).items():
                    if not start:
                        arrays[name] = np.empty((len(numbers), *array.shape[1:]), array.dtype)
                    arrays[name][start : start + len(array)] = array
            self.arrays.append(arrays)

    def __call__(self, numbers: Numbers) -> Arrays:
        bucket, wanted = numbers
        rows = np.searchsorted(self.own[bucket], wanted)
        return {name: array[rows] for name, array in self.arrays[bucket].items()}


class BatchIterator:
    """Training batches for ever. `get_state` and `set_state` continue exactly, also with other numbers of workers."""

    def __init__(
        self,
        source: FeatureSource,
        batches: grain.MapDataset,
        identity: dict[str, Any],
        prefetch: int,
        workers: int,
        buckets: Sequence[Bucket],
    ):
        self.source = source
        self.buckets = buckets
        self._batches = batches
        self._identity = identity
        self._prefetch = prefetch
        self._workers = workers
        self._drawn = 0
        self._running: list[grain.DatasetIterator] = []
        # Also at the interpreter's exit: Grain's iterators complain when they outlive Grain's modules.
        weakref.finalize(self, _end, self._running)

    @property
    def epoch(self) -> int:
        """Batches in which each record, of all processes, has come once."""
        rows = self._identity["batch"] * self._identity["process_count"]
        return sum(-(-len(bucket.records) // rows) for bucket in self.buckets)

    def describe(self) -> str:
        """Records, shapes of batches (each one compiled program) and the share of padding, for people."""
        sizes = self.source.metadata.summary.sizes
        padding = f", {100 * waste(self.buckets, sizes):.1f} % of their tokens padding" if sizes else ""
        count = shapes(self.buckets)
        return f"{len(self.source):,} records, {count} shape{'s' * (count > 1)} of batch{padding}"

    def __iter__(self) -> Iterator["TrainingBatch"]:
        return self

    def __next__(self) -> "TrainingBatch":
        if not self._running:
            self._running.append(self._start())
        arrays = next(self._running[0])
        if self._workers:  # out of the workers' shared memory, which goes away with them
            arrays = {name: np.array(array) for name, array in arrays.items()}
        self._drawn += 1
        return to_batch(arrays)

    def _start(self) -> grain.DatasetIterator:
        options = grain.ReadOptions(num_threads=self._prefetch, prefetch_buffer_size=self._prefetch)
        dataset = self._batches[self._drawn :].to_iter_dataset(options)
        if self._workers:
            if not flags.FLAGS.is_parsed():  # Grain asks for flags that only absl.app would parse
                flags.FLAGS.mark_as_parsed()
            options = grain.multiprocessing.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=1)
            dataset = dataset.mp_prefetch(options)
        return iter(dataset)

    def get_state(self) -> bytes:
        """The place after the last batch drawn, as JSON; the same on every process."""
        return json.dumps({**self._identity, "batches": self._drawn}).encode()

    def set_state(self, state: bytes) -> None:
        """Continues after the batch at which `state` was taken.

        Raises InputError where the state belongs to another data set, seed, batch size or number of processes, since
        records would then be left out or repeated.
        """
        try:
            there = json.loads(state)
            drawn = there.pop("batches")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"not the state of a data iterator: {state[:80]!r}") from error
        differing = [key for key in self._identity | there if there.get(key) != self._identity.get(key)]
        if differing:
            listed = ", ".join(f"{key} was {there.get(key)!r}, is {self._identity.get(key)!r}" for key in differing)
            raise InputError(f"the data iterator cannot be restored: {listed}; restore with what it was saved with")
        self.close()
        self._drawn = drawn

    def close(self) -> None:
        """Ends threads and workers; drawing again starts them."""
        _end(self._running)


def _end(running: list[grain.DatasetIterator]) -> None:
    while running:
        running.pop().close()


def make_dataset(
    feature_dir: epath.PathLike,
    *,
    batch: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    prefetch: int = 2,
    workers: int = 0,
    cache: bool = False,
    layers: Sequence[int] | None = None,
) -> BatchIterator:
    """Batches of `batch` records (on this process) from a folder of feature records, reshuffled every epoch.

    Epochs run into each other, so every batch is full however few records there are. prefetch: batches made ahead, each
    by a thread. workers: processes that make them instead; they are spawned, so the main script needs
    `if __name__ == "__main__"`. cache: reads all of this process's records into memory first. layers: the hidden states
    that batches hold, of those that the records do; None: all of these.
    Raises InputError where the folder is unfinished or damaged, lacks hidden states, has fewer records than processes, or
    where workers would each need the cache.
    """
    source = FeatureSource(feature_dir, layers)
    if len(source) < process_count:
        raise InputError(f"{feature_dir}: {len(source)} records are too few for {process_count} processes")
    if cache and workers:
        raise InputError(f"records cached in memory are not for {workers} workers to copy; use one or the other")
    buckets = buckets_of(source.metadata.summary, batch, process_count)
    # Numbers are batched, not records, so that Grain's own work is a batch's, not a record's.
    order = _Order(buckets, batch, seed, process_index, process_count)
    read = _ReadBatch(source, [bucket.padding for bucket in buckets])
    if cache:
        read = _CachedBatch(read, order.own)
    metadata = source.metadata
    described = (metadata.shards, metadata.settings, metadata.codec, metadata.layers)
    identity = {
        "version": 2,
        "records": len(source),
        "data": sha256(repr(described).encode()).hexdigest()[:16],
        "seed": seed,
        "batch": batch,
        "process_count": process_count,
    }
    return BatchIterator(source, grain.MapDataset.source(order).map(read), identity, prefetch, workers, buckets)


def buckets_of(summary: ShardSummary, batch: int, process_count: int) -> tuple[Bucket, ...]:
    """The buckets of a data set: one for all records where their targets are of one size."""
    height, width, _ = summary.shape.target
    if height is None or width is None:
        return make_buckets(summary.sizes, batch, process_count)
    padding = Padding(summary.max_text, summary.max_image, summary.max_reference_tokens)
    return (Bucket(np.arange(summary.records), height // PATCH * (width // PATCH), padding),)
