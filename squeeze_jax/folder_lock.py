"""One run a folder: a second one is refused, and names the first.

The lock is the kernel's (POSIX), so that it ends with its process however that ends: nothing is
left to clear after a crash. On a network disk it holds among machines where the disk has locks; on
one without them, and in buckets, nothing is locked.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from squeeze_jax.errors import InputError
from squeeze_jax.processes import broadcast_from_main, is_main
from squeeze_jax.storage import AnyPath, is_remote

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""What a disk answers that has no locks."""
# A process never waits for itself: the kernel would give it the lock twice.
_held: set[Path] = set()


@contextlib.contextmanager
def hold(path: AnyPath, what: str) -> Iterator[None]:
    """Holds the lock file `path` while the block runs, then removes it; in a bucket, nothing.

    what: how a message names the work, "a run". Raises InputError, naming host, process and start
    of the other, where it is held already. The folder must exist.
    """
    if is_remote(path):
        yield
        return
    local = Path(path).absolute()
    # Closing any descriptor of a file drops its process's lock, so our own is not opened again.
    if local in _held:
        raise InputError(_in_use(local, what, " (this very process)"))
    file = _acquire(local, what)
    _held.add(local)
    try:
        yield
    finally:
        _held.discard(local)
        with contextlib.suppress(OSError):  # the disk may have become read-only
            local.unlink(missing_ok=True)
        os.close(file)


@contextlib.contextmanager
def hold_for_run(path: AnyPath, what: str) -> Iterator[None]:
    """The same for several processes of one run: process 0 holds it, all are refused together."""
    with contextlib.ExitStack() as stack:
        refused: Exception | None = None
        if is_main():
            try:
                stack.enter_context(hold(path, what))
            except Exception as error:  # whatever it is: the others wait for the news below
                refused = error
        if broadcast_from_main(float(refused is not None)):
            raise refused or InputError(f"{path.parent}: {what} is in it already, says process 0")
        yield


def _acquire(path: Path, what: str) -> int:
    """Opens, locks and signs the file; the file that is locked is the one that has the name."""
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise InputError(
                f"{path}: cannot be made or opened ({error.strerror}); choose another folder"
            ) from None
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = os.read(file, 4096)
            os.close(file)
            raise InputError(_in_use(path, what, _described(holder))) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(file)
                raise
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), path.stat()):
                break
        os.close(file)  # its last holder removed it between our opening and our locking
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    signed = {"host": socket.gethostname(), "process": os.getpid(), "since": since}
    with contextlib.suppress(OSError):  # a full disk: the lock holds without a signature, too
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(signed).encode(), 0)
    return file


def _in_use(path: Path, what: str, holder: str) -> str:
    return (
        f"{path.parent}: {what} is at work in it already{holder}; wait for its end, stop it, or "
        "choose another folder"
    )


def _described(holder: bytes) -> str:
    """Who signed a lock file, in words; nothing where it is not signed yet."""
    try:
        about = json.loads(holder)
        return f" (process {about['process']} on {about['host']}, since {about['since']})"
    except (ValueError, KeyError, TypeError):
        return ""
