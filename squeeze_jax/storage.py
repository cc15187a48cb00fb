"""Paths on disks and in object storage: files that appear whole or not at all, whoever else writes
the same one, and files that grow.

In object storage there is no rename and no append. What is made there is made in the local
temporary folder first and uploaded: an object appears whole.
"""

import json
import queue
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import fsspec.config
from etils import epath

from squeeze_jax.errors import InputError, OutputError, first_line

AnyPath: TypeAlias = Path | epath.Path
"""On a disk (`Path`), or in object storage (`epath.Path`)."""

PART = ".part"
"""Ends the name of what is still being written; a killed writer leaves it behind."""

PATIENCE = 10.0
"""Seconds within which object storage has to answer at first (our decision). Its libraries try
again for 40 seconds and longer where there is no network."""

LATE = 60.0
"""Seconds after which a program says what it waits for (our decision)."""

Answer = TypeVar("Answer")


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path lies in object storage (`gs://bucket/…`)."""
    return "://" in str(path)


def as_path(path: epath.PathLike) -> AnyPath:
    """The path of a folder that exists or will be made; object storage has answered. Raises
    InputError where it does not (`reachable`)."""
    return reachable(path) if is_remote(path) else Path(path)


def reachable(path: epath.PathLike) -> epath.Path:
    """The path, once its storage has answered. Raises InputError where that does not happen or
    its library is not installed."""
    path = epath.Path(path)
    if is_remote(path):
        # What other processes write is seen at once: listings are not kept.
        for name in ("gs", "gcs"):
            fsspec.config.conf.setdefault(name, {}).setdefault("use_listings_cache", False)
        ask_in_time(path, path.exists)
    return path


def ask_in_time(path: epath.PathLike, ask: Callable[[], Answer]) -> Answer:
    """What `ask` finds out about a path. Raises InputError where object storage does not answer
    within `PATIENCE`; `ask` then goes on in a thread of its own that nobody waits for."""
    if not is_remote(path):
        return ask()
    answers: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put((ask(), None))
        except Exception as error:
            answers.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    mend = (
        "see to the network, to the bucket's name and to the credentials (gcloud auth "
        "application-default login), or give a path on a disk"
    )
    try:
        answer, error = answers.get(timeout=PATIENCE)
    except queue.Empty:
        raise InputError(f"{path}: no answer within {PATIENCE:g} s; {mend}") from None
    if isinstance(error, ImportError):
        raise InputError(f"{path}: {error}; install it with pip install 'squeeze_jax[gcs]'")
    if isinstance(error, OSError):
        raise InputError(f"{path}: cannot be reached ({first_line(error)}); {mend}") from error
    if error is not None:
        raise error
    return answer


@contextmanager
def spoken_waiting(what: str, say: Callable[[str], None] = print) -> Iterator[None]:
    """Says once that something is waited for, where the block takes longer than `LATE`: a network
    disk may answer late, and nobody can see for what a silent program waits."""
    timer = threading.Timer(
        LATE, lambda: say(f"still waiting after {LATE:g} s: {what}; a slow disk or network?")
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def write_beside(path: AnyPath, write: Callable[[Path], object]) -> None:
    """Lets `write` make `path`.part, then renames it: a reader sees the old file or the whole
    new one. In object storage what `write` makes is uploaded."""
    if is_remote(path):
        return _upload(path, write)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + PART)
    try:
        write(Path(part))
        part.replace(path)
    finally:
        with suppress(OSError):  # the disk may have become read-only
            part.unlink(missing_ok=True)


def write_whole(path: AnyPath, write: Callable[[Path], object]) -> None:
    """Lets `write` make a local file, which then becomes `path`: of a folder that is there and
    has several writers.

    On a disk the file lies beside `path` under a name of its own and is renamed. In object storage
    it is uploaded. Raises OutputError where the disk refuses.
    """
    if is_remote(path):
        return _upload(path, write)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{PART}")
    try:
        write(Path(part))
        part.replace(path)
    except OSError as error:
        # Another process that makes the same file was faster, and has tidied up (`remove_parts`).
        overtaken = isinstance(error, FileNotFoundError) and not part.exists() and path.exists()
        if not overtaken:
            raise OutputError(
                f"{path}: cannot be written ({error.strerror or first_line(error)}); see to the "
                "disk and start again"
            ) from error
    finally:
        with suppress(OSError):  # the disk may have become read-only
            part.unlink(missing_ok=True)


def _upload(path: AnyPath, write: Callable[[Path], object]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / path.name
        write(local)
        epath.Path(local).copy(path, overwrite=True)


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


def files_below(folder: AnyPath) -> Iterator[AnyPath]:
    """All files of a folder and of those in it."""
    for path in folder.iterdir():
        if path.is_dir():
            if path != folder:  # object storage may list a folder as its own first entry
                yield from files_below(path)
        else:
            yield path


class GrowingFiles:
    """Where a run lets files of its folder grow: in the folder itself on a disk, else in a local
    one, whose files are uploaded whole, each when it has changed.

    A process that is killed loses what grew since the last `upload`.
    """

    def __init__(self, folder: AnyPath) -> None:
        self._remote = folder if is_remote(folder) else None
        self._local = tempfile.TemporaryDirectory() if self._remote is not None else None
        self.folder = Path(folder if self._local is None else self._local.name)
        self._sizes: dict[str, int] = {}

    def fetch(self, name: str) -> Path:
        """A file of the folder as it was left, to be read and appended to."""
        path = self.folder / name
        if self._remote is not None and (self._remote / name).exists():
            path.write_bytes((self._remote / name).read_bytes())
        return path

    def upload(self) -> None:
        """Raises OutputError where object storage refuses."""
        if self._remote is None:
            return
        for path in sorted(files_below(self.folder)):
            name, size = str(path.relative_to(self.folder)), Path(path).stat().st_size
            if self._sizes.get(name) == size:
                continue
            try:
                epath.Path(path).copy(self._remote / name, overwrite=True)
            except OSError as error:
                raise OutputError(
                    f"{self._remote / name}: cannot be written ({first_line(error)}); see to the "
                    "bucket and start again to go on from the newest checkpoint"
                ) from error
            self._sizes[name] = size

    def close(self) -> None:
        """Uploads what has changed, and removes the local folder."""
        if self._local is not None:
            with self._local:
                self.upload()
