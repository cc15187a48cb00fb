"""`uno1m:DIR`: UNO-1M as it is downloaded, its archives read as they are or unpacked.

    labels/split1.json       rows: two pictures of one subject, a caption each, scores
    images/split1.tar.gz     their pictures; or, unpacked, the folder images/split1

Either picture of a row is a target with the other as its reference. A split is a part.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from PIL import Image

from squeeze_jax.data.images import load_image
from squeeze_jax.data.manifest import read_text_file
from squeeze_jax.data.record_writer import RowError
from squeeze_jax.data.sources.archive import ArchivePictures
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

MOST, ADVISED = 4.0, 3.5
"""The highest `score_final`, and the least that the authors of the set advise."""
SIDES = ("img_path1", "img_path2")


def open_rows(path: Path, options: Options) -> Opened:
    """Rows of a folder of UNO-1M's splits. Raises InputError where labels or pictures are
    missing."""
    labels = {
        number: file for file in path.glob("labels/split*.json") if (number := split_of(file))
    }
    if not labels:
        raise InputError(
            f"{path}: no labels/split1.json, …; give the folder that holds labels and images"
        )
    least, parts, without = threshold(options, ADVISED), [], []
    for number in sorted(labels):
        split = Split(labels[number], path / "images", f"split{number}", least)
        (parts if split.has_pictures() else without).append(split)
    if not parts:
        raise InputError(
            f"{path}: neither images/{without[0].name}.tar.gz nor a folder "
            f"images/{without[0].name}; "
            "download at least one archive whose labels are there"
        )
    opened = open_parts("uno1m", parts, options, directions=2)
    if without:
        opened.report.warnings.append(
            f"{path}: no pictures for the labels of {len(without)} of {len(labels)} splits "
            f"({', '.join(split.name for split in without[:5])}{' …' * (len(without) > 5)})"
        )
    return opened


def split_of(file: Path) -> int | None:
    """The number in `split7.json`."""
    found = re.fullmatch(r"split([1-9][0-9]*)", file.stem)
    return int(found[1]) if found else None


class Split:
    """A part. Keys: names of pictures in its archive or folder, which has no folders below it."""

    def __init__(self, labels: Path, images: Path, name: str, least: float) -> None:
        """least: the score that a row needs."""
        self.labels, self.name, self.least = labels, name, least
        self.archive, self.folder = images / f"{name}.tar.gz", images / name

    def has_pictures(self) -> bool:
        """Whether its pictures are there, unpacked or not."""
        return self.folder.is_dir() or self.archive.is_file()

    def entries(self) -> Iterator[Entry | Left]:
        seen: set[str] = set()
        for row, value in enumerate(self._rows()):
            name = f"{self.labels.name} row {row + 1}"
            values = value if isinstance(value, dict) else {}
            scored = values.get("vlm_filter_cot")
            score = scored.get("score_final") if isinstance(scored, dict) else None
            if left := score_problem([known_score(score, MOST)], self.least):
                yield from (left, left)
                continue
            pictures = [self._picture(values.get(side)) for side in SIDES]
            if left := self._unusable(name, values, pictures, seen):
                yield from (left, left)
                continue
            seen.update(picture for picture in pictures if picture)
            captions = values.get("caption")
            for place, side in enumerate(SIDES):
                caption = captions.get(side) if isinstance(captions, dict) else None
                if not isinstance(caption, str) or not caption.strip():
                    problem = f"{name}: the caption of {side} is empty; it is the target's"
                    yield Left("no caption", problem)
                    continue
                yield Entry(name, row, caption, (pictures[1 - place],), pictures[place])

    def _rows(self) -> list[object]:
        try:
            rows = json.loads(read_text_file(self.labels, "download it again"))
        except InputError:
            raise
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self.labels}: not JSON ({error}); download it again") from None
        if not isinstance(rows, list):
            raise InputError(f"{self.labels}: not a list of rows; download it again")
        return rows

    def _picture(self, path: object) -> str | None:
        """The name of a picture of this split; None where the path leads elsewhere."""
        if not isinstance(path, str) or "\\" in path or "\0" in path:
            return None
        *folders, name = PurePosixPath(path).parts or [".."]
        here = folders in ([], [self.name], ["images", self.name])
        return name if here and name != ".." else None

    def _unusable(
        self, name: str, values: dict[str, object], pictures: Sequence[str | None], seen: set[str]
    ) -> Left | None:
        """What makes both directions of a row unusable, if anything does."""
        for side, picture in zip(SIDES, pictures):
            if picture is None:
                where = f"it must name a picture of {self.name}"
                return Left("no path", f"{name}: {side} is {values.get(side)!r}; {where}")
        if pictures[0] == pictures[1]:
            return Left(
                "one picture", f"{name}: both pictures are {pictures[0]}; that teaches copying"
            )
        if seen.intersection(pictures):
            return Left(
                "row twice", f"{name}: a picture of it is in an earlier row, too; leave it out"
            )
        return None

    def open(self, wanted: Sequence[Key]) -> "Folder | ArchivePictures":
        if self.folder.is_dir():
            return Folder(self.folder)
        return ArchivePictures(self.archive, wanted)


class Folder:
    """The pictures of an unpacked split."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, key: Key, name: str) -> Image.Image:
        try:
            return load_image(self.folder / str(key))
        except InputError as error:
            raise RowError(f"{name}: {error}") from None

    def finish(self) -> None:
        """A folder has no end."""

    def close(self) -> None:
        """Nothing is open."""
