"""Data sources: examples to train on and held-out ones, whatever they come from.

A source is a module with a function `open_source(config, check_images)` that returns the examples `train` and
`held_out`. To add one: give `DataConfig` a field that chooses it, write the function, add a row to `SOURCES`.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Protocol, runtime_checkable

from squeeze_jax.config import Config
from squeeze_jax.data.images import load_image
from squeeze_jax.data.manifest import Row, read_manifest
from squeeze_jax.data.record_writer import Example
from squeeze_jax.errors import InputError

SOURCES: dict[str, str] = {
    "manifest": "squeeze_jax.data.sources",
    "critters": "squeeze_jax.miniature.source",
}
"""Field of `data` that chooses a source → its module, imported when it is asked for."""


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

    @property
    def prompts_are_valid(self) -> bool:
        """Whether every prompt is known to fit the MLLM, so that none has to be checked."""
        ...


class ManifestRows:
    """Rows of a checked manifest; pictures are read when they are asked for.

    Raises InputError for a row without a target.
    """

    prompts_are_valid = False

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


def source_of(config: Config) -> str | None:
    """The field of `data` that chooses the config's source; None where it has ready feature records alone."""
    return next((name for name in SOURCES if getattr(config.data, name) is not None), None)


def open_examples(config: Config, *, check_images: bool = True) -> dict[str, Examples]:
    """The examples `train` and `held_out` of a config. Bad input raises InputError before anything runs.

    check_images: decodes every picture, and prints a warning for what is noteworthy.
    """
    name = source_of(config)
    if name is None:
        raise InputError(f"no examples: set one of {', '.join(f'data.{name}' for name in SOURCES)}, or data.features")
    open_source: Callable[..., dict[str, Examples]] = import_module(SOURCES[name]).open_source
    return open_source(config, check_images=check_images)


def open_source(config: Config, *, check_images: bool) -> dict[str, Examples]:
    """The rows of `data.manifest`; the last `data.held_out` of them, at most a tenth, are held out."""
    manifest = Path(config.data.manifest or "")
    checked = read_manifest(manifest, need_targets=True, check_images=check_images, skip_bad=config.data.skip_bad)
    for warning in checked.warnings if check_images else []:
        print(f"warning: {warning}")
    held_out = min(config.data.held_out, max(1, len(checked.rows) // 10))
    if len(checked.rows) <= held_out:
        raise InputError(f"{manifest}: {len(checked.rows)} row is too few to train on; give at least 2")
    digest = f"manifest {checked.digest}"
    return {
        "train": ManifestRows(checked.rows[:-held_out], f"{digest} but the last {held_out}"),
        "held_out": ManifestRows(checked.rows[-held_out:], f"{digest} the last {held_out}"),
    }
