"""Sources of examples: pictures and prompts as people keep them, each kind in a file of its own.

`contract.py` says what a source is. To add one: write a module with `open_rows`, and its row in
`KINDS`.
"""

from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from squeeze_jax.config import Config
from squeeze_jax.config_data import SOURCE_FIELDS
from squeeze_jax.data.sources.contract import Examples as Examples
from squeeze_jax.data.sources.contract import Opened, Options
from squeeze_jax.data.sources.listed import ManifestRows as ManifestRows
from squeeze_jax.errors import InputError

KINDS = {
    "subjects200k": "subjects200k",
    "uno1m": "uno1m",
    "folder": "image_folder",
    "webdataset": "webdataset",
}
"""What stands before the colon → its module here."""
SUFFIXES = {".json": "json_list", ".jsonl": "json_lines"}
"""What a file's name ends in → its module here."""
WRITTEN = "FILE.json, FILE.jsonl, " + ", ".join(f"{kind}:DIR" for kind in sorted(KINDS))
DRAWN = {
    "critters": "squeeze_jax.miniature.source",
    "emoji": "squeeze_jax.miniature.emoji.source",
}
"""The modules of `data.critters` and `data.emoji`."""


class Spec(NamedTuple):
    """A source as the command line and the config write it."""

    module: str
    path: Path


def parse_source(text: str) -> Spec:
    """Reads `FILE.json`, `uno1m:DIR`, … Raises InputError for an unknown kind, or a bare folder."""
    kind, colon, rest = text.partition(":")
    if colon and kind in KINDS:
        if not rest:
            raise InputError(f"source {text!r}: the folder is missing; write {kind}:DIR")
        return Spec(KINDS[kind], Path(rest))
    path = Path(text)
    if path.suffix.lower() in SUFFIXES:
        return Spec(SUFFIXES[path.suffix.lower()], path)
    if colon and not path.exists():
        near = get_close_matches(kind, KINDS, n=1)
        meant = f"did you mean {near[0]}:{rest}?" if near else f"write one of {WRITTEN}"
        raise InputError(f"source {text!r}: there is no kind {kind!r}; {meant}")
    if path.is_dir():
        raise InputError(f"{text}: a folder; say of what kind: one of {WRITTEN}")
    return Spec("json_list", path)  # a manifest may be named as its owner likes


def open_source(text: str, options: Options) -> Opened:
    """The examples of a source that pass. Raises InputError where there are none, or bad ones."""
    spec = parse_source(text)
    opened = import_module(f"{__name__}.{spec.module}").open_rows(spec.path, options)
    if not options.skip_bad:
        opened.report.refuse_bad(text)
    return opened


def source_of(config: Config) -> str | None:
    """The field of `data` that chooses the config's source; None: it has ready records alone."""
    return next((name for name in SOURCE_FIELDS if getattr(config.data, name) is not None), None)


def open_examples(config: Config, *, check_images: bool = True) -> dict[str, Examples]:
    """The examples `train` and `held_out` of a config; bad input raises InputError.

    check_images: decodes every picture that is a file of its own, and prints what is noteworthy.
    """
    name, data = source_of(config), config.data
    if name is None:
        fields = ", ".join(f"data.{name}" for name in SOURCE_FIELDS)
        raise InputError(f"no examples: set one of {fields}, or data.features or data.mix")
    if name in DRAWN:
        return import_module(DRAWN[name]).open_source(config, check_images=check_images)
    text: str = getattr(data, name)
    options = Options(data.min_score, data.limit, check_images, data.skip_bad, data.image_root)
    opened = open_source(text, options)
    if check_images:
        for line in opened.report.warnings:
            print(f"warning: {line}")
        if opened.report.dropped:
            print(f"{text}: {opened.report.summary()}")
    sources: dict[str, Examples] = split(opened, data.held_out, text)
    if data.long_captions == "cut":
        from squeeze_jax.data.captions import CutCaptions, caption_check

        fits = caption_check(config)
        sources = {name: CutCaptions(rows, fits) for name, rows in sources.items()}
    return sources


def split(opened: Opened, held_out: int, text: str) -> dict[str, Examples]:
    """Keeps `held_out` examples for validation, at most a tenth, and never half a row. Raises
    InputError where there are too few."""
    rows, count = opened.rows, len(opened.rows)
    held = min(held_out, max(1, count // 10))
    if opened.held_out_first:
        held = rows.row_end(held)
    if count <= held:
        raise InputError(
            f"{text}: {opened.report.summary()}, too few to train on; give at least 2 rows"
        )
    if opened.held_out_first:
        return {
            "train": rows.between(held, count, f"{rows.source} but the first {held}"),
            "held_out": rows.between(0, held, f"{rows.source} the first {held}"),
        }
    return {
        "train": rows.between(0, count - held, f"{rows.source} but the last {held}"),
        "held_out": rows.between(count - held, count, f"{rows.source} the last {held}"),
    }
