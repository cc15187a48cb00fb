"""Feature records to training batches: shuffled for ever, shared out over processes, padded, prefetched (Grain).

The order of records is a function of (seed, process, batch number) alone, so an iterator's state is one number.
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

from squeeze_jax.data.features import FeatureRecord, FeatureSource, ShardSummary
from squeeze_jax.diffusion.latents import latent_grid, pack, reference_positions
from squeeze_jax.errors import InputError

if TYPE_CHECKING:
    from squeeze_jax.batch import TrainingBatch

Arrays = dict[str, np.ndarray]


def collate(records: Sequence[FeatureRecord], sizes: ShardSummary) -> Arrays:
    """Records of one data set as padded arrays of its largest sizes, whatever each record's own are.

    Every array has the leading axis B; hidden states are kept as the bits of bf16 in uint16 (`to_batch` names them),
    because workers hand arrays over in shared memory, which knows NumPy's types only.
    """
    count, (m, _, c) = len(records), records[0].text.shape
    lt, li, r = sizes.max_text, sizes.max_image, sizes.max_reference_tokens
    channels = 4 * sizes.shape.target[-1]
    arrays = {
        "index": np.array([record.number for record in records], np.int32),
        "target": pack(np.stack([record.target for record in records])),
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
    )


class _ReadBatch:
    """Record numbers to their padded arrays."""

    def __init__(self, source: FeatureSource):
        self.source = source

    def __call__(self, numbers: np.ndarray) -> Arrays:
        return collate([self.source[number] for number in numbers.tolist()], self.source.metadata.summary)


class _CachedBatch:
    """The same from memory: all of this process's records, padded once."""

    def __init__(self, source: FeatureSource, numbers: range):
        self.numbers = numbers
        self.arrays: Arrays = {}
        read = _ReadBatch(source)
        for start in range(0, len(numbers), 256):
            part = read(np.array(numbers[start : start + 256]))
            for name, array in part.items():
                if not start:
                    self.arrays[name] = np.empty((len(numbers), *array.shape[1:]), array.dtype)
                self.arrays[name][start : start + len(array)] = array

    def __call__(self, numbers: np.ndarray) -> Arrays:
        rows = (numbers - self.numbers.start) // self.numbers.step
        return {name: array[rows] for name, array in self.arrays.items()}


class BatchIterator:
    """Training batches for ever. `get_state` and `set_state` continue exactly, also with other numbers of workers."""

    def __init__(
        self, source: FeatureSource, batches: grain.MapDataset, identity: dict[str, Any], prefetch: int, workers: int
    ):
        self.source = source
        self._batches = batches
        self._identity = identity
        self._prefetch = prefetch
        self._workers = workers
        self._drawn = 0
        self._running: list[grain.DatasetIterator] = []
        # Also at the interpreter's exit: Grain's iterators complain when they outlive Grain's modules.
        weakref.finalize(self, _end, self._running)

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
    # Slice before the shuffle: after it, each epoch's shuffle would hand this process other records.
    numbers = grain.MapDataset.range(len(source))[process_index::process_count]
    # Numbers are batched, not records, so that Grain's own work is a batch's, not a record's. Nothing remains to be
    # dropped, but without saying so Grain computes the endless length in floating point, which overflows at batch 1.
    own = range(process_index, len(source), process_count)
    read = _CachedBatch(source, own) if cache else _ReadBatch(source)
    batches = numbers.shuffle(seed=seed).repeat().batch(batch, drop_remainder=True).map(read)
    identity = {
        "version": 1,
        "records": len(source),
        "data": sha256(repr(source.metadata).encode()).hexdigest()[:16],
        "seed": seed,
        "batch": batch,
        "process_count": process_count,
    }
    return BatchIterator(source, batches, identity, prefetch, workers)
