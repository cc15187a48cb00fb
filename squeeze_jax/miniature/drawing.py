"""Drawing critters: flat cartoon shapes, antialiased, the same picture at every size.

A picture is a stack of masks, each filled with one colour. A mask (one part, in one pose, at one
scale) is drawn once at four times the size, reduced, cropped and kept; after that a picture costs
about twenty small pastes, a fraction of a millisecond. The shapes (`critters_shapes`) are in
critter units; a pose turns them into the frame, whose sides are 1.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from squeeze_jax.miniature.factors import POSES, SCENE_FACTORS, SUBJECT_FACTORS, Scene, Subject
from squeeze_jax.miniature.shapes import (
    EYE_RADIUS,
    FACE_Y,
    Number,
    body_outline,
    ear_shapes,
    ellipse,
    eye_centres,
    limb_shapes,
    pattern_shapes,
    pupil_shapes,
    rectangle,
    rotation,
    tail_shapes,
)

_SUPERSAMPLE = 4
Colour = tuple[int, int, int]

_INK = (40, 30, 48)
_INK_WIDTH = 0.09  # critter units

_COLOUR = {
    "red": (224, 26, 40),
    "orange": (255, 140, 0),
    "green": (30, 168, 56),
    "blue": (24, 84, 255),
    "purple": (156, 36, 196),
    "pink": (255, 150, 205),
    "grey": (118, 126, 136),
}
_SECOND = {
    "white": (255, 255, 255),
    "black": (26, 22, 30),
    "yellow": (255, 240, 70),
    "aqua": (72, 228, 226),
    "brown": (156, 84, 28),
}
_ACCESSORY_COLOUR = {
    "balloon": (240, 30, 60),
    "flag": (30, 60, 220),
    "box": (255, 205, 40),
    "cape": (150, 40, 170),
    "board": (20, 150, 130),
}

# Pose: facing (1 right, -1 left), turn in degrees clockwise after facing, lift off the ground in
# frame units, distance
# from the body's centre down to the ground in critter units, centre's x offset in critter units.
_POSE = {
    "standing": (1, 0.0, 0.0, 1.24, 0.32),
    "running": (-1, -16.0, 0.0, 1.24, -0.36),
    "jumping": (1, -26.0, 0.06, 1.24, 0.30),
    "lying": (1, 90.0, 0.0, 1.10, -0.22),
}
_UNIT = {"big": 0.285, "small": 0.235}  # length of a critter unit in frame units
_SHIFT = {
    "left": -6 / 64,
    "middle": 0.0,
    "right": 6 / 64,
}  # whole pixels at 64, so that masks only move
_GROUND = 0.93  # where feet stand, in frame units
_HORIZON = 0.60


# --- masks
# ----------------------------------------------------------------------------------------------------------

Mask = tuple[Image.Image, int, int]
"""An L image and where its left upper corner lies in the frame, in pixels (for the middle
position)."""


def _centre(pose: str, scale: str) -> tuple[float, float]:
    _, _, lift, drop, offset = _POSE[pose]
    return 0.5 + offset * _UNIT[scale], _GROUND - lift - drop * _UNIT[scale]


def _to_frame(pose: str, scale: str) -> Callable[[np.ndarray], np.ndarray]:
    facing, turn, *_ = _POSE[pose]
    matrix = (rotation(turn) @ np.diag([facing, 1])).T * _UNIT[scale]
    centre = _centre(pose, scale)
    return lambda points: points @ matrix + centre


def _upright(pose: str, scale: str) -> Callable[[np.ndarray], np.ndarray]:
    """As `_to_frame`, without the pose's turn: for things that hang or stand beside the critter."""
    centre = _centre(pose, scale)
    return lambda points: points * (_POSE[pose][0] * _UNIT[scale], _UNIT[scale]) + centre


class _Canvas:
    """A supersampled mask, a quarter of the frame wider on every side, so that a moved part is
    still whole."""

    def __init__(self, size: int) -> None:
        self.size, self.margin = size, size // 4
        side = (size + 2 * self.margin) * _SUPERSAMPLE
        self.image = Image.new("L", (side, side), 0)
        self.draw = ImageDraw.Draw(self.image)

    def polygon(self, points: np.ndarray, grow: Number = 0, fill: int = 255) -> None:
        """Fill a polygon given in frame units; `grow` widens it all around, in frame units."""
        pixels = (points * self.size + self.margin) * _SUPERSAMPLE - 0.5
        flat = pixels.ravel().tolist()
        self.draw.polygon(flat, fill=fill)
        if grow:
            width = max(1, round(2 * grow * self.size * _SUPERSAMPLE))
            self.draw.line(flat + flat[:4], fill=fill, width=width, joint="curve")

    def cut(self, other: "_Canvas") -> None:
        self.image = ImageChops.darker(self.image, other.image)

    def remove(self, other: "_Canvas") -> None:
        self.image = ImageChops.subtract(self.image, other.image)

    def mask(self) -> Mask:
        small = self.image.reduce(_SUPERSAMPLE)
        box = small.getbbox()
        if box is None:
            return Image.new("L", (1, 1), 0), 0, 0
        return small.crop(box), box[0] - self.margin, box[1] - self.margin


def _filled(
    polygons: list[np.ndarray],
    place: Callable[[np.ndarray], np.ndarray],
    size: int,
    grow: Number = 0,
) -> _Canvas:
    canvas = _Canvas(size)
    for polygon in polygons:
        canvas.polygon(place(polygon), grow)
    return canvas


@lru_cache(maxsize=8192)
def _part(kind: str, value: str, shape: str, pose: str, scale: str, size: int) -> tuple[Mask, ...]:
    """Masks of one part: the inked outline first where it has one, then its fills from back to
    front."""
    place, ink = _to_frame(pose, scale), _INK_WIDTH * _UNIT[scale]
    body = [body_outline(shape)]
    if kind == "body":
        canvases = [_filled(body, place, size, ink), _filled(body, place, size)]
    elif kind == "limbs":
        limbs = limb_shapes(pose, shape)
        canvases = [_filled(limbs, place, size, ink), _filled(limbs, place, size)]
    elif kind == "ears":
        outer, inner = ear_shapes(value, shape)
        canvases = [
            _filled(outer, place, size, ink),
            _filled(outer, place, size),
            _filled(inner, place, size),
        ]
    elif kind == "tail":
        tail = tail_shapes(value, shape)
        canvases = [_filled(tail, place, size, ink), _filled(tail, place, size)]
    elif kind == "pattern":
        canvases = [_filled(pattern_shapes(value), place, size)]
        canvases[0].cut(_filled(body, place, size))
    elif kind == "eyes":
        centres = eye_centres(shape)
        eyes = [ellipse(x, y, EYE_RADIUS, EYE_RADIUS) for x, y in centres]
        canvases = [_filled(eyes, place, size, ink), _filled(eyes, place, size)]
        # The pupil is left out of the white, so that the ink below shows: a dark layer on top would
        # leave a pale rim.
        for x, y in centres:
            dark, holes = pupil_shapes(value, x, y)
            pupil = _filled(dark, place, size)
            for hole in holes:
                pupil.polygon(place(hole), fill=0)
            canvases[1].remove(pupil)
    else:  # mouth: a smile below the eyes
        angle = np.linspace(0, np.pi, 16)
        y = FACE_Y[shape] + 0.52
        smile = np.stack([0.14 + 0.26 * np.cos(angle), y + 0.2 * np.sin(angle)], axis=1)
        canvases = [_filled([smile], place, size, ink * 0.4)]
    return tuple(canvas.mask() for canvas in canvases)


@lru_cache(maxsize=512)
def _accessory(value: str, pose: str, scale: str, size: int) -> tuple[Mask, ...]:
    """Outline, fill and trim of what the critter has with it; always behind it, so that it hides
    nothing."""
    upright, turned, ink = _upright(pose, scale), _to_frame(pose, scale), _INK_WIDTH * _UNIT[scale]
    floor = _POSE[pose][3]
    place, trim = upright, []
    if value == "balloon":
        shapes = [ellipse(1.12, -1.0, 0.52, 0.58)]
        trim = [np.array([(1.08, -0.5), (1.16, -0.5), (0.84, 0.5), (0.76, 0.5)])]
    elif value == "flag":
        shapes = [
            np.array([(0.98, -1.45), (1.72, -1.1), (0.98, -0.55)]),
            rectangle(0.98, -1.45, 1.1, floor),
        ]
    elif value == "box":
        shapes = [rectangle(0.62, floor - 0.98, 1.56, floor)]
        trim = [
            rectangle(1.1, floor - 0.98, 1.28, floor),
            rectangle(0.62, floor - 0.6, 1.56, floor - 0.42),
        ]
    elif value == "cape":
        place = turned
        shapes = [
            np.array(
                [(-0.6, -0.8), (0.6, -0.8), (1.42, 1.18), (0.5, 1.0), (-0.3, 1.2), (-1.46, 1.1)]
            )
        ]
    else:
        shapes = [rectangle(-1.35, floor - 0.04, 1.35, floor + 0.2)]
        trim = [ellipse(x, floor + 0.22, 0.18, 0.18) for x in (-0.9, 0.9)]
    canvases = [
        _filled(shapes, place, size, ink),
        _filled(shapes, place, size),
        _filled(trim, place, size),
    ]
    return tuple(canvas.mask() for canvas in canvases)


# --- backgrounds
# ----------------------------------------------------------------------------------------------------

_SKY = {"day": (158, 214, 250), "sunset": (252, 176, 128), "night": (40, 46, 104)}
_LIGHT = {"day": (1.0, 1.0, 1.0), "sunset": (1.0, 0.76, 0.68), "night": (0.40, 0.44, 0.66)}
_GROUND_COLOUR = {
    "beach": (246, 226, 160),
    "forest": (96, 130, 84),
    "city": (150, 148, 152),
    "snow": (246, 250, 255),
    "desert": (226, 150, 92),
    "meadow": (160, 218, 110),
}


@lru_cache(maxsize=64)
def draw_background(place: str, time: str, size: int) -> Image.Image:
    """A place at a time of day, without anyone: RGB, `size` x `size` pixels. Not to be drawn on."""
    big = size * _SUPERSAMPLE
    image = Image.new("RGB", (big, big), _SKY[time])
    draw = ImageDraw.Draw(image)

    def lit(colour: Colour) -> Colour:
        red, green, blue = (round(c * light) for c, light in zip(colour, _LIGHT[time], strict=True))
        return red, green, blue

    def shape(points: list[tuple[Number, Number]], colour: Colour) -> None:
        draw.polygon([(x * big, y * big) for x, y in points], fill=lit(colour))

    def disc(x: Number, y: Number, r: Number, colour: Colour) -> None:
        draw.ellipse([(x - r) * big, (y - r) * big, (x + r) * big, (y + r) * big], fill=colour)

    def band(top: Number, bottom: Number, colour: Colour) -> None:
        draw.rectangle([0, top * big, big, bottom * big], fill=lit(colour))

    if time == "day":
        disc(0.86, 0.12, 0.09, (255, 244, 170))
    elif time == "sunset":
        disc(0.16, 0.46, 0.14, (255, 108, 72))
    else:
        disc(0.84, 0.14, 0.09, (244, 240, 214))
        disc(0.80, 0.12, 0.07, _SKY[time])
        for x, y in ((0.1, 0.1), (0.3, 0.2), (0.55, 0.08), (0.18, 0.34), (0.68, 0.3), (0.93, 0.38)):
            disc(x, y, 0.012, (244, 240, 214))
    ground = _GROUND_COLOUR[place]
    if place == "beach":
        band(0.42, 0.68, (70, 160, 214))
        band(0.68, 1, ground)
    elif place == "forest":
        for x, top in ((0.0, 0.12), (0.22, 0.0), (0.45, 0.14), (0.68, 0.02), (0.92, 0.1)):
            shape([(x - 0.17, 0.7), (x, top), (x + 0.17, 0.7)], (66, 112, 80))
        band(0.66, 1, ground)
    elif place == "city":
        for left, top, right in (
            (0.0, 0.2, 0.2),
            (0.22, 0.34, 0.36),
            (0.38, 0.1, 0.58),
            (0.6, 0.3, 0.74),
            (0.76, 0.16, 1),
        ):
            shape([(left, 0.7), (left, top), (right, top), (right, 0.7)], (186, 164, 176))
        band(0.68, 1, ground)
    elif place == "snow":
        shape([(-0.1, 0.7), (0.22, 0.14), (0.56, 0.7)], (206, 218, 236))
        shape([(0.4, 0.7), (0.78, 0.22), (1.15, 0.7)], (218, 228, 242))
        band(0.6, 1, ground)
    elif place == "desert":
        shape([(0, 0.5), (0.3, 0.4), (0.62, 0.52), (1, 0.4), (1, 1), (0, 1)], (240, 176, 112))
        band(0.66, 1, ground)
    else:
        draw.ellipse([-0.5 * big, 0.36 * big, 0.7 * big, 1.2 * big], fill=lit((132, 200, 96)))
        draw.ellipse([0.3 * big, 0.42 * big, 1.5 * big, 1.3 * big], fill=lit((146, 210, 102)))
        band(0.7, 1, ground)
        for x, y in ((0.06, 0.78), (0.2, 0.9), (0.5, 0.96), (0.8, 0.8), (0.94, 0.92)):
            disc(x, y, 0.025, lit((255, 150, 190)))
    return image.reduce(_SUPERSAMPLE)


# --- pictures
# -------------------------------------------------------------------------------------------------------


def _paste(image: Image.Image, mask: Mask, colour: Colour, shift: int) -> None:
    pixels, x, y = mask
    image.paste(colour, (x + shift, y, x + shift + pixels.width, y + pixels.height), pixels)


def _shade(colour: Colour, factor: float) -> Colour:
    red, green, blue = (round(channel * factor) for channel in colour)
    return red, green, blue


def _draw_critter(
    image: Image.Image, subject: Subject, pose: str, scale: str, size: int, shift: int
) -> None:
    names = {
        factor: SUBJECT_FACTORS[factor][index]
        for factor, index in zip(Subject._fields, subject, strict=True)
    }
    shape, colour, second = names["body"], _COLOUR[names["colour"]], _SECOND[names["second"]]
    fills = {
        "tail": (_INK, second),
        "limbs": (_INK, _shade(colour, 0.8)),
        "ears": (_INK, colour, second),
        "body": (_INK, colour),
        "pattern": (second,),
        "mouth": (_INK,),
        "eyes": (_INK, (255, 255, 255)),
    }
    for kind, colours in fills.items():
        masks = _part(kind, names.get(kind, ""), shape, pose, scale, size)
        for mask, fill in zip(masks, colours, strict=True):
            _paste(image, mask, fill, shift)


def _check(size: int) -> None:
    if size < 64:
        raise ValueError(f"size is {size} pixels; a critter needs at least 64")


def draw_reference(subject: Subject, pose: int, size: int = 64) -> np.ndarray:
    """The subject alone, big, in the middle of a plain light ground: uint8 [size, size, 3].
    `size` >= 64."""
    _check(size)
    image = Image.new("RGB", (size, size), (236, 234, 240))
    _draw_critter(image, subject, POSES[pose], "big", size, 0)
    return np.asarray(image)


def draw_scene(subject: Subject, scene: Scene, size: int = 64) -> np.ndarray:
    """The subject in the scene: uint8 [size, size, 3]. `size` >= 64; another size is the same
    picture, scaled."""
    _check(size)
    names = {
        factor: SCENE_FACTORS[factor][index]
        for factor, index in zip(Scene._fields, scene, strict=True)
    }
    image = draw_background(names["place"], names["time"], size).copy()
    shift = round(_SHIFT[names["position"]] * size)
    pose, scale, accessory = names["pose"], names["size"], names["accessory"]
    colour = _ACCESSORY_COLOUR[accessory]
    for mask, fill in zip(
        _accessory(accessory, pose, scale, size), (_INK, colour, _shade(colour, 0.55)), strict=True
    ):
        _paste(image, mask, fill, shift)
    _draw_critter(image, subject, pose, scale, size, shift)
    return np.asarray(image)
