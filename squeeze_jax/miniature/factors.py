"""What a critter and its scene can be: the factors, their values and their words.

A subject is what a picture must keep, a scene what the prompt says. Every value is a small index
into its table, so a subject or a scene is a tuple that can be stored, hashed and redrawn. The
tables are our decision: few values, each changing many pixels, so that a small model can be judged
by its pictures.
"""

from typing import NamedTuple

import numpy as np

SUBJECT_FACTORS: dict[str, tuple[str, ...]] = {
    "body": ("round", "tall", "square", "pear", "wide", "spiky"),
    "colour": ("red", "orange", "green", "blue", "purple", "pink", "grey"),
    "second": ("white", "black", "yellow", "aqua", "brown"),
    "ears": ("pointed", "round", "long", "floppy", "antenna"),
    "tail": ("pompom", "bushy", "fish", "spike", "bolt"),
    "pattern": ("dipped", "capped", "masked", "saddled", "quartered"),
    "eyes": ("round", "slit", "sleepy", "ring", "cross"),
}
"""Name of each subject factor to its values, in the order of `Subject`'s fields."""

FINE_FACTORS = ("eyes",)
"""Subject factors that blur away in a thumbnail of 16x16 pixels: what only the reference's latents
can carry.

Captions leave them out, so that the small MLLM learns to describe and not to copy.
"""

SCENE_FACTORS: dict[str, tuple[str, ...]] = {
    "place": ("beach", "forest", "city", "snow", "desert", "meadow"),
    "time": ("day", "sunset", "night"),
    "pose": ("standing", "running", "jumping", "lying"),
    "accessory": ("balloon", "flag", "box", "cape", "board"),
    "position": ("left", "middle", "right"),
    "size": ("big", "small"),
}
"""Name of each scene factor to its values, in the order of `Scene`'s fields. A prompt names all
six."""

POSES = SCENE_FACTORS["pose"]


class Subject(NamedTuple):
    """One creature: an index into `SUBJECT_FACTORS[field]` for every field."""

    body: int
    colour: int
    second: int
    ears: int
    tail: int
    pattern: int
    eyes: int


class Scene(NamedTuple):
    """One scene: an index into `SCENE_FACTORS[field]` for every field."""

    place: int
    time: int
    pose: int
    accessory: int
    position: int
    size: int


SUBJECT_SIZES = tuple(len(values) for values in SUBJECT_FACTORS.values())
SCENE_SIZES = tuple(len(values) for values in SCENE_FACTORS.values())
SUBJECT_COUNT = int(np.prod(SUBJECT_SIZES))
SCENE_COUNT = int(np.prod(SCENE_SIZES))


def _digits(number: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Mixed-radix digits of `number`, last factor fastest."""
    digits = []
    for size in reversed(sizes):
        number, digit = divmod(number, size)
        digits.append(digit)
    return tuple(reversed(digits))


def subject_from_number(number: int) -> Subject:
    """The subject with that number, 0 <= number < SUBJECT_COUNT."""
    return Subject(*_digits(number, SUBJECT_SIZES))


def scene_from_number(number: int) -> Scene:
    """The scene with that number, 0 <= number < SCENE_COUNT."""
    return Scene(*_digits(number, SCENE_SIZES))


def subject_number(subject: Subject) -> int:
    """The inverse of `subject_from_number`."""
    number = 0
    for digit, size in zip(subject, SUBJECT_SIZES, strict=True):
        number = number * size + int(digit)
    return number
