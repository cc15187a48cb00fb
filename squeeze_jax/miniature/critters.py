"""Critters: the demo's data, drawn instead of downloaded.

A pair is a reference (the subject alone, in one pose) and a target (the same subject in the scene
that the prompt names, in another pose). Everything follows from (seed, index): no order, no global
random state, no files. Subjects are split into train and held-out by a hash of their factors, so
that no held-out subject is ever seen in training, whatever the seed. This module imports no JAX, so
data workers stay light.
"""

import json
import multiprocessing
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from squeeze_jax.miniature.drawing import draw_reference, draw_scene
from squeeze_jax.miniature.factors import (
    FINE_FACTORS,
    POSES,
    SCENE_COUNT,
    SCENE_FACTORS,
    SCENE_SIZES,
    SUBJECT_COUNT,
    SUBJECT_FACTORS,
    SUBJECT_SIZES,
    Scene,
    Subject,
    scene_from_number,
    subject_from_number,
    subject_number,
)
from squeeze_jax.miniature.hashing import splitmix64
from squeeze_jax.miniature.words import caption, prompt, questions

__all__ = [
    "FINE_FACTORS",
    "POSES",
    "SCENE_COUNT",
    "SCENE_FACTORS",
    "SUBJECT_COUNT",
    "SUBJECT_FACTORS",
    "Pair",
    "Scene",
    "Split",
    "Subject",
    "caption",
    "draw_reference",
    "draw_scene",
    "is_held_out",
    "pair_at",
    "pairs",
    "prompt",
    "questions",
    "scene_distractors",
    "subject_at",
    "subject_distractors",
    "write_manifest",
]

Split = Literal["train", "held_out"]

_HELD_OUT_ONE_IN = 20
_STREAMS = {"train": 0, "held_out": 1}


class Pair(NamedTuple):
    """One example: draw it with `draw_reference(subject, reference_pose)` and
    `draw_scene(subject, scene)`."""

    subject: Subject
    reference_pose: int
    """Index into `POSES`, never the scene's."""
    scene: Scene
    prompt: str
    index: int  # pyright: ignore[reportIncompatibleMethodOverride] (a tuple has a method of that name)


def is_held_out(subject: Subject) -> bool:
    """Whether the subject is one of the twentieth kept from training: a hash (splitmix64) of its
    factors alone."""
    return splitmix64(subject_number(subject)) % _HELD_OUT_ONE_IN == 0


def _draw_subject(rng: np.random.Generator, split: Split) -> Subject:
    while True:
        for number in rng.integers(SUBJECT_COUNT, size=32).tolist():
            subject = subject_from_number(number)
            if is_held_out(subject) == (split == "held_out"):
                return subject


def subject_at(seed: int, index: int, split: Split = "train") -> Subject:
    """The subject of `pair_at(seed, index, split)`."""
    return _draw_subject(np.random.default_rng((seed, index, _STREAMS[split])), split)


def pair_at(seed: int, index: int, split: Split = "train") -> Pair:
    """Example `index` (>= 0) of the endless data set `seed` (>= 0)."""
    rng = np.random.default_rng((seed, index, _STREAMS[split]))
    subject = _draw_subject(rng, split)
    scene = scene_from_number(int(rng.integers(SCENE_COUNT)))
    reference_pose = (scene.pose + 1 + int(rng.integers(len(POSES) - 1))) % len(POSES)
    return Pair(subject, reference_pose, scene, prompt(scene, rng), index)


def pairs(
    seed: int, start: int, stop: int, split: Split = "train", size: int = 64
) -> Iterator[tuple[Pair, np.ndarray, np.ndarray]]:
    """Pairs start .. stop − 1 with their pictures: (pair, reference, target), both uint8 [size,
    size, 3]."""
    for index in range(start, stop):
        pair = pair_at(seed, index, split)
        yield (
            pair,
            draw_reference(pair.subject, pair.reference_pose, size),
            draw_scene(pair.subject, pair.scene, size),
        )


# --- distractors: what a picture must be told apart from
# ------------------------------------------------------------


def _one_factor_changed(
    factors: tuple[int, ...], sizes: tuple[int, ...], count: int, rng: np.random.Generator
) -> list[tuple[int, ...]]:
    """`count` distinct neighbours of `factors`; the factors take turns, so that each is covered
    as evenly as can be."""
    changes = [
        [(factor, value) for value in rng.permutation(size).tolist() if value != factors[factor]]
        for factor, size in enumerate(sizes)
    ]
    chosen: list[tuple[int, int]] = []
    while len(chosen) < count:
        left = [factor for factor, values in enumerate(changes) if values]
        if not left:
            raise ValueError(
                f"only {len(chosen)} neighbours differ in one factor, {count} were asked for"
            )
        turn = rng.permutation(left).tolist()
        chosen += [changes[factor].pop() for factor in turn[: count - len(chosen)]]
    return [(*factors[:factor], value, *factors[factor + 1 :]) for factor, value in chosen]


def _random_others(number: int, total: int, count: int, rng: np.random.Generator) -> list[int]:
    """`count` distinct numbers below `total`, none of them `number`."""
    drawn = rng.choice(total - 1, size=count, replace=False).tolist()
    return [other + (other >= number) for other in drawn]


def subject_distractors(
    subject: Subject, count: int, rng: np.random.Generator, hard: bool
) -> list[Subject]:
    """Other subjects: random ones, or (`hard`) ones that differ in exactly one factor."""
    if hard:
        return [
            Subject(*factors) for factors in _one_factor_changed(subject, SUBJECT_SIZES, count, rng)
        ]
    return [
        subject_from_number(n)
        for n in _random_others(subject_number(subject), SUBJECT_COUNT, count, rng)
    ]


def scene_distractors(
    scene: Scene, count: int, rng: np.random.Generator, hard: bool
) -> list[Scene]:
    """Other scenes: random ones, or (`hard`) ones that differ in exactly one factor (at most 17
    exist)."""
    if hard:
        return [Scene(*factors) for factors in _one_factor_changed(scene, SCENE_SIZES, count, rng)]
    others = [
        scene_from_number(n)
        for n in rng.choice(SCENE_COUNT, size=count + 1, replace=False).tolist()
    ]
    return [other for other in others if other != scene][:count]


# --- files
# ----------------------------------------------------------------------------------------------------------


def _write_pair(
    index: int, out_dir: Path, seed: int, split: Split, references: int, size: int
) -> dict:
    """Draw one pair to PNG files and return its manifest row."""
    pair = pair_at(seed, index, split)
    other_poses = [pose for pose in range(len(POSES)) if pose != pair.scene.pose]
    first = other_poses.index(pair.reference_pose)
    poses = [other_poses[(first + i) % len(other_poses)] for i in range(references)]
    reference_paths = [f"references/{index:06d}_{i}.png" for i in range(references)]
    target_path = f"targets/{index:06d}.png"
    for pose, path in zip(poses, reference_paths, strict=True):
        Image.fromarray(draw_reference(pair.subject, pose, size)).save(
            out_dir / path, compress_level=1
        )
    Image.fromarray(draw_scene(pair.subject, pair.scene, size)).save(
        out_dir / target_path, compress_level=1
    )
    return {
        "prompt": pair.prompt,
        "image_paths": reference_paths,
        "image_tgt_path": target_path,
        "critter": {
            "subject": list(pair.subject),
            "scene": list(pair.scene),
            "reference_pose": pair.reference_pose,
        },
    }


def write_manifest(
    out_dir: str | os.PathLike[str],
    count: int,
    seed: int = 0,
    split: Split = "train",
    references: int = 1,
    size: int = 64,
    processes: int | None = None,
) -> Path:
    """Draw pairs 0 .. count − 1 as PNG files and write `manifest.json` (UNO's format) beside them;
    returns its path.

    `references` (1 to 3) pictures of the subject, all in poses other than the target's. Each row
    also holds `critter`: the factors' indices, so that evaluation can redraw the pair. The manifest
    appears last, whole, by a rename.
    """
    if not 1 <= references < len(POSES):
        raise ValueError(
            f"references is {references}; a critter has 1 to {len(POSES) - 1} poses besides the target's"
        )
    out_dir = Path(out_dir)
    for folder in ("references", "targets"):
        (out_dir / folder).mkdir(parents=True, exist_ok=True)
    write = partial(
        _write_pair, out_dir=out_dir, seed=seed, split=split, references=references, size=size
    )
    processes = min(processes or os.cpu_count() or 1, max(1, count // 200))
    if processes == 1:
        rows = [write(index) for index in range(count)]
    else:
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            rows = pool.map(write, range(count), chunksize=100)
    manifest, beside = out_dir / "manifest.json", out_dir / f".manifest.json.{os.getpid()}"
    beside.write_text(json.dumps(rows, indent=1))
    beside.replace(manifest)
    return manifest
