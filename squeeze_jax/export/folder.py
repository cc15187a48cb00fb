"""A folder that is written whole or not at all, and what it holds."""

import hashlib
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from squeeze_jax.errors import InputError, OutputError


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `out` when all went well; else nothing is left. Raises OutputError where a file
    cannot be written.
    """
    part = out.with_name(out.name + ".part")
    try:
        with stoppable():
            shutil.rmtree(part, ignore_errors=True)  # of an export that was killed
            part.mkdir(parents=True)
            yield part
            part.rename(out)
    except OSError as error:
        if error.errno is None:  # a library's own word on what it was to read
            raise InputError(
                (str(error).strip() or type(error).__name__).splitlines()[0]
            ) from error
        raise OutputError(
            f"{out} cannot be written ({error.strerror}); make room or give another --out"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGINT and SIGTERM end what runs inside. They are sent again until they do: Python drops what is raised inside a
    callback of its garbage collector, and JAX has one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ended, again = False, []

    def stop(number: int, frame: FrameType | None) -> None:
        if ended:
            return
        again.append(threading.Timer(0.5, os.kill, (os.getpid(), number)))
        again[-1].start()
        if frame is not None and frame.f_code.co_name == "_xla_gc_callback":
            return  # it would only print what it drops
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number, handler in before.items():
            if handler != signal.SIG_IGN:
                signal.signal(number, stop)
        yield
    finally:
        ended = True
        for timer in again:
            timer.cancel()
        for timer in again:
            timer.join()
        for number, handler in before.items():
            signal.signal(number, handler)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a folder."""

    def sha256(file: Path) -> str:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): sha256(file) for file in files}


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
