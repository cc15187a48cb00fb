"""`extract`: a manifest to feature records."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro
from etils import epath

from squeeze_jax.commands.run import guarded, setup


@dataclass(frozen=True)
class Extract:
    """Runs the frozen encoders over a manifest and writes feature records; started again, it continues."""

    manifest: Annotated[Path, tyro.conf.Positional]
    """JSON list of rows with `prompt`, `image_paths`, `image_tgt_path`, relative to the file."""
    out: epath.Path
    """Folder for the records, also gs://bucket/…: train and held_out below it."""
    config: Path
    """Preset whose encoders and sizes to use."""
    shard: str = "0/1"
    """i/n: this process does every n-th shard from i."""
    skip_bad: bool = False
    """Leave rows out that cannot be used, and list them, instead of refusing the manifest."""


def main(arguments: list[str] | None = None) -> int:
    given = tyro.cli(Extract, args=sys.argv[1:] if arguments is None else arguments, prog="squeeze_jax extract")
    return guarded(lambda: run(given))


def run(given: Extract) -> None:
    setup()
    from squeeze_jax.config import load_preset
    from squeeze_jax.data.extraction import extract_features
    from squeeze_jax.errors import InputError

    try:
        part, parts = (int(number) for number in given.shard.split("/"))
    except ValueError:
        raise InputError(f"--shard {given.shard!r} must be i/n, such as 0/4") from None
    config = load_preset(given.config)
    data = replace(
        config.data, manifest=str(given.manifest), critters=None, skip_bad=given.skip_bad or config.data.skip_bad
    )
    config = replace(config, data=data)
    extract_features(config, given.out, shard=(part, parts))
    print(f"records: {given.out}")
