"""The shapes a critter is made of, as polygons in *critter units*: a body of radius 1 around (0,
0), x forward, y down.

Every function takes names of values (`SUBJECT_FACTORS`, `POSES`) and returns polygons, float arrays
[points, 2]. Parts are big on purpose: a part of few pixels is what a small model learns last.
"""

from functools import cache

import numpy as np

EYE_RADIUS = 0.38

Number = float | int
"""A length in critter units or an angle in degrees (the tests' type checker takes a bare `float`
literally)."""


def ellipse(x: Number, y: Number, rx: Number, ry: Number, turn: Number = 0) -> np.ndarray:
    """Polygon [48, 2] of an ellipse turned by `turn` degrees clockwise."""
    angle = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    points = np.stack([rx * np.cos(angle), ry * np.sin(angle)], axis=1)
    return points @ rotation(turn).T + (x, y)


def rotation(degrees: Number) -> np.ndarray:
    angle = np.deg2rad(degrees)
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def rectangle(left: Number, top: Number, right: Number, bottom: Number) -> np.ndarray:
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)])


@cache
def body_outline(shape: str) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, 180, endpoint=False)
    cos, sin = np.cos(angle), np.sin(angle)
    if shape == "round":
        return ellipse(0, 0, 1.02, 1.02)
    if shape == "tall":
        return ellipse(0, -0.06, 0.72, 1.10)
    if shape == "wide":
        return ellipse(0, 0.22, 1.18, 0.80)
    if shape == "square":
        power = 2 / 7
        return (
            np.stack([np.sign(cos) * abs(cos) ** power, np.sign(sin) * abs(sin) ** power], axis=1)
            * 0.94
        )
    if shape == "pear":
        return np.stack([cos * (0.86 + 0.34 * sin), sin], axis=1)
    radius = 0.84 + 0.32 * np.abs(((angle / (2 * np.pi) * 9 + 0.25) % 1) * 2 - 1)
    return np.stack([radius * cos, radius * sin], axis=1)


FACE_Y = {
    "round": -0.20,
    "tall": -0.36,
    "square": -0.22,
    "pear": -0.30,
    "wide": 0.06,
    "spiky": -0.20,
}


def _anchor(shape: str, degrees: Number) -> np.ndarray:
    """The point of the body's edge in that direction, clockwise from the top."""
    edge = body_outline(shape)
    direction = np.deg2rad(degrees)
    return edge[
        np.argmax(edge @ (np.sin(direction), -np.cos(direction)) / np.linalg.norm(edge, axis=1))
    ]


def ear_shapes(value: str, shape: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Outer and inner polygons of both ears."""
    outer, inner = [], []
    for side in (-1, 1):
        x, y = _anchor(shape, 38 * side)
        if value == "pointed":
            ear = np.array([(-0.46, 0.10), (0.36, 0.46), (0.22, -0.74)]) * (side, 1)
            outer.append(np.add(ear, (x, y)))
            inner.append(np.add(ear * 0.56, (x + 0.03 * side, y - 0.06)))
        elif value == "round":
            outer.append(ellipse(x + 0.14 * side, y - 0.18, 0.46, 0.46))
            inner.append(ellipse(x + 0.16 * side, y - 0.20, 0.27, 0.27))
        elif value == "long":
            outer.append(ellipse(x - 0.12 * side, y - 0.32, 0.24, 0.66, 6 * side))
            inner.append(ellipse(x - 0.12 * side, y - 0.38, 0.12, 0.46, 6 * side))
        elif value == "floppy":
            outer.append(ellipse(x + 0.42 * side, y + 0.24, 0.32, 0.72, -32 * side))
            inner.append(ellipse(x + 0.52 * side, y + 0.38, 0.18, 0.46, -32 * side))
        else:
            tip = np.array([x + 0.22 * side, y - 0.50])
            across = np.array([0.07, 0.03 * side])
            outer.append(
                np.stack(
                    [(x, y) - across * 1.2, (x, y + 0.1) + across * 1.2, tip + across, tip - across]
                )
            )
            outer.append(ellipse(tip[0], tip[1], 0.30, 0.30))
            inner.append(ellipse(tip[0], tip[1], 0.30, 0.30))
    return outer, inner


def tail_shapes(value: str, shape: str) -> list[np.ndarray]:
    x, y = _anchor(shape, -112)
    if value == "pompom":
        return [ellipse(x - 0.36, y + 0.06, 0.50, 0.50)]
    if value == "bushy":
        return [ellipse(x - 0.28, y - 0.62, 0.36, 0.96, -8)]
    if value == "fish":
        points = [
            (0.3, -0.1),
            (-0.30, -0.22),
            (-0.94, -0.86),
            (-0.74, 0.04),
            (-0.94, 0.90),
            (-0.30, 0.30),
            (0.3, 0.2),
        ]
    elif value == "spike":
        points = [(0.34, -0.40), (0.34, 0.66), (-0.46, 0.86), (-1.02, 0.84), (-0.42, 0.30)]
    else:
        points = [
            (0.2, 0.40),
            (-0.62, 0.34),
            (-0.44, -0.22),
            (-1.0, -0.22),
            (-0.66, -1.22),
            (-0.04, -0.70),
        ]
        points += [(-0.24, -0.46), (0.24, -0.30)]
    return [np.add(points, (x, y))]


def pattern_shapes(value: str) -> list[np.ndarray]:
    """Polygons over half of the body, later cut to it; any two values differ on half of it or more."""
    below, above = rectangle(-2, 0.08, 2, 2), rectangle(-2, -2, 2, 0.08)
    front, back = rectangle(0.14, -2, 2, 2), rectangle(-2, -2, 0.14, 2)
    if value == "dipped":
        return [below]
    if value == "capped":
        return [above]
    if value == "masked":
        return [front]
    if value == "saddled":
        return [back]
    return [rectangle(-2, -2, 0.14, 0.08), rectangle(0.14, 0.08, 2, 2)]


def eye_centres(shape: str) -> list[tuple[Number, Number]]:
    return [(0.14 - 0.42, FACE_Y[shape]), (0.14 + 0.42, FACE_Y[shape])]


def pupil_shapes(value: str, x: Number, y: Number) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The dark polygons of one eye and the holes in them; about half the eye is dark in every kind."""
    if value == "round":
        return [ellipse(x, y, 0.26, 0.26)], []
    if value == "slit":
        return [ellipse(x, y, 0.18, 0.46)], []
    if value == "sleepy":
        return [rectangle(x - 0.5, y - 0.5, x + 0.5, y + 0.02)], []
    if value == "ring":
        return [ellipse(x, y, 0.5, 0.5)], [ellipse(x, y, 0.24, 0.24)]
    bar = rectangle(-0.5, -0.1, 0.5, 0.1)
    return [np.add(bar @ rotation(turn).T, (x, y)) for turn in (45, -45)], []


def limb_shapes(pose: str, shape: str) -> list[np.ndarray]:
    bottom = body_outline(shape)[:, 1].max()
    left, right = _anchor(shape, -100)[0], _anchor(shape, 100)[0]
    if pose == "running":
        feet = [
            ellipse(-0.62, bottom + 0.02, 0.34, 0.19, 24),
            ellipse(0.62, bottom + 0.02, 0.34, 0.19, -24),
        ]
        hands = [ellipse(left, 0.25, 0.34, 0.17, 30), ellipse(right, 0.25, 0.34, 0.17, -30)]
    elif pose == "jumping":
        feet = [
            ellipse(-0.5, bottom + 0.02, 0.20, 0.26, 20),
            ellipse(0.5, bottom + 0.02, 0.20, 0.26, -20),
        ]
        hands = [ellipse(left, -0.12, 0.36, 0.17, 45), ellipse(right, -0.12, 0.36, 0.17, -45)]
    else:
        feet = [ellipse(-0.42, bottom + 0.08, 0.34, 0.18), ellipse(0.46, bottom + 0.08, 0.34, 0.18)]
        hands = [ellipse(left, 0.36, 0.30, 0.17, -50), ellipse(right, 0.36, 0.30, 0.17, 50)]
    return feet + hands
