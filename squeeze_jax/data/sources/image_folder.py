"""`folder:DIR`: pictures beside a `metadata.jsonl` or `metadata.csv` (Hugging Face's image folder).

    {"file_name": "sofa.png", "reference_file_name": "cat.png", "text": "a cat on a sofa"}

The target is `file_name`, the caption `text`, `prompt` or `caption`. References are all columns
that begin with `reference` and end in `file_name` (one path) or `file_names` (a list, not in CSV),
in the order of the columns. Other columns are ignored. Paths begin at the folder.
"""

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from squeeze_jax.data.manifest import Unreadable, check_rows, read_text_file, root_of
from squeeze_jax.data.sources.contract import Opened, Options, refuse_scores
from squeeze_jax.data.sources.json_lines import parse_lines
from squeeze_jax.data.sources.listed import opened
from squeeze_jax.errors import InputError

CAPTIONS = ("text", "prompt", "caption")
METADATA = ("metadata.jsonl", "metadata.csv")


def open_rows(path: Path, options: Options) -> Opened:
    """Rows of a folder's metadata file (CSV or JSON lines). Raises InputError where there is not
    one."""
    refuse_scores(options, "an image folder")
    found = [path / name for name in METADATA if (path / name).is_file()]
    if len(found) != 1:
        both = "both a metadata.jsonl and a metadata.csv; leave one"
        neither = "no metadata.jsonl or metadata.csv in it that says which pictures belong together"
        raise InputError(f"{path}: {both if found else neither}")
    content = read_text_file(found[0], "")
    lines = parse_lines if found[0].suffix == ".jsonl" else parse_table
    rows = ((number, as_manifest_row(value)) for number, value in lines(found[0], content))
    manifest = check_rows(
        found[0],
        root_of(path, options.image_root),
        rows,
        content,
        need_targets=True,
        check_images=options.check_images,
        skip_bad=options.skip_bad,
        limit=options.limit,
    )
    return opened("folder", manifest)


def parse_table(path: Path, content: bytes) -> Iterator[tuple[int, object]]:
    """Each row of a CSV file below its header, with its number from 1, empty cells left out. Raises
    InputError where it is no table, or empty."""
    try:
        table = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
        count = 0
        for count, row in enumerate(table, 1):
            cells = {name: cell for name, cell in row.items() if name and cell}
            yield count, Unreadable("has more cells than the header") if None in row else cells
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from error
    except csv.Error as error:
        raise InputError(f"{path}: not a CSV table ({error}); correct it there") from error
    if not count:
        raise InputError(f"{path}: it has no rows; write at least one below the header")


def as_manifest_row(value: object) -> object:
    """The row as a JSON list writes it (`data/manifest.py`), which then says what is wrong with
    it."""
    if not isinstance(value, dict):
        return value
    if "file_name" not in value:
        return Unreadable('"file_name" is missing; name the picture to learn')
    references: list[object] = []
    for name, content in value.items():
        if str(name).startswith("reference") and str(name).endswith(("file_name", "file_names")):
            references += content if isinstance(content, list) else [content]
    if not references:
        return Unreadable(
            "has no reference_file_name; name a picture of the subject: a target that is its own "
            "reference teaches copying"
        )
    row = {"image_paths": references, "image_tgt_path": value["file_name"]}
    caption = next((name for name in CAPTIONS if name in value), None)
    if caption is None:
        return Unreadable(f"has no caption; write one under {', '.join(CAPTIONS)}")
    return row | {"prompt": value[caption]}
