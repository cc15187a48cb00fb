"""The manifest: a JSON list of examples as UNO writes it, with paths relative to the file
(or to `data.image_root`).

    [{"prompt": "a cat on a sofa", "image_paths": ["cat.png"], "image_tgt_path": "sofa.png"}, …]

`prompt` may be a list of several captions of the target: training draws one an epoch, sampling
takes the first. `image_paths` may be empty (text only) and `image_tgt_path` left out where nothing
is learned from it. Further keys are ignored if they are named `critter` or begin with `x_`; any
other is taken for a misspelling.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from squeeze_jax.data.images import load_image
from squeeze_jax.errors import InputError, printable

FIELDS = ("prompt", "image_paths", "image_tgt_path")


class Row(NamedTuple):
    """One example; paths are absolute and lie inside the folder of pictures."""

    number: int
    """Place in the file, from 1."""
    prompt: str
    references: tuple[Path, ...]
    target: Path | None
    extra: dict[str, Any]
    """The keys `critter` and `x_…`."""
    other_captions: tuple[str, ...] = ()
    """Behind `prompt`, where the file lists several."""


class Unreadable(NamedTuple):
    """Stands for a row that could not be parsed."""

    problem: str


class Manifest(NamedTuple):
    """A validated manifest."""

    path: Path
    rows: list[Row]
    warnings: list[str]
    """What is allowed but probably not meant, and rows that were skipped; for the command to
    print."""
    digest: str
    """SHA-256 of the file and of its pictures' sizes in bytes: a picture that was replaced is
    another data set."""
    looked_at: int
    """Rows that were validated, good and bad."""


def read_manifest(
    path: str | Path,
    *,
    need_targets: bool,
    check_images: bool = True,
    skip_bad: bool = False,
    limit: int | None = None,
    image_root: str | Path | None = None,
) -> Manifest:
    """Reads and validates a manifest before anything is made of it.

    need_targets: training learns from targets; sampling and evaluation do without. check_images:
    decodes every picture once, since a truncated file opens without complaint. skip_bad: leaves bad
    rows out, each with a warning. limit: looks at no more rows once so many are good.
    image_root: the folder below which all pictures lie, absolute paths among them, and where
    relative ones begin; None: the manifest's own.
    Raises InputError that lists every bad row with its number, the file or value, and the remedy.
    """
    path = Path(path)
    content = read_text_file(path, "give the path of a manifest (a JSON list)")
    values = enumerate(_rows(path, content), 1)
    return check_rows(
        path,
        root_of(path.parent, image_root),
        values,
        content,
        need_targets=need_targets,
        check_images=check_images,
        skip_bad=skip_bad,
        limit=limit,
    )


def root_of(folder: Path, image_root: str | Path | None) -> Path:
    """The folder of a list's pictures. Raises InputError where there is none."""
    root = folder if image_root is None else Path(image_root)
    if not root.is_dir():
        raise InputError(f"data.image_root {root}: no such folder; give the one of the pictures")
    return root


def check_rows(
    path: Path,
    folder: Path,
    values: Iterable[tuple[int, object]],
    content: bytes,
    *,
    need_targets: bool,
    check_images: bool,
    skip_bad: bool,
    limit: int | None = None,
) -> Manifest:
    """Validates rows that a file lists as `read_manifest` does, whatever its format.

    path: the file, for messages. folder: where their paths begin. values: each row with the number
    that messages give it; `Unreadable` for one that could not be parsed. content: of the file.
    Raises InputError that names the bad rows.
    """
    rows: list[Row] = []
    warnings: list[str] = []
    problems: list[str] = []
    decoded: dict[Path, str | None] = {}
    seen: dict[Any, int] = {}
    bad_rows = count = 0
    for number, value in values:
        if len(rows) == limit:
            break
        count += 1
        row, bad = _row(number, value, folder, need_targets)
        if row is not None and check_images:
            bad = [*bad, *_undecodable(row, decoded)]
        if bad or row is None:
            bad_rows += 1
            problems += [printable(f"row {number}: {problem}") for problem in bad]
            continue
        rows.append(row)
        same = (row.prompt, row.other_captions, row.references, row.target)
        if same in seen:
            warnings.append(
                f"row {number}: the same as row {seen[same]}; the last rows are held out of "
                "training"
            )
        seen.setdefault(same, number)
        if row.target is not None and any(_same_bytes(r, row.target) for r in row.references):
            warnings.append(
                f"row {number}: reference and target are the same picture ({row.target.name}); "
                "such pairs teach copying"
            )
    if problems and not (skip_bad and rows):
        raise InputError(
            "\n  ".join([f"{path}: {bad_rows} of {count} rows cannot be used:", *problems])
        )
    if problems:
        warnings.append(f"skipped {bad_rows} of {count} rows")
        warnings += [f"skipped {problem}" for problem in problems]
    return Manifest(path, rows, warnings, _digest(content, rows), count)


def _digest(content: bytes, rows: list[Row]) -> str:
    digest = hashlib.sha256(content)
    for row in rows:
        for path in [*row.references, *([row.target] if row.target else [])]:
            digest.update(path.stat().st_size.to_bytes(8, "little"))
    return digest.hexdigest()


def read_text_file(path: Path, wanted: str) -> bytes:
    """The bytes of a file. Raises InputError where there is none; `wanted` ends that sentence."""
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise InputError(f"{path}: {found}; {wanted}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None


def _rows(path: Path, content: bytes) -> list[Any]:
    try:
        values = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from error
    except json.JSONDecodeError as error:
        hint = "correct it there"
        if error.msg == "Extra data":
            hint = "write one JSON list, not one object a line, or name the file .jsonl"
        raise InputError(
            f"{path}: not JSON, line {error.lineno} column {error.colno}: {error.msg}; {hint}"
        ) from error
    except RecursionError as error:
        raise InputError(f"{path}: nested too deeply; a manifest is a JSON list of rows") from error
    except ValueError as error:  # a number of thousands of digits
        raise InputError(f"{path}: not JSON ({error}); correct it there") from error
    if not isinstance(values, list):
        raise InputError(f"{path}: holds {_kind(values)}; a manifest is a JSON list of rows")
    if not values:
        raise InputError(f"{path}: the list is empty; add at least one row")
    return values


def _row(number: int, value: Any, folder: Path, need_target: bool) -> tuple[Row | None, list[str]]:
    """The row, as far as its paths can be used, and everything that is wrong with it."""
    if isinstance(value, Unreadable):
        return None, [value.problem]
    if not isinstance(value, dict):
        return None, [f"is {_kind(value)}; write an object with {', '.join(FIELDS)}"]
    meant, bad = _unknown_fields(value)
    captions: list[str] = []
    if "prompt" in value:
        captions, problems = _captions(value["prompt"])
        bad += problems
    elif "prompt" not in meant:
        bad.append('"prompt" is missing; say what the picture shows')

    names = value.get("image_paths")
    if "image_paths" not in value:
        if "image_paths" not in meant:
            bad.append('"image_paths" is missing; write [] for text only')
    elif not isinstance(names, list):
        bad.append(f'"image_paths" is {_kind(names)}; write a list of paths, [] for text only')
    references = names if isinstance(names, list) else []
    target = value.get("image_tgt_path")
    if target is None and need_target and "image_tgt_path" not in meant:
        bad.append('"image_tgt_path" is missing; training needs the picture to learn')

    found: list[Path] = []
    named = [(f"image_paths[{place}]", name) for place, name in enumerate(references)]
    named += [] if target is None else [("image_tgt_path", target)]
    for place, name in named:
        resolved, problem = _resolve(folder, name)
        if resolved is None:
            bad.append(f"{place} {problem}")
        else:
            found.append(resolved)
    if len(found) != len(named) or not captions:
        return None, bad
    extra = {key: content for key, content in value.items() if key not in FIELDS}
    pictures = found[: len(references)]
    picture = found[-1] if target is not None else None
    return Row(number, captions[0], tuple(pictures), picture, extra, tuple(captions[1:])), bad


def _captions(value: object) -> tuple[list[str], list[str]]:
    """The captions of a row, and what is wrong with them."""
    if isinstance(value, list) and not value:
        return [], ['"prompt" is an empty list; write at least one caption']
    named = [('"prompt"', value)]
    if isinstance(value, list):
        named = [(f'"prompt"[{place}]', one) for place, one in enumerate(value)]
    captions, bad = [], []
    for name, one in named:
        if not isinstance(one, str):
            bad.append(f"{name} is {_kind(one)}; write a string")
            continue
        if not one.strip():
            bad.append(f"{name} is empty; say what the picture shows")
        captions.append(one)
    return captions if len(captions) == len(named) else [], bad


def _unknown_fields(value: dict[str, Any]) -> tuple[set[str], list[str]]:
    """The fields that misspelled ones probably mean, and what is wrong with each unknown one."""
    meant, bad = set(), []
    for key in value:
        if key in FIELDS or key == "critter" or key.startswith("x_"):
            continue
        near = get_close_matches(key, FIELDS, n=1)
        meant.update(near)
        remedy = (
            f'did you mean "{near[0]}"?' if near else "start the names of your own fields with x_"
        )
        bad.append(f'unknown field "{key}"; {remedy}')
    return meant, bad


def _resolve(folder: Path, name: Any) -> tuple[Path | None, str]:
    """The file that a path names, or what is wrong with it."""
    if not isinstance(name, str) or not name:
        return (
            None,
            f"is {_kind(name) if not isinstance(name, str) else 'empty'}; write the path of a "
            "picture",
        )
    try:
        resolved = (folder / name).resolve()
        if not resolved.is_relative_to(folder.resolve()):
            return (
                None,
                f'"{name}" leads out of the folder of pictures {folder}; move the picture into it, '
                "or name a folder that holds them all: --data.image-root DIR",
            )
        if not resolved.is_file():
            return None, f'"{name}": no such file in {folder}; paths are relative to it'
    except (OSError, ValueError) as error:  # a null byte, a name that is too long, a loop of links
        return None, f'"{name}" is not a usable path ({error}); correct it'
    return resolved, ""


def _undecodable(row: Row, decoded: dict[Path, str | None]) -> Iterator[str]:
    for path in [*row.references, *([row.target] if row.target else [])]:
        if path not in decoded:
            try:
                load_image(path)
                decoded[path] = None
            except InputError as error:
                decoded[path] = str(error)
        problem = decoded[path]
        if problem:
            yield problem


def _same_bytes(one: Path, other: Path) -> bool:
    same_size = one.stat().st_size == other.stat().st_size
    return one == other or (same_size and one.read_bytes() == other.read_bytes())


def _kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "a truth value",
        type(None): "null",
    }
    return names.get(type(value), "a number")
