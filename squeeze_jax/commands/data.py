"""`data describe`: what a source of examples holds, before anything is made of it."""

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from squeeze_jax.commands.run import check_finite, guarded, setup


@dataclass(frozen=True)
class Describe:
    """Counts a source's examples and what its filters leave out, measures captions and pictures.

    Reads labels and captions of all rows, and the pictures of 16 examples.
    """

    source: Annotated[str, tyro.conf.Positional]
    """FILE.json, FILE.jsonl, folder:DIR, subjects200k:DIR, uno1m:DIR or webdataset:DIR
    (docs/data.md)."""
    json: Path | None = None
    """Also writes what it found here."""
    sheet: Path = Path("contact_sheet.png")
    """Where the sheet of 16 examples is written: reference, target, caption."""
    config: Path | None = None
    """Preset whose tokenizer, limits and sizes count; none: full size, but the miniature's
    tokenizer, which makes about three times as many tokens of a text as InternVL3's."""
    min_score: float | None = None
    """Leave pairs out that were scored lower (UNO-1M: score_final; Subjects200K: any of three)."""
    image_root: str | None = None
    """Folder below which a list's pictures lie; none: the preset's, or the list's own."""
    limit: int | None = None
    """Take only so many of the first examples that pass."""


def main(arguments: list[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    known = ("describe", "-h", "--help")
    if not arguments or arguments[0] not in known:
        found = f"no command data {arguments[0]!r}; " if arguments else ""
        print(f"error: {found}write data describe SOURCE", file=sys.stderr)
        return 2
    rest = arguments[1:] if arguments[0] == "describe" else arguments
    given = tyro.cli(Describe, args=rest, prog="squeeze_jax data describe")
    return guarded(lambda: run(given))


def run(given: Describe) -> None:
    setup()
    from squeeze_jax.config import Config, load_preset
    from squeeze_jax.data.describe import describe
    from squeeze_jax.data.images import save_png
    from squeeze_jax.data.sources.contract import Options
    from squeeze_jax.errors import InputError
    from squeeze_jax.storage import write_beside

    if given.limit is not None and given.limit < 1:
        raise InputError(f"--limit {given.limit} must be at least 1")
    config = load_preset(given.config) if given.config else Config(name="describe")
    check_finite(given)
    image_root = given.image_root or config.data.image_root
    options = Options(given.min_score, given.limit, image_root=image_root)
    found, sheet = describe(given.source, options, config)
    print(f"{found.source}: {found.kept:,} of {found.examples:,} examples in {found.rows:,} rows")
    for reason, count in sorted(found.dropped.items(), key=lambda item: -item[1]):
        print(f"  left out: {count:,} {reason}")
    for line in [*found.problems, *found.unreadable, *found.warnings]:
        print(f"  {line}")
    if found.captions:
        captions = found.captions
        lengths = ", ".join(f"{name} {value}" for name, value in captions.tokens.items())
        print(
            f"captions: {lengths} tokens by the tokenizer of {captions.tokenizer}; "
            f"{captions.too_long:,} of {captions.measured:,} are over the limit of {captions.limit}"
        )
    for what, sizes in found.sizes.items():
        listed = ", ".join(f"{size} ({count})" for size, count in sizes.items())
        print(f"{what}s that were looked at: {listed or 'none'}")
    for kept, size in found.disk.items():
        print(f"records, {kept} hidden states: {size / 1e9:,.3f} GB before compression")
    if found.kept:
        save_png(given.sheet, sheet, {"source": found.source})
        print(f"contact sheet: {given.sheet}")
    if given.json is not None:
        values = dataclasses.asdict(found) | {
            "contact_sheet": str(given.sheet) if found.kept else None
        }
        text = json.dumps(values, indent=1) + "\n"
        try:
            given.json.parent.mkdir(parents=True, exist_ok=True)
            write_beside(given.json, lambda part: part.write_text(text, encoding="utf-8"))
        except OSError as error:
            raise InputError(f"--json {given.json}: cannot be written ({error})") from None
        print(f"description: {given.json}")
