"""Judging pictures of critters without a learned judge: is the right picture the nearest of
sixteen?

Every picture can be redrawn, so a generated one is compared, pixel by pixel, with the true target
and fifteen others. *Subject* tasks vary the creature in the prompted scene, *scene* tasks the scene
around the right creature. *Easy*: the others are random; *hard*: each differs from the truth in
exactly one factor. The nearest in mean squared error wins, and a tie is a miss. Chance is 1 in 16.
Where pictures come out of an autoencoder, the candidates pass through it too (`codec`), so that its
blur does not count.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from squeeze_jax.miniature.critters import (
    SCENE_FACTORS,
    SUBJECT_FACTORS,
    Pair,
    draw_reference,
    draw_scene,
    scene_distractors,
    subject_distractors,
)

CANDIDATES = 16
CHANCE = 1 / CANDIDATES
TASKS = ("subject easy", "scene easy", "subject hard", "scene hard")

Codec = Callable[[np.ndarray], np.ndarray]
"""Encode and decode: float32 [batch, H, W, 3] in [0, 1] to the same; batch is always
`CODEC_BATCH` (one compile)."""
CODEC_BATCH = 64

_OTHERS = CANDIDATES - 1
_CHUNK = 16  # pairs: sixteen pairs' candidates are 46 MB as float32 at 64 pixels
_POOL_FROM = 128  # pairs below which starting processes costs more than it saves


class Share(NamedTuple):
    """A share of successes in [0, 1] with its 95 % interval."""

    value: float
    low: float
    high: float


def wilson(successes: float | int, trials: int) -> Share:
    """The share of successes with Wilson's 95 % score interval."""
    if trials == 0:
        return Share(float("nan"), 0.0, 1.0)
    z, p = 1.959963984540054, successes / trials
    centre = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * np.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    return Share(p, min(p, max(0.0, float(centre - half))), max(p, min(1.0, float(centre + half))))


@dataclass(frozen=True)
class FactorScore:
    """How well one factor is told apart in a hard task."""

    share: Share
    """Of the candidates that differ in this factor, those farther from the picture than the truth;
    chance is one half.

    A pair's candidates are not independent, so the interval counts each pair once: it is on the
    wide side.
    """
    misses: int
    """Pairs for which the nearest candidate was wrong in this factor."""


@dataclass(frozen=True)
class Scores:
    """Retrieval by one set of pictures, on the pairs with these indices."""

    seed: int
    indices: np.ndarray
    """int [n], the pairs' indices."""
    hits: dict[str, np.ndarray]
    """For each of `TASKS`, bool [n]: the truth was strictly the nearest."""
    factors: dict[str, dict[str, FactorScore]]
    """For each hard task, every factor that was varied."""

    def share(self, task: str) -> Share:
        """Share of pairs retrieved in that task, with its 95 % interval."""
        return wilson(int(self.hits[task].sum()), len(self.indices))

    def to_json(self) -> dict:
        """Plain values; `hits` as one character a pair, so that two files can be compared pair
        by pair."""
        return {
            "chance": CHANCE,
            "seed": self.seed,
            "indices": self.indices.tolist(),
            "tasks": {
                task: self.share(task)._asdict() | {"hits": "".join("01"[int(hit)] for hit in hits)}
                for task, hits in self.hits.items()
            },
            "factors": {
                task: {
                    name: score.share._asdict() | {"misses": score.misses}
                    for name, score in factors.items()
                }
                for task, factors in self.factors.items()
            },
        }


# --- candidates
# -----------------------------------------------------------------------------------------------------


class _Candidates(NamedTuple):
    """What one pair is compared with: the truth, then 15 others for each of `TASKS`."""

    images: np.ndarray
    """uint8 [1 + 4 · 15, H, H, 3]."""
    changed: np.ndarray
    """int [4, 15]: the factor in which an other differs (the first such, for the easy tasks)."""


def _candidates(pair: Pair, seed: int, size: int) -> _Candidates:
    rng = np.random.default_rng((seed, pair.index))
    images, changed = [draw_scene(pair.subject, pair.scene, size)], []
    for hard in (False, True):
        subjects = subject_distractors(pair.subject, _OTHERS, rng, hard)
        scenes = scene_distractors(pair.scene, _OTHERS, rng, hard)
        images += [draw_scene(subject, pair.scene, size) for subject in subjects]
        images += [draw_scene(pair.subject, scene, size) for scene in scenes]
        changed.append(np.argmax(np.array(subjects) != pair.subject, axis=1))
        changed.append(np.argmax(np.array(scenes) != pair.scene, axis=1))
    return _Candidates(np.stack(images), np.stack(changed))


def _all_candidates(pairs: Sequence[Pair], seed: int, size: int) -> Iterator[_Candidates]:
    draw = partial(_candidates, seed=seed, size=size)
    processes = os.cpu_count() or 1
    if len(pairs) < _POOL_FROM or processes == 1:
        yield from map(draw, pairs)
        return
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap(draw, pairs, chunksize=_CHUNK)


def _unit(images: np.ndarray) -> np.ndarray:
    """Images as float32 in [0, 1]."""
    return (
        images.astype(np.float32) / 255 if images.dtype == np.uint8 else images.astype(np.float32)
    )


def _through(codec: Codec, images: np.ndarray) -> np.ndarray:
    """Images [n, H, W, 3] in [0, 1] through the codec, in full batches."""
    padding = -len(images) % CODEC_BATCH
    padded = np.concatenate([images, np.repeat(images[-1:], padding, axis=0)])
    batches = np.split(padded, len(padded) // CODEC_BATCH)
    decoded = np.concatenate([np.asarray(codec(batch), np.float32) for batch in batches])
    return decoded[: len(images)].clip(0, 1)


# --- scores
# ---------------------------------------------------------------------------------------------------------


def score_settings(
    settings: Mapping[str, np.ndarray], pairs: Sequence[Pair], seed: int, codec: Codec | None = None
) -> dict[str, Scores]:
    """Score several settings' pictures of the same pairs: the candidates are drawn, and coded, once
    for all.

    `settings` maps a name to images [n, H, H, 3], uint8 or floating in [0, 1], image i made for
    pairs[i]; `seed` draws the candidates. 512 pairs have 31,232 candidates: seconds to draw,
    minutes to pass through an autoencoder on a CPU. From 128 pairs on other processes draw them: a
    script that calls this needs `if __name__ == "__main__":`.
    """
    for name, images in settings.items():
        if (
            images.ndim != 4
            or images.shape[1] != images.shape[2]
            or images.shape[3] != 3
            or len(images) != len(pairs)
        ):
            raise ValueError(
                f"{name}: images {images.shape} for {len(pairs)} pairs; wanted ({len(pairs)}, H, H, 3)"
            )
        if images.dtype != np.uint8 and (
            not np.isfinite(images).all() or images.min() < 0 or images.max() > 1
        ):
            raise ValueError(
                f"{name}: floating images must be finite and in [0, 1], found {images.dtype} outside"
            )
    sizes = {images.shape[1] for images in settings.values()}
    if len(pairs) == 0 or len(sizes) != 1:
        raise ValueError(
            f"pairs and one picture size are needed, found {len(pairs)} pairs and sizes {sorted(sizes)}"
        )
    size = sizes.pop()

    distances: dict[str, list[np.ndarray]] = {name: [] for name in settings}
    changed: list[np.ndarray] = []

    def measure(chunk: list[_Candidates]) -> None:
        candidates = _unit(np.concatenate([c.images for c in chunk]))
        if codec is not None:
            candidates = _through(codec, candidates)
        candidates = candidates.reshape(len(chunk), -1, size * size * 3)
        for name, images in settings.items():
            mine = _unit(images[len(changed) : len(changed) + len(chunk)]).reshape(
                len(chunk), 1, -1
            )
            difference = candidates - mine
            distances[name] += list(
                np.einsum("ncp,ncp->nc", difference, difference) / (size * size * 3)
            )
        changed.extend(c.changed for c in chunk)

    chunk: list[_Candidates] = []
    for candidate in _all_candidates(pairs, seed, size):
        chunk.append(candidate)
        if len(chunk) == _CHUNK:
            measure(chunk)
            chunk = []
    if chunk:
        measure(chunk)
    indices = np.array([pair.index for pair in pairs])
    return {
        name: _scores(np.stack(d), np.stack(changed), indices, seed)
        for name, d in distances.items()
    }


def score(
    images: np.ndarray, pairs: Sequence[Pair], seed: int, codec: Codec | None = None
) -> Scores:
    """`score_settings` for one setting."""
    return score_settings({"": images}, pairs, seed, codec)[""]


def _scores(distances: np.ndarray, changed: np.ndarray, indices: np.ndarray, seed: int) -> Scores:
    """From distances [n, 61] (the truth first) and changed factors [n, 4, 15]."""
    truth = distances[:, :1]
    hits, factors = {}, {}
    for t, task in enumerate(TASKS):
        others = distances[:, 1 + t * _OTHERS : 1 + (t + 1) * _OTHERS]
        beaten = truth < others
        hits[task] = beaten.all(axis=1)
        if "hard" not in task:
            continue
        nearest = np.take_along_axis(changed[:, t], others.argmin(axis=1)[:, None], axis=1)[:, 0]
        factors[task] = {}
        for f, name in enumerate(SUBJECT_FACTORS if "subject" in task else SCENE_FACTORS):
            differs = changed[:, t] == f
            with_any = differs.any(axis=1)
            per_pair = (beaten & differs).sum(axis=1)[with_any] / differs.sum(axis=1)[with_any]
            factors[task][name] = FactorScore(
                share=wilson(float(per_pair.sum()), len(per_pair)),
                misses=int((~hits[task] & (nearest == f)).sum()),
            )
    return Scores(seed=seed, indices=indices, hits=hits, factors=factors)


def paired_difference(a: Scores, b: Scores, task: str, resamples: int = 10_000) -> Share:
    """Share of `a` minus share of `b` in [−1, 1], with the 95 % interval of a bootstrap over
    their common pairs."""
    if a.seed != b.seed or not np.array_equal(a.indices, b.indices):
        raise ValueError("paired scores need the same pairs and the same candidates (seed)")
    return paired_gain(a.hits[task], b.hits[task], resamples)


def paired_gain(a: np.ndarray, b: np.ndarray, resamples: int = 10_000) -> Share:
    """Share of hits `a` (bool [n]) minus that of `b` on the same pairs, in [−1, 1], with the 95 %
    interval of a bootstrap over the pairs."""
    difference = a.astype(int) - b.astype(int)
    n = len(difference)
    # A pair's difference is −1, 0 or 1, so a resample of n pairs is one multinomial draw of the
    # three counts.
    shares = [float((difference == value).mean()) for value in (-1, 0, 1)]
    counts = np.random.default_rng(0).multinomial(n, shares, size=resamples)
    low, high = np.quantile((counts[:, 2] - counts[:, 0]) / n, [0.025, 0.975])
    return Share(float(difference.mean()), float(low), float(high))


# --- what to compare with, and how to show it
# -----------------------------------------------------------------------


def references_pasted(pairs: Sequence[Pair], size: int = 64) -> np.ndarray:
    """The baseline that copies: every pair's reference, unchanged. uint8 [n, size, size, 3]."""
    return np.stack([draw_reference(pair.subject, pair.reference_pose, size) for pair in pairs])


def true_targets(pairs: Sequence[Pair], size: int = 64) -> np.ndarray:
    """The ceiling, once passed through the autoencoder: every pair's target. uint8 [n, size,
    size, 3]."""
    return np.stack([draw_scene(pair.subject, pair.scene, size) for pair in pairs])


def _percent(share: Share) -> str:
    return f"{100 * share.value:.1f} ({100 * share.low:.1f}–{100 * share.high:.1f})"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def render(rows: Mapping[str, Scores]) -> str:
    """Markdown: retrieval in percent with 95 % intervals, chance last, then both hard tasks by
    factor."""
    overall = [
        [name, *(_percent(scores.share(task)) for task in TASKS)] for name, scores in rows.items()
    ]
    overall.append(["chance", *[f"{100 * CHANCE:.2f}"] * len(TASKS)])
    parts = [_table(["right among 16, %", *TASKS], overall)]
    for task, names in (("subject hard", SUBJECT_FACTORS), ("scene hard", SCENE_FACTORS)):
        by_factor = [
            [name, *(_percent(s.factors[task][factor].share) for factor in names)]
            for name, s in rows.items()
        ]
        by_factor.append(["chance", *["50"] * len(names)])
        parts.append(_table([f"{task}: right of two, %", *names], by_factor))
    return "\n\n".join(parts) + "\n"
