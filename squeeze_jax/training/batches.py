"""What a run trains and validates on: batches of feature records or of examples."""

from collections.abc import Mapping
from contextlib import closing

from etils import epath
from jax.sharding import Mesh

from squeeze_jax.config import Config
from squeeze_jax.data.check_records import check_records
from squeeze_jax.data.mixture import record_folders
from squeeze_jax.data.online import make_online
from squeeze_jax.data.pipeline import BatchIterator, make_dataset
from squeeze_jax.data.sources import Examples
from squeeze_jax.errors import InputError
from squeeze_jax.processes import local_rows, put_local_rows
from squeeze_jax.sharding import batch_sharding
from squeeze_jax.training.step import Batch

MAX_HELD_OUT = 128
"""Most held-out examples that validation looks at (our decision), always the same ones; some of the
last batch may come twice."""


def make_batches(
    features: epath.PathLike,
    examples: Mapping[str, Examples] | None,
    config: Config,
    mesh: Mesh,
    rows: int,
) -> tuple[BatchIterator, list[Batch]]:
    """Training batches of `rows` examples, for ever, and all validation batches, on the mesh.

    They come from the records in `features`/train and `features`/held_out, or from those folders of
    `data.mix`; where `examples` are given, from those of these two names. Each process reads the
    rows that lie on its devices.
    Raises InputError where records are missing or do not fit the config.
    """
    folders, sharding = record_folders(config.data, features), batch_sharding(mesh)

    def open_split(split: str, rows: int, seed: int, workers: int) -> BatchIterator:
        own = local_rows(sharding, rows)
        if examples is not None:
            return make_online(examples[split], config, batch=rows, seed=seed, own=own)
        return make_dataset(
            [(folder / split, weight) for folder, weight in folders],
            batch=rows,
            rows=own,
            seed=seed,
            workers=workers,
            layers=config.aggregator.reads,
            positions_of=config.model.dit.reference_positions,
        )

    for folder, _ in folders if examples is None else ():
        if not (folder / "held_out").is_dir():
            raise InputError(f"{folder / 'held_out'}: no held-out records; extract them too")
        for split in ("train", "held_out"):
            check_records(folder / split, config)
    data = open_split("train", rows, config.training.seed, config.data.workers)
    fewer = rows // config.optimizer.accumulate
    with closing(open_split("held_out", fewer, 0, 0)) as held_out:
        count = min(held_out.epoch, max(-(-MAX_HELD_OUT // fewer), len(held_out.buckets)))
        return data, [put_local_rows(next(held_out), sharding, fewer) for _ in range(count)]
