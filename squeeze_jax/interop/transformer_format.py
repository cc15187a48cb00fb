"""What there is to know about a published family of transformers in order to read and write its
files."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np

from squeeze_jax.interop.mapping import Entry, Tensors
from squeeze_jax.models.backbone import Backbone

C = TypeVar("C")  # of a config (`BackboneConfig`)

Naming = Literal["diffusers", "original", "xlabs"]
"""Whose names a file has: diffusers', its authors' (Black Forest Labs), XLabs' (LoRAs alone)."""


class Target(NamedTuple):
    """Rows start .. start + size of one of our linear layers (size -1: to the end)."""

    path: str
    layer: int | None
    """Index on the depth axis of a stacked layer."""
    start: int
    size: int
    swapped: bool = False
    """The file has the two output halves in the other order."""


@dataclass(frozen=True)
class TransformerFormat(Generic[C]):
    """A family of transformers: its classes, and the tables that load, verify, LoRA and merge go
    by."""

    name: str
    """What messages call it."""
    kind: str
    """What `verify --kind` calls it."""
    config: type[C]
    autoencoder: type
    """The config of the autoencoder that it was trained on."""
    module: Callable[..., Backbone]
    """`module(config, dtype=, param_dtype=, remat=, unroll=, rngs=)`."""
    class_name: str
    """`_class_name` in diffusers' config.json."""
    markers: tuple[str, ...]
    """Beginnings of tensor names that no other family has."""
    config_from_json: Callable[[dict[str, Any]], C]
    config_to_json: Callable[[C], dict[str, Any]]
    config_from_shapes: Callable[[Tensors], C]
    """Our config of a file in the original layout, which has no config.json."""
    published: Mapping[str, C]
    """Sizes of its published models, by their names; of equal ones the first one's name."""
    entries: Mapping[Naming, Callable[[C], list[Entry]]]
    """The mapping tables of its two layouts, `diffusers` and `original`."""
    lora_targets: Mapping[Naming, Callable[[C], dict[str, Target]]]
    """Layers that LoRA files name in a way of their own, beside those of the mapping tables."""
    extra_inputs: Callable[[C], dict[str, int]]
    """Inputs [B, width] of a call that this family alone takes, by name: their widths."""
    twin: Callable[..., np.ndarray]
    """`twin(config, weights, inputs, target_grid, reference_grids)`: the velocity by diffusers
    in PyTorch, of weights under diffusers' names."""

    def targets(self, naming: Naming, config: C) -> dict[str, Target]:
        """Returns every linear layer that files with these names can adapt; none where there are
        no such files."""
        if naming in self.lora_targets:
            return self.lora_targets[naming](config)
        return targets_of(self.entries[naming](config)) if naming in self.entries else {}


def targets_of(table: list[Entry]) -> dict[str, Target]:
    """Returns every linear layer that a mapping table names, without `.weight`."""
    found = {}
    for entry in table:
        if not entry.path.endswith(".kernel"):
            continue
        path, start = entry.path.removesuffix(".kernel"), 0
        for name, size in zip(entry.sources, entry.sizes or (-1,), strict=True):
            swapped = entry.layout == "swap_halves"
            found[name.removesuffix(".weight")] = Target(path, entry.layer, start, size, swapped)
            start += size
    return found
