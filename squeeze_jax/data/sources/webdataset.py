"""`webdataset:DIR`: tar shards in WebDataset's layout.

    KEY.target.jpg  KEY.reference0.jpg  KEY.reference1.jpg …  KEY.txt (or KEY.json)

The caption is the text, or `prompt` or `caption` of the JSON object. A shard is a part.
"""

import io
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from squeeze_jax.data.images import decode_image
from squeeze_jax.data.record_writer import RowError
from squeeze_jax.data.sources.contract import Left, Opened, Options, refuse_scores
from squeeze_jax.data.sources.parted import Entry, Key, open_parts
from squeeze_jax.errors import InputError

PICTURE = re.compile(r"(target|reference[0-9]*)\.(jpe?g|png|webp)", re.IGNORECASE)
CAPTIONS = ("prompt", "caption")
Place = tuple[int, int]
"""Where a file begins in its shard, and its length, in bytes."""


def open_rows(path: Path, options: Options) -> Opened:
    """Rows of a folder of tar shards. Raises InputError where it has none."""
    refuse_scores(options, "webdataset")
    shards = sorted(path.glob("*.tar"))
    if not shards:
        packed = next(path.glob("*.tar.gz"), None)
        remedy = f"decompress them (gunzip {packed.name})" if packed else "give the shards' folder"
        raise InputError(f"{path}: no *.tar in it; {remedy}")
    return open_parts("webdataset", [Shard(shard) for shard in shards], options)


class Shard:
    """A part. Keys: a file's `Place`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def entries(self) -> Iterator[Entry | Left]:
        with open_shard(self.path) as file:
            for row, (key, files, repeated) in enumerate(self._samples()):
                name = f"{self.path.name} {key}"
                if repeated:
                    yield Left("row twice", f"{name}: it is there twice; leave one of them out")
                    continue
                yield entry_of(name, row, files, file)

    def _samples(self) -> Iterator[tuple[str, dict[str, Place], bool]]:
        """Each key with its files by extension, and whether one of these came before."""
        samples: dict[str, dict[str, Place]] = {}
        repeated: list[str] = []
        for member in self._members():
            folder, _, base = member.name.rpartition("/")
            stem, _, extension = base.partition(".")
            key = f"{folder}/{stem}".lstrip("/")
            files = samples.setdefault(key, {})
            if extension.lower() in files:
                repeated.append(key)
            else:
                files[extension.lower()] = (member.offset_data, member.size)
        yield from ((key, files, False) for key, files in samples.items())
        yield from ((key, {}, True) for key in dict.fromkeys(repeated))

    def _members(self) -> Iterator[tarfile.TarInfo]:
        """Its files. Raises InputError where it is cut short: a tar ends in a block of zeros."""
        try:
            with self.path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    # Else it keeps what it has read.
                    tar.members = []  # pyright: ignore[reportAttributeAccessIssue]
                    if member.isfile():
                        yield member
                file.seek(tar.offset)
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError("its end is missing")
        except (tarfile.TarError, OSError, EOFError) as error:
            raise InputError(
                f"{self.path}: the archive is cut short or damaged ({error}); download it again"
            ) from None

    def open(self, wanted: Sequence[Key]) -> "ShardPictures":
        return ShardPictures(self.path)


def open_shard(path: Path) -> io.BufferedReader:
    """A shard's bytes. Raises InputError where they cannot be read."""
    try:
        return path.open("rb")
    except OSError as error:
        raise InputError(
            f"{path}: cannot be opened ({error.strerror}); download it again"
        ) from None


def entry_of(
    name: str, row: int, files: dict[str, Place], shard: io.BufferedReader
) -> Entry | Left:
    """The example that files of one key make."""
    pictures = {found[1].lower(): files[end] for end in files if (found := PICTURE.fullmatch(end))}
    target = pictures.pop("target", None)
    if target is None:
        return Left("no target", f"{name}: it has no target.jpg or target.png to learn")
    if not pictures:
        return Left("no reference", f"{name}: it has no reference0.jpg, a picture of the subject")
    caption = caption_of(files, shard)
    if caption is None or not caption.strip():
        said = "its .txt is empty or missing, and so is prompt or caption in its .json"
        return Left("no caption", f"{name}: {said}")
    ordered = sorted(pictures, key=lambda end: int(end.removeprefix("reference") or 0))
    return Entry(name, row, caption, tuple(pictures[end] for end in ordered), target)


def caption_of(files: dict[str, Place], shard: io.BufferedReader) -> str | None:
    """The caption of a sample; None where there is none that can be read."""
    for extension in ("txt", "json"):
        if extension not in files:
            continue
        start, length = files[extension]
        shard.seek(start)
        try:
            text = shard.read(length).decode("utf-8-sig")
            if extension == "txt":
                return text.strip()
            values = json.loads(text)
        except (ValueError, RecursionError):
            return None
        found = [values[name] for name in CAPTIONS if isinstance(values, dict) and name in values]
        return found[0] if found and isinstance(found[0], str) else None
    return None


class ShardPictures:
    """The pictures of a shard, in any order."""

    def __init__(self, path: Path) -> None:
        self.file = open_shard(path)

    def read(self, key: Key, name: str) -> Image.Image:
        assert isinstance(key, tuple)
        start, length = key
        self.file.seek(start)
        try:
            return decode_image(io.BytesIO(self.file.read(length)), name)
        except InputError as error:
            raise RowError(str(error)) from None

    def finish(self) -> None:
        """That the shard is whole was seen when its files were listed."""

    def close(self) -> None:
        """Closes its file."""
        self.file.close()
