"""The families of transformers whose files can be read and written.

To add one, write its tables in a file like `flux.py`, with a `TransformerFormat` at its end, and
name that here.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from squeeze_jax.interop.flux import FLUX1
from squeeze_jax.interop.flux2 import FLUX2
from squeeze_jax.interop.transformer_format import TransformerFormat
from squeeze_jax.models.backbone import BackboneConfig

FORMATS: tuple[TransformerFormat[Any], ...] = (FLUX1, FLUX2)


DISTILLED = ("FLUX.2-klein-4B", "FLUX.2-klein-9B")
"""Names on the hub of models that have the arrays of a base and were distilled to 4 steps."""


def distilled_name(place: str | None) -> str | None:
    """Returns which distilled model a folder of weights is, by the names on its path; None: none.

    Nothing in the files tells: shapes and config.json are the base's.
    """
    parts = Path(place or "").parts
    return next((part for part in parts if part.removesuffix(".safetensors") in DISTILLED), None)


def format_of(config: BackboneConfig) -> TransformerFormat[Any]:
    """Returns the family of a transformer's config. Raises TypeError for one whose files nobody
    publishes."""
    for family in FORMATS:
        if isinstance(config, family.config):
            return family
    raise TypeError(f"{type(config).__name__} is the config of no published transformer")


def find_format(class_name: str | None, names: Iterable[str]) -> TransformerFormat[Any] | None:
    """Returns the family of a checkpoint, by its config.json's `_class_name` or the names of its
    tensors."""
    names = list(names)
    for family in FORMATS:
        if class_name == family.class_name:
            return family
    for family in FORMATS:
        if any(name.startswith(family.markers) for name in names):
            return family
    return None
