"""Files that appear whole or not at all, on disks and in object storage, whoever else writes the
same one."""

import json
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from etils import epath

from squeeze_jax.errors import InputError

PART = ".part"
"""Ends the name of what is still being written; a killed writer leaves it behind."""


def is_remote(path: epath.Path) -> bool:
    """Whether a path lies in object storage (`gs://bucket/…`)."""
    return "://" in str(path)


def reachable(path: epath.PathLike) -> epath.Path:
    """The path, once what its storage needs is there. Raises InputError where that is not
    installed."""
    path = epath.Path(path)
    try:
        path.exists()
    except ImportError as error:
        raise InputError(
            f"{path}: {error}; install it with pip install 'squeeze_jax[gcs]'"
        ) from None
    return path


def write_whole(path: epath.Path, write: Callable[[Path], object]) -> None:
    """Lets `write` make a local file, which then becomes `path`.

    On a disk the file lies beside `path` under a name of its own and is renamed. In object storage,
    where a rename is a copy and random writes do not exist, it is made in the local temporary
    folder and uploaded: an object appears whole.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / path.name
            write(local)
            epath.Path(local).copy(path, overwrite=True)
        return
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{PART}")
    try:
        write(Path(part))
        part.replace(path)
    except FileNotFoundError:
        # Another process that makes the same file was faster, and has tidied up (`remove_parts`).
        if part.exists() or not path.exists():
            raise
    finally:
        part.unlink(missing_ok=True)


def write_json(path: epath.Path, value: Any) -> None:
    """The value as JSON, its fields one a line."""
    text = ",\n".join(
        f" {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in value.items()
    )
    write_whole(path, lambda part: part.write_text(f"{{\n{text}\n}}\n", encoding="utf-8"))


def remove_parts(folder: epath.Path) -> None:
    """Removes what killed writers left in a folder that nobody writes to any more."""
    for path in folder.iterdir():
        if path.name.endswith(PART):
            path.unlink(missing_ok=True)
