"""Examples of the world of emoji: references, a prompt and a scene, each from (seed, index) alone.

No order, no global random state, no files but the sheets. This module imports no JAX.
"""

from typing import NamedTuple

import numpy as np
from PIL import Image

from squeeze_jax.miniature.emoji.scenes import (
    FACTORS,
    Placement,
    Scene,
    View,
    bring_near,
    draw_reference,
    draw_scene,
    draw_view,
)
from squeeze_jax.miniature.emoji.subjects import LOOKS, Split, subjects_of
from squeeze_jax.miniature.emoji.words import Prompt, write_prompt

UPRIGHT = 0.4
"""Share of single subjects that stand upright before a pose is drawn, any of them (our decision)."""
_STREAMS = {"train": 0, "held_out": 1, "held_out_category": 2}


class Pair(NamedTuple):
    """One example."""

    scene: Scene
    """Its placements are in the order of the references."""
    views: tuple[View, ...]
    prompt: Prompt
    height: int
    """Of the target, in pixels."""
    width: int
    number: int

    def references(self) -> list[Image.Image]:
        """RGB pictures of 64 x 64 pixels, one a subject."""
        return [
            draw_reference(one.subject, one.look, view)
            for one, view in zip(self.scene.placements, self.views, strict=True)
        ]

    def target(self) -> Image.Image:
        """An RGB picture, `width` pixels wide and `height` high."""
        return draw_scene(self.scene, self.height, self.width)


def pair_at(
    seed: int,
    index: int,
    split: Split = "train",
    *,
    subjects: int = 1,
    sizes: tuple[tuple[int, int], ...] = ((64, 64),),
    complete: bool = False,
    near: float = 0.0,
) -> Pair:
    """Example `index` (>= 0) of the endless data set `seed` (>= 0).

    subjects: 1, or 2: every second example then has two. sizes: (height, width) of targets, one of
    which is drawn. Two subjects are only put where the picture is at least as wide as high.
    complete: the prompt says everything about the scene. near: the share (0 .. 1) of training
    examples with one upright subject whose reference shows it more or less as the target does:
    what copying is, is learned from these.
    """
    rng = np.random.default_rng((seed, index, _STREAMS[split]))
    two = subjects == 2 and index % 2 == 1
    fitting = [size for size in sizes if not two or size[1] >= size[0]] or list(sizes)
    height, width = fitting[int(rng.integers(len(fitting)))]

    def one_of(factor: str) -> str:
        return FACTORS[factor][int(rng.integers(len(FACTORS[factor])))]

    known = subjects_of(split)
    numbers = rng.choice(len(known), size=2 if two else 1, replace=False).tolist()
    sides = ["left", "right"] if rng.random() < 0.5 else ["right", "left"]
    placements = tuple(
        Placement(
            known[number],
            # Other looks are for training: an exam shows the pictures as they are.
            int(rng.integers(LOOKS)) if split == "train" and rng.random() < 0.6 else 0,
            sides[place] if two else one_of("position"),
            one_of("size"),
            "upright" if two or rng.random() < UPRIGHT else one_of("pose"),
        )
        for place, number in enumerate(numbers)
    )
    difference = 1.0
    if near and split == "train" and not two and rng.random() < near:
        difference = float(rng.random() ** 3)  # mostly small (our decision)
        placements = (placements[0]._replace(pose="upright"),)
    thing = "nothing" if two or rng.random() < 0.3 else one_of("thing")
    scene = Scene(one_of("place"), one_of("time"), thing, placements)
    views = tuple(draw_view(rng, scene.place) for _ in placements)
    if difference < 1:
        views = (bring_near(views[0], difference, scene, height, width),)
    return Pair(scene, views, write_prompt(scene, rng, split, complete), height, width, index)
