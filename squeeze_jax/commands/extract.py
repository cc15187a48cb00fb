"""`extract`: a source of examples to feature records."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro
from etils import epath

from squeeze_jax.commands.run import guarded, parse_shard, setup


@dataclass(frozen=True)
class Extract:
    """Runs the frozen encoders over a source and writes feature records; started again, it goes on.

    Any field of the preset can be overridden, as in train (`--data.long-captions cut`).
    """

    source: Annotated[str, tyro.conf.Positional]
    """FILE.json, FILE.jsonl, folder:DIR, subjects200k:DIR, uno1m:DIR or webdataset:DIR
    (docs/data.md)."""
    out: epath.Path
    """Folder for the records, also gs://bucket/…: train and held_out below it."""
    config: Path
    """Preset whose encoders and sizes to use."""
    shard: str = "0/1"
    """i/n: this process does every n-th shard from i."""
    min_score: float | None = None
    """Leave pairs out that were scored lower (UNO-1M: score_final; Subjects200K: any of three)."""
    limit: int | None = None
    """Take only so many of the first examples that pass."""
    skip_bad: bool = False
    """Leave rows out that cannot be used, and list them, instead of refusing the source."""


def main(arguments: list[str] | None = None) -> int:
    given, overrides = tyro.cli(
        Extract,
        args=sys.argv[1:] if arguments is None else arguments,
        prog="squeeze_jax extract",
        return_unknown_args=True,
    )
    return guarded(lambda: run(given, overrides))


def run(given: Extract, overrides: list[str]) -> None:
    setup()
    from squeeze_jax.config import load_preset, override
    from squeeze_jax.data.extraction import extract_features

    shard = parse_shard(given.shard)
    config = override(load_preset(given.config), overrides, "squeeze_jax extract")
    data = config.data
    config = replace(
        config,
        data=replace(
            data,
            source=given.source,
            manifest=None,
            critters=None,
            emoji=None,
            min_score=data.min_score if given.min_score is None else given.min_score,
            limit=data.limit if given.limit is None else given.limit,
            skip_bad=given.skip_bad or data.skip_bad,
        ),
    )
    extract_features(config, given.out, shard=shard)
    print(f"records: {given.out}")
