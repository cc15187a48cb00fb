"""`subjects200k:DIR`: Subjects200K's parquet shards as they are downloaded.

A row is a composite of two pictures of one subject, and each of the two is a target with the other
as its reference. A row group is a part: it is read on its own.
"""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

from squeeze_jax.data.images import decode_image
from squeeze_jax.data.record_writer import RowError
from squeeze_jax.data.sources.contract import (
    Left,
    Opened,
    Options,
    known_score,
    score_problem,
    threshold,
)
from squeeze_jax.data.sources.parted import Entry, Key, open_parts
from squeeze_jax.errors import InputError

SCORES = ("compositeStructure", "objectConsistency", "imageQuality")
"""Fields of `quality_assessment`, 0 to 5."""
MOST, ADVISED = 5.0, 5.0
"""The highest score, and the least that is taken by default: the usual filter of the set."""
COLUMNS = ("image", "description", "quality_assessment")
ROWS_READ = 16
"""Rows whose pictures are in memory at once."""
BUFFER = 4 * 2**20
"""Bytes of a column read at once, in place of a whole row group's."""


def open_rows(path: Path, options: Options) -> Opened:
    """Rows of a folder of Subjects200K's Parquet shards. Raises InputError where it has none."""
    files = sorted([*path.glob("*.parquet"), *path.glob("data/*.parquet")])
    if not files:
        raise InputError(
            f"{path}: no *.parquet in it or in its folder data; give the download's folder"
        )
    least = threshold(options, ADVISED)
    parts = [part for file in files for part in row_groups(file, least)]
    return open_parts("subjects200k", parts, options, directions=2)


def parquet() -> ModuleType:
    """pyarrow's reader. Raises InputError where it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise InputError(
            "subjects200k is parquet, which needs pyarrow; install it with "
            "pip install 'squeeze_jax[parquet]'"
        ) from None
    return pyarrow.parquet


def open_file(file: Path) -> Any:
    """A parquet file (`pyarrow.parquet.ParquetFile`). Raises InputError where it is damaged."""
    try:
        return parquet().ParquetFile(file, buffer_size=BUFFER)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{file}: not a whole parquet file ({reason}); download it again"
        ) from None


def row_groups(file: Path, least: float) -> Iterator["RowGroup"]:
    """The parts of one file. Raises InputError where a column is missing."""
    with open_file(file) as opened:
        there = opened.schema_arrow.names
        if missing := [name for name in COLUMNS if name not in there]:
            raise InputError(
                f"{file}: column {' and '.join(missing)} is missing, it has {', '.join(there)}; "
                "give shards of Subjects200K"
            )
        first = 0
        for group in range(opened.num_row_groups):
            yield RowGroup(file, group, first, least)
            first += opened.metadata.row_group(group).num_rows


class RowGroup:
    """A part. Keys: (row in the group, side); side 0 is the left picture."""

    def __init__(self, file: Path, group: int, first: int, least: float) -> None:
        """first: the file's rows before the group. least: the score that a row needs."""
        self.file, self.group, self.first, self.least = file, group, first, least

    def entries(self) -> Iterator[Entry | Left]:
        with open_file(self.file) as opened, reading(self.file):
            labels = opened.read_row_group(self.group, columns=list(COLUMNS[1:])).to_pylist()
        for row, values in enumerate(labels):
            name = f"{self.file.name} row {self.first + row + 1}"
            scores = values["quality_assessment"] or {}
            found = [known_score(scores.get(score), MOST) for score in SCORES]
            if left := score_problem(found, self.least):
                yield from (left, left)
                continue
            described = values["description"] or {}
            for side in (0, 1):
                caption = described.get(f"description_{side}")
                if not isinstance(caption, str) or not caption.strip():
                    problem = f"{name}: description_{side} is empty; it is the target's caption"
                    yield Left("no caption", problem)
                    continue
                yield Entry(name, row, caption, ((row, 1 - side),), (row, side))

    def open(self, wanted: Sequence[Key]) -> "Composites":
        return Composites(self)


class reading:  # noqa: N801
    """Turns what pyarrow raises on a damaged file into an InputError."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (OSError, ValueError)) and not isinstance(error, InputError):
            reason = str(error).splitlines()[0]
            raise InputError(
                f"{self.file}: cannot be read to its end ({reason}); download it again"
            ) from None


class Composites:
    """The pictures of a row group, rows in ascending order."""

    def __init__(self, group: RowGroup) -> None:
        self.group, self.file = group, open_file(group.file)
        self.batches = self.file.iter_batches(ROWS_READ, [group.group], columns=["image"])
        self.rows: tuple[int, list[Any]] = (0, [])
        self.cut: tuple[int, tuple[Image.Image, Image.Image] | RowError] | None = None

    def read(self, key: Key, name: str) -> Image.Image:
        assert isinstance(key, tuple)
        row, side = key
        if self.cut is None or self.cut[0] != row:
            self.cut = row, self._cut(row, name)
        if isinstance(self.cut[1], RowError):
            raise self.cut[1]
        return self.cut[1][side]

    def _cut(self, row: int, name: str) -> tuple[Image.Image, Image.Image] | RowError:
        encoded = self._encoded(row)
        if not encoded:
            return RowError(f"{name}: its image has no bytes; leave the row out")
        try:
            return cut_sides(decode_image(io.BytesIO(encoded), name), name)
        except InputError as error:
            return RowError(str(error))

    def _encoded(self, row: int) -> bytes | None:
        first, rows = self.rows
        while row >= first + len(rows):
            first += len(rows)
            with reading(self.group.file):
                rows = next(self.batches).column("image")
            self.rows = first, rows
        value = rows[row - first].as_py()
        return value.get("bytes") if isinstance(value, dict) else None

    def finish(self) -> None:
        """Parquet has no end that could be missing: its index stands there."""

    def close(self) -> None:
        """Closes its file."""
        self.file.close()


def cut_sides(image: Image.Image, name: str) -> tuple[Image.Image, Image.Image]:
    """The left and the right picture of a composite.

    Two squares of side S stand side by side with a margin P around and between them, so the
    composite is 2S + 3P wide and S + 2P high. Raises InputError where it is not.
    """
    margin = 2 * image.height - image.width
    side = image.height - 2 * margin
    if margin < 0 or side <= margin:
        raise InputError(
            f"{name}: {image.width}x{image.height} pixels are not two squares side by side with a "
            "margin around; leave the row out"
        )
    left, right = margin, 2 * margin + side
    boxes = [(x, margin, x + side, margin + side) for x in (left, right)]
    return image.crop(boxes[0]), image.crop(boxes[1])
