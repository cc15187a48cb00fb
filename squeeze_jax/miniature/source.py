"""The miniature's data source: critters drawn when they are asked for."""

from PIL import Image

from squeeze_jax.config import Config, CrittersConfig
from squeeze_jax.data.record_writer import Example
from squeeze_jax.data.sources import Examples
from squeeze_jax.miniature.critters import Pair, Split, draw_reference, draw_scene, pair_at


class CritterRows:
    """Pairs of the demo data, drawn when they are asked for."""

    prompts_are_valid = True

    def __init__(self, critters: CrittersConfig, split: Split) -> None:
        self.critters = critters
        self.split: Split = split
        self.count = critters.train if split == "train" else critters.held_out

    def __len__(self) -> int:
        return self.count

    def pair(self, index: int) -> Pair:
        return pair_at(self.critters.seed, index, self.split)

    def __getitem__(self, index: int) -> Example:
        pair, size = self.pair(index), self.critters.size
        reference = Image.fromarray(draw_reference(pair.subject, pair.reference_pose, size))
        return Example(
            pair.prompt, [reference], Image.fromarray(draw_scene(pair.subject, pair.scene, size))
        )

    def prompt(self, index: int) -> str:
        return self.pair(index).prompt

    def references(self, index: int) -> int:
        """How many an example has."""
        return 1

    def name(self, index: int) -> str:
        """What a message calls it."""
        return f"critter {index} of {self.split}"

    @property
    def source(self) -> str:
        """What makes these rows these rows."""
        return f"critters {self.split} seed {self.critters.seed} size {self.critters.size}"


def open_source(config: Config, *, check_images: bool) -> dict[str, Examples]:
    """The pairs of `data.critters`; held-out ones are of subjects that training never sees."""
    critters = config.data.critters
    assert critters is not None
    return {"train": CritterRows(critters, "train"), "held_out": CritterRows(critters, "held_out")}
