"""`FILE.jsonl`: one object a line, each as a row of a JSON list (`data/manifest.py`)."""

import json
from collections.abc import Iterator
from pathlib import Path

from squeeze_jax.data.manifest import Unreadable, check_rows, read_text_file, root_of
from squeeze_jax.data.sources.contract import Opened, Options, refuse_scores
from squeeze_jax.data.sources.listed import opened
from squeeze_jax.errors import InputError


def open_rows(path: Path, options: Options) -> Opened:
    """Rows of a file with a JSON object a line."""
    refuse_scores(options, "JSON lines")
    content = read_text_file(path, "give the path of a file of JSON lines")
    manifest = check_rows(
        path,
        root_of(path.parent, options.image_root),
        parse_lines(path, content),
        content,
        need_targets=True,
        check_images=options.check_images,
        skip_bad=options.skip_bad,
        limit=options.limit,
    )
    return opened("lines", manifest)


def parse_lines(path: Path, content: bytes) -> Iterator[tuple[int, object]]:
    """Each line's number, from 1, and its value; `Unreadable` where it is no JSON.

    Blank lines are passed over. Raises InputError where no line is left.
    """
    found = False
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        if not line.strip():
            continue
        found = True
        try:
            yield number, json.loads(line.decode())
        except UnicodeDecodeError as error:
            yield number, Unreadable(f"is not UTF-8 text (byte {error.start}); save it as UTF-8")
        except (ValueError, RecursionError) as error:
            yield number, Unreadable(f"is not JSON ({error}); write one object a line")
    if not found:
        raise InputError(f"{path}: it has no lines; write at least one object")
