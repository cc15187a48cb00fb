"""The frozen encoders' pass over a data set: what `extract` does, and `train` before it begins."""

import json
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from itertools import chain
from typing import Any

from etils import epath
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from squeeze_jax.config import Config, DataConfig
from squeeze_jax.data.captions import CutCaptions
from squeeze_jax.data.feature_extractor import FeatureExtractor
from squeeze_jax.data.mllm import MLLM
from squeeze_jax.data.record_writer import (
    Example,
    RowError,
    differing,
    extract,
    own_slices,
    sizes_and_codec,
)
from squeeze_jax.data.records import METADATA_FILE, read_metadata, shard_summary
from squeeze_jax.data.sources import Examples, open_examples
from squeeze_jax.data.sources.contract import (
    captions_of,
    most_captions,
    most_references,
    parts_of,
)
from squeeze_jax.errors import InputError
from squeeze_jax.folder_lock import hold
from squeeze_jax.storage import reachable

MOST_ROWS, MOST_BYTES = 1024, 2 * 2**30
"""Of a shard: rows, and about how large it may become (a record alone: its format's limit). A
killed extraction repeats one shard."""
TEXT, IMAGE = 64, 256
"""Tokens of a row that this reckons with: of its prompt, and of each tile of a reference."""


def rows_of_shard(config: Config, layers: int, references: int = 1, captions: int = 1) -> int:
    """Rows of a shard of records that keep that many hidden states.

    1,024, fewer where records are large. references, captions: most of a row, which has a record
    for each caption.
    Raises InputError where a record would be larger than its format allows.
    """
    tiles = config.data.tiles_per_reference
    tokens = TEXT + IMAGE * tiles * max(1, references)
    row = layers * tokens * config.aggregator.width * (1 if config.data.codec == "int8" else 2)
    if row >= MOST_BYTES:
        raise InputError(
            f"a record of {references} references in up to {tiles} tiles would take "
            f"{row / 2**30:.1f} GiB, more than 2; "
            "lower data.max_tiles, or set data.keep read or data.codec int8"
        )
    return max(1, min(MOST_ROWS, MOST_BYTES // (row * captions)))


def check_prompts(
    sources: dict[str, Examples], reader: MLLM, own: Callable[[Examples], Iterable[int]]
) -> None:
    """Raises InputError that lists the prompts which the MLLM cannot read, before any is.

    own: the numbers of those examples whose prompts are looked at.
    """
    bad = []
    for rows in sources.values():
        if rows.prompts_are_valid:
            continue
        for index in own(rows):
            try:
                check_captions(rows, index, reader)
            except RowError as error:
                bad.append(str(error))
    if bad:
        more = [f"and {len(bad) - 20} more"] if len(bad) > 20 else []
        raise InputError("\n  ".join([f"{len(bad)} prompts cannot be read:", *bad[:20], *more]))


def check_captions(rows: Examples, index: int, reader: MLLM) -> None:
    """Raises RowError, which names the example, where the MLLM cannot read one of its captions."""
    captions = captions_of(rows, index)
    for number, caption in enumerate(captions, 1):
        try:
            reader.check(caption, rows.references(index))
        except InputError as error:
            which = f" caption {number}" if len(captions) > 1 else ""
            raise RowError(f"{rows.name(index)}{which}: {error}") from None


class Readable:
    """Examples of which one whose prompt the MLLM cannot read is a bad row."""

    def __init__(self, rows: Examples, reader: MLLM) -> None:
        self.rows, self.reader = rows, reader

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        check_captions(self.rows, index, self.reader)
        return self.rows[index]


def text_settings(data: DataConfig) -> dict[str, Any]:
    """What a folder notes of how captions are limited."""
    noted: dict[str, Any] = {"max_text_tokens": data.max_text_tokens}
    return noted | ({"long_captions": "cut"} if data.long_captions == "cut" else {})


def is_extracted(config: Config, sources: dict[str, Examples], out: epath.Path) -> bool:
    """Whether `out` holds the finished records of these rows, by what it notes of them."""
    data, layers = config.data, config.aggregator.reads if config.data.keep == "read" else None
    own = text_settings(data) | sizes_and_codec(
        (data.height, data.width), data.buckets, data.reference_long_side, data.codec, layers
    )
    for split, rows in sources.items():
        if not (out / split / METADATA_FILE).exists():
            return False
        metadata = read_metadata(out / split)
        noted, shards = metadata.settings, len(metadata.shards)
        if any(shard_summary(out / split, shard, shards) is None for shard in range(shards)):
            return False  # one was deleted, as a damaged record's message says
        wanted = json.loads(json.dumps(own | {"rows": len(rows), "source": rows.source}))
        if set(differing(noted, wanted)) - {"encoders", "examples_per_shard"}:
            return False
    return True


def extract_features(
    config: Config, out: epath.PathLike, *, shard: tuple[int, int] = (0, 1)
) -> None:
    """Writes `out`/train and `out`/held_out; finished shards are kept: a killed extraction goes on.

    Where all is there, neither pictures nor encoders are looked at.
    Raises InputError that lists what cannot be read, or where another process is at this shard.
    """
    out, data = reachable(out), config.data
    if is_extracted(config, open_examples(config, check_images=False), out):
        return
    sources = open_examples(config)
    encoders = FeatureExtractor.of(config)
    reader = encoders.reader
    layers = config.aggregator.reads if data.keep == "read" else None
    most = max(most_references(rows) for rows in sources.values())
    captions = max(most_captions(rows) for rows in sources.values())
    rows_a_shard = rows_of_shard(config, len(layers or range(reader.layers + 1)), most, captions)

    def own(rows: Examples) -> Iterable[int]:
        """A list's prompts are all checked; of one in parts, those that this process reads."""
        parts = parts_of(rows)
        if parts is None:
            return range(len(rows))
        mine = own_slices(rows, parts, rows_a_shard, shard)
        return chain.from_iterable(range(first, last) for _, (first, last, _) in mine)

    if not data.skip_bad:
        check_prompts(sources, reader, own)
    with hold_shard(out, shard), progress() as bar:

        def say_skipped(error: RowError) -> None:
            bar.console.print(
                f"warning: skipped {error}", markup=False, highlight=False, soft_wrap=True
            )

        for split, rows in sources.items():
            task = bar.add_task(f"extracting {split}", total=len(rows))
            metadata = extract(
                Readable(rows, reader) if data.skip_bad else rows,
                encoders,
                out / split,
                target_size=(data.height, data.width),
                buckets=data.buckets,
                reference_long_side=data.reference_long_side,
                examples_per_shard=rows_a_shard,
                batch=data.extract_batch,
                shard=shard,
                source=rows.source,
                codec=data.codec,
                layers=layers,
                parts=parts_of(rows),
                noted=text_settings(data),
                skip=say_skipped if data.skip_bad else None,
                progress=lambda done, total, task=task: bar.update(
                    task, completed=done, total=total
                ),
            )
            if metadata is not None and (missing := len(rows) - metadata.summary.examples):
                print(f"{split}: {missing:,} of {len(rows):,} examples could not be read")
            if isinstance(rows, CutCaptions) and rows.cut:
                print(
                    f"{split}: {rows.cut:,} of {rows.read:,} captions that were read are cut at a "
                    "sentence's end"
                )


def hold_shard(out: epath.Path, shard: tuple[int, int]) -> AbstractContextManager[None]:
    """One process a shard; a bucket has no locks."""
    out.mkdir(parents=True, exist_ok=True)
    index, count = shard
    return hold(out / f".extract-{index}-of-{count}.lock", "an extraction of this shard")


def progress() -> Progress:
    """A bar on the terminal: what, how many of how many, the time that is left."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    )
