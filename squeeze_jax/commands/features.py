"""The frozen encoders' pass over a data set: what `extract` does, and `train` before it begins."""

from pathlib import Path

from etils import epath
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from squeeze_jax.config import Config
from squeeze_jax.data.encoders import FrozenEncoders
from squeeze_jax.data.extract import extract
from squeeze_jax.data.manifest import read_manifest
from squeeze_jax.data.sources import CritterRows, ManifestRows
from squeeze_jax.data.storage import reachable
from squeeze_jax.errors import InputError

MOST_ROWS, MOST_BYTES, TOKENS = 1024, 2 * 2**30, 320
"""Of a shard: rows, and about how large it may become at that many tokens a row. A killed extraction repeats one shard."""


def row_sources(config: Config, manifest: Path | None = None) -> dict[str, CritterRows | ManifestRows]:
    """Rows to train on and held-out rows, whichever the config's source is. A bad manifest raises before anything runs."""
    manifest = manifest or (Path(config.data.manifest) if config.data.manifest else None)
    if manifest is not None:
        checked = read_manifest(manifest, need_targets=True)
        for warning in checked.warnings:
            print(f"warning: {warning}")
        held_out = min(config.data.held_out, max(1, len(checked.rows) // 10))
        if len(checked.rows) <= held_out:
            raise InputError(f"{manifest}: {len(checked.rows)} row is too few to train on; give at least 2")
        digest = f"manifest {checked.digest}"
        return {
            "train": ManifestRows(checked.rows[:-held_out], f"{digest} but the last {held_out}"),
            "held_out": ManifestRows(checked.rows[-held_out:], f"{digest} the last {held_out}"),
        }
    if config.data.critters is not None:
        return {
            "train": CritterRows(config.data.critters, "train"),
            "held_out": CritterRows(config.data.critters, "held_out"),
        }
    raise InputError("no examples: set data.manifest, data.critters or data.features")


def rows_of_shard(config: Config, layers: int) -> int:
    """Rows of a shard of records that keep that many hidden states: 1,024, fewer where records are large."""
    row = layers * TOKENS * config.aggregator.width * (1 if config.data.codec == "int8" else 2)
    return max(1, min(MOST_ROWS, MOST_BYTES // row))


def extract_features(
    config: Config, out: epath.PathLike, *, manifest: Path | None = None, shard: tuple[int, int] = (0, 1)
) -> None:
    """Writes `out`/train and `out`/held_out; finished shards are kept, so a killed extraction goes on."""
    out, sources = reachable(out), row_sources(config, manifest)
    encoders = FrozenEncoders.of(config)
    layers = config.aggregator.reads if config.data.keep == "read" else None
    with progress() as bar:
        for split, rows in sources.items():
            task = bar.add_task(f"extracting {split}", total=len(rows))
            extract(
                rows,
                encoders,
                out / split,
                target_size=(config.data.height, config.data.width),
                buckets=config.data.buckets,
                reference_long_side=config.data.reference_long_side,
                examples_per_shard=rows_of_shard(config, len(layers or range(encoders.reader.layers + 1))),
                batch=config.data.extract_batch,
                shard=shard,
                source=rows.source,
                codec=config.data.codec,
                layers=layers,
                progress=lambda done, total, task=task: bar.update(task, completed=done, total=total),
            )


def progress() -> Progress:
    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
