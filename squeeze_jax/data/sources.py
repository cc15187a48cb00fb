"""What extraction reads: the rows of a manifest, or critters drawn on the spot."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from PIL import Image

from squeeze_jax.config import CrittersConfig
from squeeze_jax.data.critters import Pair, Split, draw_reference, draw_scene, pair_at
from squeeze_jax.data.extract import Example
from squeeze_jax.data.images import load_image
from squeeze_jax.data.manifest import Row
from squeeze_jax.errors import InputError


@runtime_checkable
class Examples(Protocol):
    """Examples by number, of which prompts and numbers of references can be asked without decoding a picture."""

    @property
    def source(self) -> str:
        """What makes these examples these examples: a digest, or a generator's seed."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...

    def prompt(self, index: int, /) -> str: ...

    def references(self, index: int, /) -> int:
        """How many an example has."""
        ...

    def name(self, index: int, /) -> str:
        """What a message calls an example."""
        ...


class CritterRows:
    """Pairs of the demo data, drawn when they are asked for."""

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
        return Example(pair.prompt, [reference], Image.fromarray(draw_scene(pair.subject, pair.scene, size)))

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


class ManifestRows:
    """Rows of a checked manifest; pictures are read when they are asked for.

    Raises InputError for a row without a target.
    """

    def __init__(self, rows: Sequence[Row], source: str) -> None:
        for row in rows:
            if row.target is None:
                raise InputError(f'row {row.number}: "image_tgt_path" is missing; training needs the picture to learn')
        self.rows, self.source = rows, source

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        row = self.rows[index]
        assert row.target is not None
        return Example(row.prompt, [load_image(path) for path in row.references], load_image(row.target))

    def prompt(self, index: int) -> str:
        return self.rows[index].prompt

    def references(self, index: int) -> int:
        """How many an example has."""
        return len(self.rows[index].references)

    def name(self, index: int) -> str:
        """What a message calls it: its place in the manifest, from 1."""
        return f"row {self.rows[index].number}"
