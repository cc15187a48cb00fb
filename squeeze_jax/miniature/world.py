"""What a world is: what the miniature's frozen encoders are trained on.

A world has endless examples, each from (seed, index) alone. `CRITTERS` is one here;
`squeeze_jax.miniature.emoji.world` has another. This module imports no JAX.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from squeeze_jax.miniature.critters import (
    FINE_FACTORS,
    POSES,
    SUBJECT_FACTORS,
    Split,
    draw_reference,
    draw_scene,
    pair_at,
    questions,
)


class Talk(NamedTuple):
    """What a conversation with the MLLM is about."""

    pictures: list[Image.Image]
    """The references, RGB."""
    prompt: str | None
    """What is asked to be drawn; None: the conversation is about the pictures alone."""
    questions: list[tuple[str, str]]
    """With their answers, in the order in which they are asked."""


@runtime_checkable
class World(Protocol):
    """Endless examples for the autoencoder and the MLLM."""

    @property
    def label_sizes(self) -> dict[str, int]:
        """What the vision tower learns to name first: a name, and its number of values."""
        ...

    @property
    def references(self) -> int:
        """The most pictures of a conversation."""
        ...

    def talk(self, seed: int, index: int, split: Split, rng: np.random.Generator) -> Talk: ...

    def labelled(self, seed: int, index: int) -> tuple[Image.Image, list[int]]:
        """A reference of the training subjects, and its value of each of `label_sizes`."""
        ...

    def picture(self, seed: int, index: int, split: Split) -> np.ndarray:
        """What the autoencoder redraws: uint8 [64, 64, 3]."""
        ...


class CrittersWorld:
    """The drawn animals of `critters.py`: one reference each."""

    references = 1
    coarse = tuple(name for name in SUBJECT_FACTORS if name not in FINE_FACTORS)

    def __init__(self) -> None:
        self.label_sizes = {name: len(SUBJECT_FACTORS[name]) for name in self.coarse}
        self.label_sizes["pose"] = len(POSES)

    def talk(self, seed: int, index: int, split: Split, rng: np.random.Generator) -> Talk:
        """Half of the time there is a prompt, and the questions are about it."""
        pair = pair_at(seed, index, split)
        prompted = rng.random() < 0.5
        asked = questions(pair.subject, pair.scene if prompted else pair.reference_pose, rng)
        reference = Image.fromarray(draw_reference(pair.subject, pair.reference_pose))
        return Talk([reference], pair.prompt if prompted else None, asked)

    def labelled(self, seed: int, index: int) -> tuple[Image.Image, list[int]]:
        pair = pair_at(seed, index)
        reference = Image.fromarray(draw_reference(pair.subject, pair.reference_pose))
        return reference, [
            *(getattr(pair.subject, name) for name in self.coarse),
            pair.reference_pose,
        ]

    def picture(self, seed: int, index: int, split: Split) -> np.ndarray:
        """Of four pictures three are scenes and one is a reference alone."""
        pair = pair_at(seed, index, split)
        if index % 4 == 3:
            return draw_reference(pair.subject, pair.reference_pose)
        return draw_scene(pair.subject, pair.scene)


CRITTERS = CrittersWorld()
