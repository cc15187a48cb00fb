"""Feature records to training batches: shuffled for ever, shared out over processes, padded,
prefetched (Grain).

Which records make up a global batch is a function of (seed, batch number) alone (`order.py`), so an
iterator's state is one number, and one process, two or eight make the same batches: each reads the
rows that lie on its devices. Where targets are of several sizes, every batch comes from one bucket
(`buckets.py`).
"""

import json
import weakref
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from os import PathLike
from typing import TYPE_CHECKING, Any

import grain
import ml_dtypes
import numpy as np
from absl import flags
from etils import epath

from squeeze_jax.data.buckets import (
    Bucket,
    Padding,
    first_records,
    make_buckets,
    shapes,
    waste,
)
from squeeze_jax.data.mixture import Mixture, Weighted
from squeeze_jax.data.order import Numbers, Order
from squeeze_jax.data.record_format import FeatureRecord
from squeeze_jax.data.record_summary import ShardSummary
from squeeze_jax.data.records import FeatureSource
from squeeze_jax.diffusion.latents import (
    PATCH,
    ReferencePositions,
    latent_grid,
    pack,
    pack_references,
    reference_positions,
)
from squeeze_jax.errors import InputError

if TYPE_CHECKING:
    from squeeze_jax.batch import TrainingBatch

Arrays = dict[str, np.ndarray]


def collate(
    records: Sequence[FeatureRecord],
    padding: Padding,
    with_grid: bool = False,
    positions_of: ReferencePositions = reference_positions,
) -> Arrays:
    """Records with equally many target tokens as arrays padded to these lengths, whatever each
    record's own are.

    with_grid: each target's rows and columns are told, since they may differ. Every array has the
    leading axis B; hidden states are kept as the bits of bf16 in uint16 (`to_batch` names them),
    because workers hand arrays over in shared memory, which knows NumPy's types only.
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
    }
    grids = [latent_grid(record.target) for record in records]
    if with_grid:
        arrays["grid"] = np.array(grids, np.int32)
    latents = [record.references for record in records]
    references = pack_references(latents, grids, r, channels, positions_of)
    arrays |= zip(("references", "reference_mask", "reference_positions"), references)
    for i, record in enumerate(records):
        for name, states, positions in (
            ("text", record.text, record.text_positions),
            ("image", record.image, record.image_positions),
        ):
            length = states.shape[1]
            arrays[name][i, :, :length] = states.view(np.uint16)
            arrays[f"{name}_mask"][i, :length] = True
            arrays[f"{name}_positions"][i, :length] = positions
    return arrays


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
            tokens=arrays["references"],
            mask=arrays["reference_mask"],
            positions=arrays["reference_positions"],
        ),
        index=arrays["index"],
        grid=arrays.get("grid"),
    )


class _ReadBatch:
    """Record numbers to their padded arrays."""

    def __init__(
        self,
        source: Mixture,
        paddings: Sequence[Padding],
        with_grid: bool,
        positions_of: ReferencePositions,
    ) -> None:
        self.source, self.paddings, self.positions_of = source, paddings, positions_of
        self.with_grid = with_grid

    def __call__(self, numbers: Numbers) -> Arrays:
        records = [self.source[number] for number in numbers[1].tolist()]
        return collate(records, self.paddings[numbers[0]], self.with_grid, self.positions_of)


class BatchIterator:
    """Training batches for ever.

    `get_state` and `set_state` continue exactly, also with other numbers of workers and processes.
    """

    def __init__(
        self,
        batches: grain.MapDataset,
        identity: dict[str, Any],
        prefetch: int,
        workers: int,
        buckets: Sequence[Bucket],
        finish: Callable[[Arrays], Any],
        about: str,
    ):
        """finish: arrays to a batch under its names. about: what `describe` says."""
        self.buckets = buckets
        self._finish, self._about = finish, about
        self._batches = batches
        self._identity = identity
        self._prefetch = prefetch
        self._workers = workers
        self._drawn = 0
        self._running: list[grain.DatasetIterator] = []
        # Also at the interpreter's exit: Grain's iterators complain when they outlive Grain's
        # modules.
        weakref.finalize(self, _end, self._running)

    @property
    def epoch(self) -> int:
        """Batches in which about as many examples have come as there are."""
        return sum(-(-len(bucket.records) // self._identity["batch"]) for bucket in self.buckets)

    @property
    def records(self) -> int:
        """Of the whole data set."""
        return self._identity["records"]

    def describe(self) -> str:
        """What is read, in one line for people."""
        return self._about

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if not self._running:
            self._running.append(self._start())
        arrays = next(self._running[0])
        if self._workers:  # out of the workers' shared memory, which goes away with them
            arrays = {name: np.array(array) for name, array in arrays.items()}
        self._drawn += 1
        return self._finish(arrays)

    def _start(self) -> grain.DatasetIterator:
        options = grain.ReadOptions(num_threads=self._prefetch, prefetch_buffer_size=self._prefetch)
        dataset = self._batches[self._drawn :].to_iter_dataset(options)
        if self._workers:
            if not flags.FLAGS.is_parsed():  # Grain asks for flags that only absl.app would parse
                flags.FLAGS.mark_as_parsed()
            options = grain.multiprocessing.MultiprocessingOptions(
                num_workers=self._workers, per_worker_buffer_size=1
            )
            dataset = dataset.mp_prefetch(options)
        return iter(dataset)

    def get_state(self) -> bytes:
        """The place after the last batch drawn, as JSON; the same on every process."""
        return json.dumps({**self._identity, "batches": self._drawn}).encode()

    def set_state(self, state: bytes) -> None:
        """Continues after the batch at which `state` was taken.

        Raises InputError where the state belongs to another data set, seed or batch size, since
        records would then be left out or repeated.
        """
        try:
            there = json.loads(state)
            drawn = there.pop("batches")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"not the state of a data iterator: {state[:80]!r}") from error
        differing = [
            key for key in self._identity | there if there.get(key) != self._identity.get(key)
        ]
        if differing:
            listed = ", ".join(
                f"{key} was {there.get(key)!r}, is {self._identity.get(key)!r}" for key in differing
            )
            raise InputError(
                f"the data iterator cannot be restored: {listed}; restore with what it was saved "
                "with"
            )
        self.close()
        self._drawn = drawn

    def skip(self, batches: int) -> None:
        """Leaves so many batches out; none of them is read."""
        self.close()
        self._drawn += batches

    def close(self) -> None:
        """Ends threads and workers; drawing again starts them."""
        _end(self._running)


def _end(running: list[grain.DatasetIterator]) -> None:
    while running:
        running.pop().close()


def make_dataset(
    features: epath.PathLike | Weighted,
    *,
    batch: int,
    seed: int,
    rows: Sequence[int] | np.ndarray | None = None,
    prefetch: int = 2,
    workers: int = 0,
    layers: Sequence[int] | None = None,
    positions_of: ReferencePositions = reference_positions,
) -> BatchIterator:
    """Batches of `batch` records from a folder of feature records, reshuffled every epoch.

    Of several folders with weights, each has its share of the rows, and epochs of its own.
    Epochs run into each other, so every batch is full however few records there are. rows [n]:
    those of every batch that this process reads (0 .. batch − 1, in order); None: all. prefetch:
    batches made ahead, each by a thread. workers: processes that make them instead; they are spawned, so
    the main script needs `if __name__ == "__main__"`. layers: the hidden states that batches hold,
    of those that the records do; None: all of these. positions_of: where reference
    tokens stand, by the backbone's config; FLUX.1's way by default.
    Raises InputError where the folder is unfinished or damaged, or lacks hidden states.
    """
    folders = [(features, 1.0)] if isinstance(features, (str, PathLike)) else features
    mixture = Mixture(folders, layers)
    summary = mixture.summary()
    buckets = buckets_of(summary, batch)
    # Numbers are batched, not records, so that Grain's own work is a batch's, not a record's.
    own = np.arange(batch) if rows is None else np.asarray(rows)
    order = Order(buckets, batch, seed, own, mixture.starts, mixture.weights)
    paddings = [bucket.padding for bucket in buckets]
    read = _ReadBatch(mixture, paddings, None in summary.shape.target, positions_of)
    identity = {
        "version": 2,
        "records": len(mixture),
        "data": " ".join(map(_digest, mixture.sources)),
        "seed": seed,
        "batch": batch,
    }
    if len(folders) > 1:  # their proportion decides the order
        identity["weights"] = [weight / sum(mixture.weights) for weight in mixture.weights]
    batches = grain.MapDataset.source(order).map(read)
    return BatchIterator(
        batches, identity, prefetch, workers, buckets, to_batch, describe(summary, buckets)
    )


def _digest(source: FeatureSource) -> str:
    """Tells records apart by how they were made."""
    metadata = source.metadata
    described = (metadata.shards, metadata.settings, metadata.codec, metadata.layers)
    return sha256(repr(described).encode()).hexdigest()[:16]


def describe(summary: ShardSummary, buckets: Sequence[Bucket]) -> str:
    """Records, shapes of batches (each one compiled program) and the share of padding."""
    sizes, count = summary.sizes, shapes(buckets)
    padding = f", {100 * waste(buckets, sizes):.1f} % of their tokens padding" if sizes else ""
    of = f" of {summary.examples:,} examples" if summary.captions else ""
    return f"{summary.records:,} records{of}, {count} shape{'s' * (count > 1)} of batch{padding}"


def buckets_of(summary: ShardSummary, batch: int) -> tuple[Bucket, ...]:
    """The buckets of a data set: one for all records where their targets are of one size."""
    height, width, _ = summary.shape.target
    if height is None or width is None:
        return make_buckets(summary.sizes, batch, summary.captions)
    padding = Padding(summary.max_text, summary.max_image, summary.max_reference_tokens)
    first, captions = np.arange(summary.records), None
    if summary.captions:
        first, captions = first_records(summary.captions), np.array(summary.captions)
    return (Bucket(first, height // PATCH * (width // PATCH), padding, captions),)
