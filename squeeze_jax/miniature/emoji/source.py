"""The data source `data.emoji`: examples drawn when they are asked for."""

from squeeze_jax.config import Config
from squeeze_jax.config_data import EmojiConfig
from squeeze_jax.data.record_writer import Example
from squeeze_jax.data.sources import Examples
from squeeze_jax.miniature.emoji.pairs import Pair, pair_at
from squeeze_jax.miniature.emoji.subjects import Split

Sizes = tuple[tuple[int, int], ...]
DRAWING = 2
"""Counts the times that the same seed and number came to draw another example: records of an
earlier drawing are not taken for today's."""


class EmojiRows:
    """Examples of the world of emoji."""

    prompts_are_valid = True

    def __init__(self, emoji: EmojiConfig, sizes: Sizes, split: Split) -> None:
        self.emoji, self.sizes = emoji, sizes
        self.split: Split = split
        self.count = emoji.train if split == "train" else emoji.held_out
        self.most_references = emoji.subjects

    def __len__(self) -> int:
        return self.count

    def pair(self, index: int) -> Pair:
        emoji = self.emoji
        return pair_at(
            emoji.seed,
            index,
            self.split,
            subjects=emoji.subjects,
            sizes=self.sizes,
            near=emoji.near,
        )

    def __getitem__(self, index: int) -> Example:
        pair = self.pair(index)
        return Example(pair.prompt.text, pair.references(), pair.target())

    def prompt(self, index: int) -> str:
        return self.pair(index).prompt.text

    def references(self, index: int) -> int:
        """How many an example has."""
        return len(self.pair(index).views)

    def name(self, index: int) -> str:
        """What a message calls it."""
        return f"emoji {index} of {self.split}"

    @property
    def source(self) -> str:
        """What makes these rows these rows."""
        emoji, sizes = self.emoji, " ".join(f"{height}x{width}" for height, width in self.sizes)
        most = f"up to {emoji.subjects} subjects"
        near = f" near {emoji.near:g}" if emoji.near else ""
        return f"emoji {DRAWING} {self.split} seed {emoji.seed} {most} sizes {sizes}{near}"


def open_source(config: Config, *, check_images: bool) -> dict[str, Examples]:
    """The examples of `data.emoji`; held-out ones are of subjects that training never sees."""
    data = config.data
    assert data.emoji is not None
    sizes = data.buckets or ((data.height, data.width),)
    return {
        "train": EmojiRows(data.emoji, sizes, "train"),
        "held_out": EmojiRows(data.emoji, sizes, "held_out"),
    }
