"""The world of emoji, as the training of the miniature's frozen encoders asks for it."""

import numpy as np
from PIL import Image

from squeeze_jax.miniature.critters import Split
from squeeze_jax.miniature.emoji.pairs import pair_at
from squeeze_jax.miniature.emoji.subjects import CATEGORIES, COLOURS, SUBJECTS, colour_of
from squeeze_jax.miniature.emoji.words import questions_about_references, questions_about_scene
from squeeze_jax.miniature.world import CRITTERS, Talk

NAMES = tuple(sorted({subject.name for subject in SUBJECTS}))


class EmojiWorld:
    """One or two references; critters among the autoencoder's pictures, since it serves both."""

    references = 2

    def __init__(self) -> None:
        self.label_sizes = {
            "name": len(NAMES),
            "category": len(CATEGORIES),
            "colour": len(COLOURS),
        }

    def talk(self, seed: int, index: int, split: Split, rng: np.random.Generator) -> Talk:
        """Of four conversations three have a prompt, and questions about it."""
        pair = pair_at(seed, index, split, subjects=2)
        if rng.random() < 0.75:
            asked = questions_about_scene(pair.scene, pair.prompt.said, rng)
            return Talk(pair.references(), pair.prompt.text, asked)
        asked = questions_about_references(pair.scene.placements, rng)
        return Talk(pair.references(), None, asked)

    def labelled(self, seed: int, index: int) -> tuple[Image.Image, list[int]]:
        pair = pair_at(seed, index)
        one = pair.scene.placements[0]
        return pair.references()[0], [
            NAMES.index(one.subject.name),
            CATEGORIES.index(one.subject.category),
            list(COLOURS).index(colour_of(one.subject, one.look)),
        ]

    def picture(self, seed: int, index: int, split: Split) -> np.ndarray:
        """Of eight pictures five are targets, two references and one is a critter's."""
        if index % 8 == 7:
            return CRITTERS.picture(seed, index // 8, split)
        pair = pair_at(seed, index, split, subjects=2)
        return np.asarray(pair.references()[0] if index % 8 > 4 else pair.target())


EMOJI = EmojiWorld()
