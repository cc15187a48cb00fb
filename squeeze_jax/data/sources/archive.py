"""Pictures out of a compressed archive, read once from its beginning to its end and not unpacked.

Pictures that come before they are asked for wait in memory, above `MOST_WAITING` bytes in a
temporary file. So it costs little where the archive has the order of the labels, and works where
not.
"""

import gzip
import io
import tarfile
import tempfile
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path, PurePosixPath

from PIL import Image

from squeeze_jax.data.images import decode_image
from squeeze_jax.data.record_writer import RowError
from squeeze_jax.data.sources.parted import Key
from squeeze_jax.errors import InputError

MOST_WAITING = 256 * 2**20
"""Bytes of pictures that wait in memory."""
READ = 2**20
"""Bytes read at once."""


class ArchivePictures:
    """The pictures of a `.tar.gz`. Keys: names of files in it, without folders.

    An archive that was cut short or damaged is noticed, at the latest by its checksum at the end.
    """

    def __init__(self, path: Path, wanted: Sequence[Key]) -> None:
        self.path, self.wanted = path, set(wanted)
        self.ended = False
        with _NamingDamage(path), ExitStack() as files:
            self.file = files.enter_context(gzip.open(path))
            self.tar = files.enter_context(tarfile.open(fileobj=self.file, mode="r|", bufsize=READ))
            self.waiting = Waiting(files.enter_context(tempfile.SpooledTemporaryFile(MOST_WAITING)))
            self.files = files.pop_all()

    def read(self, key: Key, name: str) -> Image.Image:
        encoded = self.waiting.take(key)
        while encoded is None and not self.ended and key in self.wanted:
            with _NamingDamage(self.path):
                encoded = self._next(key)
        if encoded is None:
            raise RowError(f"{name}: {self.path.name} has no picture {key}; leave the row out")
        try:
            return decode_image(io.BytesIO(encoded), f"{name}: {key}")
        except InputError as error:
            raise RowError(str(error)) from None

    def _next(self, key: Key) -> bytes | None:
        """Reads one file; returns it if it is the one that is asked for."""
        member = self.tar.next()
        # Else it keeps what it has read.
        self.tar.members = []  # pyright: ignore[reportAttributeAccessIssue]
        if member is None:
            self._read_to_the_end()
            return None
        found = PurePosixPath(member.name).name
        if not member.isfile() or found not in self.wanted:
            return None
        stream = self.tar.extractfile(member)
        assert stream is not None
        encoded = stream.read()
        self.wanted.discard(found)
        if found == key:
            return encoded
        self.waiting.put(found, encoded)
        return None

    def _read_to_the_end(self) -> None:
        """Only there stand checksum and length, which gzip compares."""
        while self.file.read(READ):
            pass
        self.ended = True

    def finish(self) -> None:
        if not self.ended:
            with _NamingDamage(self.path):
                self._read_to_the_end()

    def close(self) -> None:
        """Closes its files."""
        self.files.close()


class _NamingDamage:
    """Turns what a broken archive raises into an InputError that names it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (EOFError, OSError, tarfile.TarError, zlib.error)):
            raise InputError(
                f"{self.path}: the archive is cut short or damaged ({error}); download it again"
            ) from None


class Waiting:
    """Pictures that came before their turn, in a file in memory or, above `MOST_WAITING`, on
    disk."""

    def __init__(self, file: "tempfile.SpooledTemporaryFile[bytes]") -> None:
        self.file = file
        self.places: dict[Key, tuple[int, int]] = {}

    def put(self, key: Key, encoded: bytes) -> None:
        """Keeps an encoded picture until it is asked for."""
        self.places[key] = (self.file.seek(0, io.SEEK_END), len(encoded))
        self.file.write(encoded)

    def take(self, key: Key) -> bytes | None:
        """The picture, which then waits no more; None where it has not come."""
        if key not in self.places:
            return None
        start, length = self.places.pop(key)
        self.file.seek(start)
        encoded = self.file.read(length)
        if not self.places:
            self.file.seek(0)
            self.file.truncate()
        return encoded
