"""Judging pictures of emoji without a learned judge: which subject, and which scene, is nearest?

*Subject*: the true subject and fifteen others of its category are drawn where the scene has it; the
picture's own crop, moved and scaled by a little for the best fit, is compared with each, pixel by
pixel. *Scene*: for each factor that the prompt names, the true scene is compared with one that
differs in that factor. The nearest in mean squared error wins; a tie is a miss. Every prompt of the
exam says everything.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from squeeze_jax.miniature.emoji.pairs import Pair
from squeeze_jax.miniature.emoji.scenes import FACTORS, Scene, bounds_of, draw_copied, draw_scene
from squeeze_jax.miniature.emoji.subjects import SUBJECTS, Subject
from squeeze_jax.miniature.scores import Share, wilson

CANDIDATES = 16
CHANCE = 1 / CANDIDATES
CROP = 24
"""Side to which a crop is brought before it is compared, in pixels."""
SHIFTS = (-4, -2, 0, 2, 4)
"""Pixels by which a crop is moved, right and down, for the best fit."""
SCALES = (0.85, 1.0, 1.18)
"""Factors by which its sides grow, for the best fit."""

Box = tuple[int, int, int, int] | tuple[float, float, float, float]
"""Left, upper, right and lower edge in pixels."""


class Judged(NamedTuple):
    """What was found in one picture."""

    subjects: tuple[bool, ...]
    """For each subject of the scene: the true one was strictly the nearest of its candidates."""
    swapped: bool
    """Two subjects whose exchanged scene is nearer than the true one."""
    factors: dict[str, bool]
    """For each factor of the scene: it is nearer to the truth than to another value."""
    copied: bool
    """The scene with the subjects at their references' angle and size is nearer than the true one:
    copy-paste."""


@dataclass(frozen=True)
class EmojiScores:
    """The shares of one way of drawing, on the same pairs in the same order."""

    judged: list[Judged]

    def subject(self) -> Share:
        """All subjects of a picture are right, and in their places."""
        hits = [all(one.subjects) for one in self.judged]
        return wilson(sum(hits), len(hits))

    def hits(self) -> np.ndarray:
        """bool [n]: `subject` pair by pair."""
        return np.array([all(one.subjects) for one in self.judged])

    def swapped(self) -> Share:
        return wilson(sum(one.swapped for one in self.judged), len(self.judged))

    def copied(self) -> Share:
        return wilson(sum(one.copied for one in self.judged), len(self.judged))

    def factor(self, name: str) -> Share:
        hits = [one.factors[name] for one in self.judged if name in one.factors]
        return wilson(sum(hits), len(hits))

    def scene(self) -> Share:
        """Over all factors of all pictures."""
        hits = [hit for one in self.judged for hit in one.factors.values()]
        return wilson(sum(hits), len(hits))

    def to_json(self) -> dict:
        names = [name for name in FACTORS if any(name in one.factors for one in self.judged)]
        return {
            "subject": self.subject()._asdict()
            | {"hits": "".join("01"[int(hit)] for hit in self.hits())},
            "swapped": self.swapped()._asdict(),
            "copied": self.copied()._asdict(),
            "scene": self.scene()._asdict(),
            "factors": {name: self.factor(name)._asdict() for name in names},
        }


def judge_all(
    settings: Mapping[str, np.ndarray], pairs: Sequence[Pair], seed: int = 0
) -> dict[str, EmojiScores]:
    """Judges several ways of drawing the same pairs.

    settings: a name to pictures uint8 [n, height, width, 3], picture i made for pairs[i]; seed
    draws the candidates. Raises ValueError where a picture has another size than its pair.
    """
    judged: dict[str, list[Judged]] = {name: [] for name in settings}
    for place, pair in enumerate(pairs):
        rng = np.random.default_rng((seed, pair.number))
        exam = _Exam(pair, rng)
        for name, pictures in settings.items():
            picture = pictures[place]
            if picture.shape != (pair.height, pair.width, 3) or picture.dtype != np.uint8:
                wanted = f"uint8 {(pair.height, pair.width, 3)}"
                raise ValueError(f"{name}: {picture.dtype} {picture.shape}, wanted {wanted}")
            judged[name].append(exam.judge(picture))
    return {name: EmojiScores(of) for name, of in judged.items()}


class _Exam:
    """What one pair's pictures are compared with."""

    def __init__(self, pair: Pair, rng: np.random.Generator) -> None:
        self.pair, scene = pair, pair.scene
        self.truth = _pixels(draw_scene(scene, pair.height, pair.width))
        self.boxes = [bounds_of(scene, i, pair.height, pair.width) for i in range(len(pair.views))]
        self.others: list[list[np.ndarray]] = []
        for place, box in enumerate(self.boxes):
            candidates = candidates_of(scene, place, rng)
            drawn = [draw_scene(one, pair.height, pair.width) for one in candidates]
            self.others.append([_crop(picture, box) for picture in drawn])
        self.changed = {name: self._draw(_with_factor(scene, name, rng)) for name in _asked(pair)}
        pasted = draw_copied(scene, pair.views, pair.height, pair.width)
        self.copied = _pixels(pasted)
        self.exchanged = self._draw(_exchanged(scene)) if len(pair.views) == 2 else None

    def _draw(self, scene: Scene) -> np.ndarray:
        return _pixels(draw_scene(scene, self.pair.height, self.pair.width))

    def judge(self, picture: np.ndarray) -> Judged:
        image, pixels = Image.fromarray(picture), picture.astype(np.float32)
        subjects = []
        for box, candidates in zip(self.boxes, self.others, strict=True):
            crops = np.stack([_crop(image, moved) for moved in _moved(box)])
            distances = [float(np.square(crops - c).mean((1, 2, 3)).min()) for c in candidates]
            subjects.append(distances[0] < min(distances[1:]))
        off = _distance(pixels, self.truth)
        factors = {name: off < _distance(pixels, other) for name, other in self.changed.items()}
        swapped = self.exchanged is not None and _distance(pixels, self.exchanged) < off
        return Judged(tuple(subjects), swapped, factors, _distance(pixels, self.copied) < off)


def _asked(pair: Pair) -> list[str]:
    """The factors that the prompt names and that can be told by redrawing."""
    two = len(pair.views) == 2  # where they stand is asked by `subjects` and `swapped`
    return [
        name for name in FACTORS if name in pair.prompt.said and not (two and name == "position")
    ]


def _rivals(scene: Scene, place: int, rng: np.random.Generator) -> list[Subject]:
    """Others of the subject's category, and where there is one the scene's other subject."""
    mine = {one.subject.number for one in scene.placements}
    kind = scene.placements[place].subject.category
    known = [s for s in SUBJECTS if s.category == kind and s.number not in mine]
    drawn = [known[i] for i in rng.permutation(len(known))[: CANDIDATES - len(mine)]]
    return drawn + [one.subject for i, one in enumerate(scene.placements) if i != place]


def candidates_of(scene: Scene, place: int, rng: np.random.Generator) -> list[Scene]:
    """What subject number `place` is to be told among: the scene itself, then fifteen that have
    another subject there."""
    return [scene, *(_with_subject(scene, place, s) for s in _rivals(scene, place, rng))]


def _with_subject(scene: Scene, place: int, subject: Subject) -> Scene:
    placements = list(scene.placements)
    placements[place] = placements[place]._replace(subject=subject, look=0)
    return scene._replace(placements=tuple(placements))


def _with_factor(scene: Scene, factor: str, rng: np.random.Generator) -> Scene:
    """The scene with another value of one factor."""
    of_scene = factor in Scene._fields
    first = scene.placements[0]
    value = getattr(scene if of_scene else first, factor)
    others = [other for other in FACTORS[factor] if other != value]
    other = others[int(rng.integers(len(others)))]
    if of_scene:
        return scene._replace(**{factor: other})
    return scene._replace(placements=(first._replace(**{factor: other}), *scene.placements[1:]))


def _exchanged(scene: Scene) -> Scene:
    """The two subjects in each other's places."""
    one, other = scene.placements
    return scene._replace(
        placements=(
            one._replace(subject=other.subject, look=other.look),
            other._replace(subject=one.subject, look=one.look),
        )
    )


def _moved(box: Box) -> list[Box]:
    left, upper, right, lower = box
    moved = []
    for scale in SCALES:
        wide, high = (right - left) * scale / 2, (lower - upper) * scale / 2
        for x in SHIFTS:
            for y in SHIFTS:
                cx, cy = (left + right) / 2 + x, (upper + lower) / 2 + y
                moved.append((cx - wide, cy - high, cx + wide, cy + high))
    return moved


def _crop(image: Image.Image, box: Box) -> np.ndarray:
    """The part of a picture in a box, which may reach out of it: float32 [CROP, CROP, 3]."""
    left, upper, right, lower = box
    transform = ((right - left) / CROP, 0, left, 0, (lower - upper) / CROP, upper)
    crop = image.transform(
        (CROP, CROP), Image.Transform.AFFINE, transform, Image.Resampling.BILINEAR
    )
    return _pixels(crop)


def _pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, np.float32)


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.square(a - b).mean())
