"""From features to scores: both pairings of DreamBench, what copies would score, intervals.

Features are of length 1, so products are cosines.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float32

from squeeze_jax.evaluation.judges import Features

RESAMPLES = 10_000
"""Of the bootstrap, an interval (our decision)."""


class Estimate(NamedTuple):
    """A mean, with its 95 % interval, `low` to `high`, where there is more than one value to
    resample."""

    value: float
    low: float | None
    high: float | None


class Subject(NamedTuple):
    """The real pictures that a prompt's subjects have, by number in a list of features."""

    real: tuple[int, ...]
    fixed: int
    """The one that Kosmos-G's table names, or the reference."""


class Drawn(NamedTuple):
    """One prompt with its pictures, by number in lists of features."""

    group: str
    """The subject, or the subjects, that it is about."""
    text: int
    pictures: tuple[int, ...]
    reference: int | None
    """The (first) reference that was shown, among the real pictures; None: text alone."""
    subjects: tuple[Subject, ...]
    """Empty for text alone, which has no DINO-I and no CLIP-I."""


class PromptScores(NamedTuple):
    """`scores` of one prompt, means over its pictures in [−1, 1], by metric and pairing."""

    group: str
    scores: Mapping[str, float]


def score_prompts(
    drawn: Sequence[Drawn],
    generated: Mapping[str, Features],
    real: Mapping[str, Features],
    texts: Features,
) -> list[PromptScores]:
    """Scores of each prompt's pictures.

    generated, real: features by DINO and by CLIP; texts: by CLIP. Of several subjects the mean over
    them is taken (UNO). CLIP-T is floored at 0 (CLIPScore), and has no pairing.
    """
    return [
        PromptScores(
            one.group,
            _image_scores({k: v[list(one.pictures)] for k, v in generated.items()}, one, real)
            | {"CLIP-T": _text_score(generated["CLIP"][list(one.pictures)], texts[one.text])},
        )
        for one in drawn
    ]


def copy_scores(
    drawn: Sequence[Drawn], real: Mapping[str, Features], texts: Features
) -> list[PromptScores]:
    """Scores of the reference itself, handed back unchanged for every prompt: whoever copies
    perfectly scores this."""
    return [
        PromptScores(
            one.group,
            _image_scores({k: v[[one.reference]] for k, v in real.items()}, one, real)
            | {"CLIP-T": _text_score(real["CLIP"][[one.reference]], texts[one.text])},
        )
        for one in drawn
        if one.reference is not None
    ]


def real_scores(
    drawn: Sequence[Drawn], real: Mapping[str, Features], texts: Features
) -> list[PromptScores]:
    """Scores of the real pictures in the place of drawn ones, each compared with the others.

    Prompts about a subject with one picture alone, and without any, are left out.
    """
    found = []
    for one in drawn:
        if not one.subjects or any(len(subject.real) < 2 for subject in one.subjects):
            continue
        scores: dict[str, float] = {}
        for metric, features in (("DINO-I", real["DINO"]), ("CLIP-I", real["CLIP"])):
            pairs = [among(features[list(subject.real)]) for subject in one.subjects]
            scores[f"{metric} all"] = float(np.mean([pair.mean() for pair in pairs]))
            scores[f"{metric} fixed"] = float(
                np.mean(
                    [
                        np.mean([features[i] @ features[s.fixed] for i in s.real if i != s.fixed])
                        for s in one.subjects
                    ]
                )
            )
        every = [i for subject in one.subjects for i in subject.real]
        scores["CLIP-T"] = _text_score(real["CLIP"][every], texts[one.text])
        found.append(PromptScores(one.group, scores))
    return found


def among(features: Features) -> Float32[np.ndarray, " pairs"]:
    """Cosines of each pair of different pictures."""
    products = features @ features.T
    return products[np.triu_indices(len(features), 1)]


def _image_scores(
    pictures: Mapping[str, Features], one: Drawn, real: Mapping[str, Features]
) -> dict[str, float]:
    scores: dict[str, float] = {}
    if not one.subjects:
        return scores
    for metric, judge in (("DINO-I", "DINO"), ("CLIP-I", "CLIP")):
        similar = pictures[judge] @ real[judge].T
        scores[f"{metric} all"] = float(
            np.mean([similar[:, list(subject.real)].mean() for subject in one.subjects])
        )
        scores[f"{metric} fixed"] = float(
            np.mean([similar[:, subject.fixed].mean() for subject in one.subjects])
        )
    return scores


def _text_score(pictures: Features, text: Float32[np.ndarray, " width"]) -> float:
    return float(np.maximum(pictures @ text, 0).mean())


def group_means(scores: Sequence[PromptScores]) -> dict[str, dict[str, Estimate]]:
    """Group → metric → mean over its prompts; intervals resample prompts."""
    found = {}
    for group in dict.fromkeys(one.group for one in scores):
        rows = [one.scores for one in scores if one.group == group]
        found[group] = {
            name: estimate([row[name] for row in rows if name in row]) for name in _names(rows)
        }
    return found


def overall_means(scores: Sequence[PromptScores]) -> dict[str, Estimate]:
    """Metric → mean over the groups' means; intervals resample groups, since prompts about one
    subject are no independent witnesses. Of a single group, prompts are resampled."""
    groups = list(group_means(scores).values())
    if len(groups) == 1:
        return groups[0]
    return {
        name: estimate([group[name].value for group in groups if name in group])
        for name in _names(groups)
    }


def _names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def estimate(values: Sequence[float]) -> Estimate:
    """A mean with its 95 % interval, by the percentiles of 10,000 bootstrap resamples."""
    array = np.asarray(values, np.float64)
    mean = float(array.mean())
    if len(array) < 2:
        return Estimate(mean, None, None)
    low, high = np.quantile(resampled_means(array), [0.025, 0.975])
    return Estimate(mean, float(low), float(high))


def resampled_means(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " resamples"]:
    """Means of resamples with replacement, the same ones each time (seed 0)."""
    n = len(values)
    counts = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    return counts @ values / n


class Copying(NamedTuple):
    """Of one group, by DINO: how near pictures are to the reference that was shown, beside how
    near real pictures are to each other."""

    to_reference: float
    real: float | None
    closest_real: float | None
    """Of the most similar pair of different real pictures."""
    above_closest: float | None
    """Share of pictures that are nearer to the reference than that."""


def copying(drawn: Sequence[Drawn], generated: Features, real: Features) -> dict[str, Copying]:
    """Of each group of prompts with references."""
    found = {}
    shown = [one for one in drawn if one.reference is not None]
    for group in dict.fromkeys(one.group for one in shown):
        rows = [one for one in shown if one.group == group]
        near = np.concatenate([generated[list(one.pictures)] @ real[one.reference] for one in rows])
        pairs = np.concatenate([among(real[list(s.real)]) for s in rows[0].subjects])
        closest = float(pairs.max()) if pairs.size else None
        found[group] = Copying(
            float(near.mean()),
            float(pairs.mean()) if pairs.size else None,
            closest,
            None if closest is None else float((near > closest).mean()),
        )
    return found
