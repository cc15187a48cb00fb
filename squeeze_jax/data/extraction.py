"""The frozen encoders' pass over a data set: what `extract` does, and `train` before it begins."""

import json

from etils import epath
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from squeeze_jax.config import Config
from squeeze_jax.data.feature_extractor import FeatureExtractor
from squeeze_jax.data.mllm import MLLM
from squeeze_jax.data.record_writer import extract, sizes_and_codec
from squeeze_jax.data.records import METADATA_FILE, read_metadata, shard_summary
from squeeze_jax.data.sources import Examples, open_examples
from squeeze_jax.data.storage import reachable
from squeeze_jax.errors import InputError

MOST_ROWS, MOST_BYTES = 1024, 2 * 2**30
"""Of a shard: rows, and about how large it may become (a record alone: its format's limit). A killed extraction repeats one
shard."""
TEXT, IMAGE = 64, 256
"""Tokens of a row that this reckons with: of its prompt, and of each tile of a reference."""


def rows_of_shard(config: Config, layers: int, references: int = 1) -> int:
    """Rows of a shard of records that keep that many hidden states: 1,024, fewer where records are large.

    references: most of a row. Raises InputError where a record would be larger than its format allows.
    """
    tiles = config.data.tiles_per_reference
    tokens = TEXT + IMAGE * tiles * max(1, references)
    row = layers * tokens * config.aggregator.width * (1 if config.data.codec == "int8" else 2)
    if row >= MOST_BYTES:
        raise InputError(
            f"a record of {references} references in up to {tiles} tiles would take {row / 2**30:.1f} GiB, more than 2; "
            "lower data.max_tiles, or set data.keep read or data.codec int8"
        )
    return max(1, min(MOST_ROWS, MOST_BYTES // row))


def check_prompts(sources: dict[str, Examples], reader: MLLM) -> None:
    """Raises InputError that lists the prompts which the MLLM cannot read, before any is."""
    bad = []
    for rows in sources.values():
        if rows.prompts_are_valid:
            continue
        for index in range(len(rows)):
            try:
                reader.check(rows.prompt(index), rows.references(index))
            except InputError as error:
                bad.append(f"{rows.name(index)}: {error}")
    if bad:
        more = [f"and {len(bad) - 20} more"] if len(bad) > 20 else []
        raise InputError("\n  ".join([f"{len(bad)} prompts cannot be read:", *bad[:20], *more]))


def is_extracted(config: Config, sources: dict[str, Examples], out: epath.Path) -> bool:
    """Whether `out` holds the finished records of these rows, by what it notes of them."""
    data, layers = config.data, config.aggregator.reads if config.data.keep == "read" else None
    own = sizes_and_codec((data.height, data.width), data.buckets, data.reference_long_side, data.codec, layers)
    for split, rows in sources.items():
        if not (out / split / METADATA_FILE).exists():
            return False
        metadata = read_metadata(out / split)
        noted, shards = metadata.settings, len(metadata.shards)
        if any(shard_summary(out / split, shard, shards) is None for shard in range(shards)):
            return False  # one was deleted, as a damaged record's message says
        wanted = json.loads(json.dumps(own | {"rows": len(rows), "source": rows.source}))
        if wanted != {name: value for name, value in noted.items() if name not in ("encoders", "examples_per_shard")}:
            return False
    return True


def extract_features(
    config: Config, out: epath.PathLike, *, shard: tuple[int, int] = (0, 1)
) -> None:
    """Writes `out`/train and `out`/held_out; finished shards are kept, so a killed extraction goes on.

    Where all is there, neither pictures nor encoders are looked at. Raises InputError that lists what cannot be read.
    """
    out = reachable(out)
    if is_extracted(config, open_examples(config, check_images=False), out):
        return
    sources = open_examples(config)
    encoders = FeatureExtractor.of(config)
    check_prompts(sources, encoders.reader)
    layers = config.aggregator.reads if config.data.keep == "read" else None
    most = max(rows.references(index) for rows in sources.values() for index in range(len(rows)))
    kept = len(layers or range(encoders.reader.layers + 1))
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
                examples_per_shard=rows_of_shard(config, kept, most),
                batch=config.data.extract_batch,
                shard=shard,
                source=rows.source,
                codec=config.data.codec,
                layers=layers,
                progress=lambda done, total, task=task: bar.update(task, completed=done, total=total),
            )


def progress() -> Progress:
    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
