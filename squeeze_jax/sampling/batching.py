"""Prompts in batches: pieces that are drawn together, and references as padded rows of tokens."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from squeeze_jax.batch import References
from squeeze_jax.diffusion.latents import (
    PATCH,
    ReferencePositions,
    latent_grid,
    pack_references,
    reference_positions,
)

REFERENCE_BUCKET = 16
"""Reference tokens are padded to a multiple of this, so that similar sizes share a program."""


def plan_batches(
    references: Sequence[Sequence[Any]], images: int, at_once: int, places: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Parts of prompts and pieces of their images: a batch is one part with one piece.

    `at_once` images at most are drawn together; on a mesh, at least one for every place that holds
    examples. The last item of either may come several times.
    """
    at_once = max(at_once, places)
    fews = split_evenly(range(images), at_once)
    share = places // math.gcd(places, len(fews[0]))  # prompts whose images fill the places
    share = share if share * len(fews[0]) <= at_once else 1  # else every place has them all
    return group_prompts(references, max(1, at_once // images), share), fews


def group_prompts(
    references: Sequence[Sequence[Any]], most: int, multiple: int = 1
) -> list[list[int]]:
    """Numbers of prompts in pieces (`split_evenly`) in which all have references or none has:
    their stages differ."""
    pieces: list[list[int]] = []
    for some in (True, False):
        pieces += split_evenly(
            [i for i, pictures in enumerate(references) if bool(pictures) == some], most, multiple
        )
    return pieces


def split_evenly(items: Sequence[int], most: int, multiple: int = 1) -> list[list[int]]:
    """Items in pieces of one length, about `most`, since programs are compiled for a length; the
    last item fills up.

    The length is a multiple of `multiple` where there are as many items: what a mesh divides
    evenly.
    """
    length = -(-len(items) // max(1, -(-len(items) // most)))
    if len(items) >= multiple:
        length = -(-length // multiple) * multiple
    pieces = [list(items[start : start + length]) for start in range(0, len(items), length or 1)]
    return [piece + piece[-1:] * (length - len(piece)) for piece in pieces]


def pad_references(
    latents: Sequence[Sequence[np.ndarray]],
    target_grid: tuple[int, int],
    positions_of: ReferencePositions = reference_positions,
) -> References | None:
    """Packs each sample's reference latents [h, w, c] into one padded, masked row.

    `positions_of` is the backbone's (`BackboneConfig`). Returns None where no sample has any.
    """
    counts = [sum(math.prod(latent_grid(latent)) for latent in row) for row in latents]
    if not max(counts, default=0):
        return None
    length = -(-max(counts) // REFERENCE_BUCKET) * REFERENCE_BUCKET
    channels = PATCH * PATCH * next(latent.shape[-1] for row in latents for latent in row)
    grids = [target_grid] * len(latents)
    return References(*pack_references(latents, grids, length, channels, positions_of))
