"""Scenes of one or two subjects, and the pictures of them: references and targets.

A scene says what a prompt may ask for; everything about it is a word of `FACTORS`. A reference
shows its subject turned a little, near the middle, at another size and on another ground than the
target's, so that copied pixels are wrong. This module imports no JAX.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from squeeze_jax.miniature.drawing import draw_background
from squeeze_jax.miniature.emoji.subjects import Subject, picture_of
from squeeze_jax.miniature.shapes import Number

FACTORS: dict[str, tuple[str, ...]] = {
    "place": ("beach", "forest", "city", "snow", "desert", "meadow"),
    "time": ("day", "sunset", "night"),
    "position": ("left", "middle", "right"),
    "size": ("big", "small"),
    "pose": ("upright", "leaning left", "leaning right", "upside down", "mirrored"),
    "thing": ("nothing", "balloon", "flag", "box", "ball", "star"),
}
"""What can be chosen for a scene, and the values (our decision)."""

_ANGLE = {"upright": 0.0, "leaning left": 35.0, "leaning right": -35.0, "upside down": 180.0}
"""Degrees anticlockwise."""
_LENGTH = {"big": 0.72, "small": 0.50}
"""Longer side of a single subject, as a share of the picture's shorter side."""
_LENGTH_OF_TWO = {"big": 0.54, "small": 0.42}
_CENTRE = {"left": 0.30, "middle": 0.50, "right": 0.70}
"""Of the picture's width."""
_CENTRE_OF_TWO = {"left": 0.26, "right": 0.74}
_GROUND = 0.92
"""Where a subject's lower edge stands, as a share of the picture's height."""
_LEAN_MOST = 15.0
"""A reference is turned by at most so many degrees."""
_VIEW_LENGTH = (0.70, 0.92)
"""Longer side of a reference's subject, as a share of the picture's."""
_OFF_CENTRE_MOST = 0.04
"""A reference shows its subject near the middle, as photographs of a subject do."""
REFERENCE_SIDE = 64

_THING_COLOUR = {
    "balloon": (232, 40, 60),
    "flag": (40, 70, 220),
    "box": (250, 200, 50),
    "ball": (30, 150, 80),
    "star": (150, 50, 180),
}
_INK = (40, 30, 48)
_SUPERSAMPLE = 4


class Placement(NamedTuple):
    """One subject in a scene."""

    subject: Subject
    look: int
    position: str
    size: str
    pose: str


class Scene(NamedTuple):
    """What a target shows."""

    place: str
    time: str
    thing: str
    placements: tuple[Placement, ...]
    """One, anywhere; or two, on the left and on the right."""


class View(NamedTuple):
    """How a reference shows its subject."""

    angle: float
    """Degrees anticlockwise."""
    length: float
    """Longer side, as a share of the picture's."""
    centre: tuple[float, float]
    """Right and down, as shares of the picture's sides."""
    colour: tuple[int, int, int]
    """Of the plain ground, where there is no place."""
    place: tuple[str, str] | None
    """A place and a time."""


def draw_view(rng: np.random.Generator, away_from: str) -> View:
    """A random way to show a reference, on a plain ground or in another place than `away_from`."""
    length = float(rng.uniform(*_VIEW_LENGTH))
    right, down = rng.uniform(-_OFF_CENTRE_MOST, _OFF_CENTRE_MOST, 2)
    place = None
    if rng.random() < 0.3:
        places = [place for place in FACTORS["place"] if place != away_from]
        place = (str(rng.choice(places)), str(rng.choice(FACTORS["time"])))
    red, green, blue = rng.integers(60, 256, 3).tolist()
    angle = float(rng.uniform(-_LEAN_MOST, _LEAN_MOST))
    return View(angle, length, (0.5 + float(right), 0.5 + float(down)), (red, green, blue), place)


def bring_near(view: View, difference: float, scene: Scene, height: int, width: int) -> View:
    """The view on the way to how the target shows a scene's single subject: at a difference of 0
    the same upright picture at the same pixels, as far as it fits, at 1 the view itself."""
    left, upper, right, lower = bounds_of(scene, 0, height, width)
    length = _LENGTH[scene.placements[0].size] * min(height, width) / REFERENCE_SIDE
    length = min(length + difference * (view.length - length), 1.0)
    centre = []
    for low, high, far in ((left, right, view.centre[0]), (upper, lower, view.centre[1])):
        near = (low + high) / 2 / REFERENCE_SIDE
        within = max(near + difference * (far - near), length / 2)
        centre.append(min(within, 1 - length / 2))
    return view._replace(
        angle=difference * view.angle, length=length, centre=(centre[0], centre[1])
    )


def draw_reference(
    subject: Subject, look: int, view: View, side: int = REFERENCE_SIDE
) -> Image.Image:
    """The subject alone: an RGB picture of `side` x `side` pixels."""
    if view.place is not None:
        image = draw_background(*view.place, side).copy()
    else:
        image = Image.new("RGB", (side, side), view.colour)
    drawn = _turned(subject, look, view.length * side, view.angle)
    x, y = (round(c * side - s / 2) for c, s in zip(view.centre, drawn.size, strict=True))
    _paste(image, drawn, x, y)
    return image


def draw_scene(scene: Scene, height: int, width: int) -> Image.Image:
    """The target: an RGB picture, `width` pixels wide and `height` high."""
    image = _ground(scene, height, width)
    for place, one in enumerate(scene.placements):
        drawn = _drawn(scene, place, height, width)
        left, upper, _, _ = _box(one, drawn, len(scene.placements) == 2, height, width)
        _paste(image, drawn, left, upper)
    return image


def _ground(scene: Scene, height: int, width: int) -> Image.Image:
    """The scene without its subjects."""
    image = _background(scene.place, scene.time, height, width).copy()
    if scene.thing != "nothing":
        _draw_thing(image, scene)
    return image


def draw_copied(scene: Scene, views: tuple[View, ...], height: int, width: int) -> Image.Image:
    """The scene with its subjects at the angle and the size at which their references show them:
    what a model draws that pastes. RGB, `width` pixels wide and `height` high."""
    image = _ground(scene, height, width)
    for place, (one, view) in enumerate(zip(scene.placements, views, strict=True)):
        left, _, right, lower = bounds_of(scene, place, height, width)
        share = 0.5 if len(views) == 2 else 1.0  # both have to fit
        drawn = _turned(one.subject, one.look, share * view.length * min(height, width), view.angle)
        _paste(image, drawn, (left + right - drawn.width) // 2, lower - drawn.height)
    return image


def bounds_of(scene: Scene, place: int, height: int, width: int) -> tuple[int, int, int, int]:
    """Where subject number `place` is drawn: left, upper, right and lower edge in pixels."""
    drawn = _drawn(scene, place, height, width)
    two = len(scene.placements) == 2
    return _box(scene.placements[place], drawn, two, height, width)


def _drawn(scene: Scene, place: int, height: int, width: int) -> Image.Image:
    """A subject as the scene has it, cropped."""
    one = scene.placements[place]
    lengths = _LENGTH_OF_TWO if len(scene.placements) == 2 else _LENGTH
    look = one.look ^ 1 if one.pose == "mirrored" else one.look
    length = lengths[one.size] * min(height, width)
    return _turned(one.subject, look, length, _ANGLE.get(one.pose, 0.0))


def _box(
    one: Placement, drawn: Image.Image, two: bool, height: int, width: int
) -> tuple[int, int, int, int]:
    middle = (_CENTRE_OF_TWO if two else _CENTRE)[one.position] * width
    # A subject that would leave the picture is moved back into it.
    left = min(max(round(middle - drawn.width / 2), 0), max(width - drawn.width, 0))
    lower = round(_GROUND * height)
    return left, lower - drawn.height, left + drawn.width, lower


@lru_cache(maxsize=256)
def _background(place: str, time: str, height: int, width: int) -> Image.Image:
    """A place at a time in any shape: cut out of a square one."""
    side = max(height, width)
    top, left = round((side - height) * 0.6), (side - width) // 2
    whole = draw_background(place, time, side)
    return whole.crop((left, top, left + width, top + height))


def _turned(subject: Subject, look: int, length: float, angle: float) -> Image.Image:
    """The subject at a size and an angle, cropped to what is drawn."""
    side = max(round(length), 4)
    picture = picture_of(subject, look).resize((side, side), Image.Resampling.BOX)
    if angle == 180.0:
        picture = picture.transpose(Image.Transpose.ROTATE_180)
    elif angle:
        picture = picture.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    box = picture.getchannel("a").point([255 * (a > 8) for a in range(256)]).getbbox()
    return picture.crop(box)


def _paste(image: Image.Image, drawn: Image.Image, x: int, y: int) -> None:
    """Lays a picture with premultiplied alpha over another, in place."""
    image.paste(drawn.convert("RGBA").convert("RGB"), (x, y), drawn.getchannel("a"))


def _draw_thing(image: Image.Image, scene: Scene) -> None:
    """Draws what stands beside the subject: on the wider side of it, behind it."""
    positions = {one.position for one in scene.placements}
    middle = {"left": 0.82, "middle": 0.86, "right": 0.18}
    x = 0.5 if len(positions) == 2 else middle[positions.pop()]
    side = min(image.size)
    big = image.size[0] * _SUPERSAMPLE, image.size[1] * _SUPERSAMPLE
    mask = Image.new("L", big, 0)
    ink = Image.new("L", big, 0)
    foot = _GROUND * big[1]
    unit = side * _SUPERSAMPLE
    cx = x * big[0]
    for layer, grow in ((ink, 0.018), (mask, 0.0)):
        draw = ImageDraw.Draw(layer)
        for kind, points in _thing_shapes(scene.thing):
            frame = [(cx + u * unit, foot - v * unit) for u, v in points]
            if kind == "line":
                if layer is ink:
                    draw.line(frame, fill=255, width=round(0.025 * unit))
            elif kind == "disc":
                (a, b), (c, d) = frame
                g = grow * unit
                draw.ellipse([a - g, d - g, c + g, b + g], fill=255)
            else:
                draw.polygon(frame, fill=255)
                if grow:
                    draw.line([*frame, frame[0]], fill=255, width=round(2 * grow * unit))
    image.paste(_INK, (0, 0), ink.reduce(_SUPERSAMPLE))
    image.paste(_THING_COLOUR[scene.thing], (0, 0), mask.reduce(_SUPERSAMPLE))


def _thing_shapes(thing: str) -> list[tuple[str, list[tuple[Number, Number]]]]:
    """Shapes in shares of the shorter side, to the right of the thing's middle and up from the
    ground."""
    if thing == "balloon":
        return [("line", [(0, 0.1), (0, 0.5)]), ("disc", [(-0.11, 0.46), (0.11, 0.74)])]
    if thing == "flag":
        pole = ("line", [(-0.08, 0.0), (-0.08, 0.66)])
        return [pole, ("polygon", [(-0.08, 0.66), (0.13, 0.55), (-0.08, 0.42)])]
    if thing == "box":
        return [("polygon", [(-0.12, 0.0), (-0.12, 0.22), (0.12, 0.22), (0.12, 0.0)])]
    if thing == "ball":
        return [("disc", [(-0.12, 0.0), (0.12, 0.24)])]
    angles = np.pi / 2 + np.arange(10) * np.pi / 5
    radii = np.where(np.arange(10) % 2, 0.06, 0.14)
    points = np.stack([radii * np.cos(angles), 0.42 + radii * np.sin(angles)], -1).tolist()
    return [("line", [(0, 0.0), (0, 0.4)]), ("polygon", [(x, y) for x, y in points])]
