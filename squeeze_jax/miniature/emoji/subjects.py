"""Subjects: some 760 pictures of Noto Emoji (Google, Apache-2.0), each with a name and a category.

One subject in ten is held out from training, and so is one whole category. This module imports no
JAX, so data workers stay light.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from squeeze_jax.miniature.hashing import splitmix64

SIDE = 64
"""Pixels of a picture's sides in the sheets; its longer side fills them."""
COLUMNS = 16
"""Pictures in a line of a sheet."""
HELD_OUT_CATEGORY = "vehicle"
"""No subject of it is seen in training (our decision)."""
CHANNEL_ORDERS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
"""Orders of a picture's colours: training sees each subject in all six, so that there are more
looks to keep than names to know (our decision)."""
LOOKS = 2 * len(CHANNEL_ORDERS)
"""Looks of a subject: each order of colours, as it is and mirrored. 0 is the picture itself."""

Split = Literal["train", "held_out", "held_out_category"]
_HELD_OUT_ONE_IN = 10
_HERE = Path(__file__).parent


class Subject(NamedTuple):
    """One picture; its number is its place in `SUBJECTS`."""

    name: str
    """In lower case, without an article. Several subjects may share it."""
    category: str
    place: int
    """In the sheet of its category."""
    number: int


@lru_cache
def _subjects() -> tuple[Subject, ...]:
    names: dict[str, list[str]] = json.loads((_HERE / "names.json").read_text())
    rows = [(name, kind, place) for kind in names for place, name in enumerate(names[kind])]
    return tuple(Subject(*row, number) for number, row in enumerate(rows))


SUBJECTS = _subjects()
CATEGORIES = tuple(dict.fromkeys(subject.category for subject in SUBJECTS))


def split_of(subject: Subject) -> Split:
    """Where a subject belongs: a hash (splitmix64) of its number alone decides."""
    if subject.category == HELD_OUT_CATEGORY:
        return "held_out_category"
    return "held_out" if splitmix64(subject.number) % _HELD_OUT_ONE_IN == 0 else "train"


@lru_cache
def subjects_of(split: Split) -> tuple[Subject, ...]:
    """The subjects of a split, in their order."""
    return tuple(subject for subject in SUBJECTS if split_of(subject) == split)


@lru_cache
def _sheet(category: str) -> Image.Image:
    return Image.open(_HERE / f"{category}.webp").convert("RGBA")


@lru_cache(maxsize=4096)
def picture_of(subject: Subject, look: int = 0) -> Image.Image:
    """The subject in one of its `LOOKS`: RGBA with premultiplied alpha ("RGBa"), 64 x 64 pixels.
    Not to be drawn on."""
    line, column = divmod(subject.place, COLUMNS)
    box = (column * SIDE, line * SIDE, (column + 1) * SIDE, (line + 1) * SIDE)
    pixels = np.asarray(_sheet(subject.category).crop(box).convert("RGBa"))
    order, mirrored = divmod(look, 2)
    pixels = pixels[..., [*CHANNEL_ORDERS[order], 3]]
    pixels = pixels[:, ::-1] if mirrored else pixels
    return Image.frombytes("RGBa", (SIDE, SIDE), np.ascontiguousarray(pixels).tobytes())


COLOURS = {
    "red": (214, 50, 44),
    "orange": (246, 148, 40),
    "yellow": (252, 214, 60),
    "green": (84, 160, 60),
    "aqua": (60, 190, 200),
    "blue": (56, 110, 220),
    "purple": (140, 70, 190),
    "pink": (240, 130, 180),
    "brown": (130, 84, 50),
    "grey": (130, 140, 146),
    "white": (240, 240, 240),
    "black": (40, 40, 44),
}
"""Words for what most of a picture is coloured like."""


@lru_cache(maxsize=16384)
def colour_of(subject: Subject, look: int = 0) -> str:
    """The word of `COLOURS` to which most opaque pixels are nearest."""
    pixels = np.asarray(picture_of(subject, look).convert("RGBA")).reshape(-1, 4)
    opaque = pixels[pixels[:, 3] > 128, :3].astype(np.float32)
    palette = np.array(list(COLOURS.values()), np.float32)
    nearest = np.square(opaque[:, None] - palette).sum(-1).argmin(-1)
    return list(COLOURS)[int(np.bincount(nearest, minlength=len(palette)).argmax())]
