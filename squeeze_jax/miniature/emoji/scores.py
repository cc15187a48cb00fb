"""Judging pictures of emoji without a learned judge: which subject, and which scene, is nearest?

*Subject*: the true subject and fifteen others of its category are drawn where the scene has it; the
picture's own crop, moved and scaled by a little for the best fit, is compared with each, pixel by
pixel. *Scene*: for each factor that the prompt names, the true scene is compared with one that
differs in that factor. The nearest in mean squared error wins; a tie is a miss. Prompts of the exam
say everything, but for the sizes of two subjects, which no prompt names: there every scene stands
for all its sizes, and the nearest of them counts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
from PIL import Image

from squeeze_jax.miniature.emoji.pairs import Pair
from squeeze_jax.miniature.emoji.scenes import (
    FACTORS,
    Placement,
    Scene,
    bounds_of,
    draw_copied,
    draw_scene,
)
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
        self.truth = self._draw(scene)
        self.others = [
            self._draw_candidates(candidates_of(scene, place, rng), place)
            for place in range(len(pair.views))
        ]
        self.changed = {name: self._draw(_with_factor(scene, name, rng)) for name in _asked(pair)}
        pasted = draw_copied(scene, pair.views, pair.height, pair.width)
        self.copied = [_pixels(pasted)]
        self.exchanged = self._draw(_exchanged(scene)) if len(pair.views) == 2 else None

    def _draw(self, scene: Scene) -> list[np.ndarray]:
        """The scene's pictures, in all sizes that the prompt leaves free."""
        choices = [self._sizes(one) for one in scene.placements]
        scenes = [
            scene._replace(
                placements=tuple(
                    one._replace(size=size)
                    for one, size in zip(scene.placements, sizes, strict=True)
                )
            )
            for sizes in product(*choices)
        ]
        return [_pixels(draw_scene(one, self.pair.height, self.pair.width)) for one in scenes]

    def _sizes(self, one: Placement) -> tuple[str, ...]:
        return (one.size,) if "size" in self.pair.prompt.said else FACTORS["size"]

    def _draw_candidates(
        self, candidates: Sequence[Scene], place: int
    ) -> list[tuple[Box, list[np.ndarray]]]:
        """For each size that subject number `place` may have, its box and what every candidate
        shows there."""
        height, width, found = self.pair.height, self.pair.width, []
        for size in self._sizes(candidates[0].placements[place]):
            scenes = [_with_placement(one, place, size=size) for one in candidates]
            box = bounds_of(scenes[0], place, height, width)
            found.append((box, [_crop(draw_scene(one, height, width), box) for one in scenes]))
        return found

    def judge(self, picture: np.ndarray) -> Judged:
        image, pixels = Image.fromarray(picture), picture.astype(np.float32)
        subjects = []
        for sizes in self.others:
            distances = np.min([_best_fits(image, *one) for one in sizes], axis=0)
            subjects.append(bool(distances[0] < distances[1:].min()))
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
    rivals = _rivals(scene, place, rng)
    return [scene, *(_with_placement(scene, place, subject=one, look=0) for one in rivals)]


def _with_placement(scene: Scene, place: int, **changes: Subject | str | int) -> Scene:
    """The scene with some fields of one placement changed."""
    placements = list(scene.placements)
    placements[place] = placements[place]._replace(**changes)
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
    return _with_placement(scene, 0, **{factor: other})


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


def _best_fits(image: Image.Image, box: Box, candidates: Sequence[np.ndarray]) -> list[float]:
    """Of each candidate its distance from the picture's crop where that fits it best."""
    crops = np.stack([_crop(image, moved) for moved in _moved(box)])
    return [float(np.square(crops - one).mean((1, 2, 3)).min()) for one in candidates]


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


def _distance(picture: np.ndarray, others: Sequence[np.ndarray]) -> float:
    """Mean squared error to the nearest of the others."""
    return min(float(np.square(picture - other).mean()) for other in others)
