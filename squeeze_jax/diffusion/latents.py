"""Latents as tokens: 2x2 patches in diffusers' channel order, and the tokens' places on the
rotary grid (UNO).

Everything here is shape arithmetic and takes NumPy and JAX arrays alike (the data workers use it
without JAX).
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Float, Int32

PATCH = 2
"""Latents that a token covers in each direction; with FLUX.1's autoencoder a token covers 16 x 16
pixels."""

REFERENCE_TIME = 10
"""How far apart FLUX.2 puts target and references on its rotary t axis."""

Grid = tuple[int, int]
"""Rows and columns of tokens."""

ReferencePositions = Callable[[Grid, Sequence[Grid]], np.ndarray]
"""Positions int32 [R, axes] of all reference tokens in a row, from the grids of target and
references."""


def pack(latents: Float[Any, "*B height width c"]) -> Float[Any, "*B N patch"]:
    """Latents [*B, h, w, c] to tokens [*B, (h/2)(w/2), 4c], row by row.

    A token's channels are ordered (channel, dy, dx), as diffusers packs them, so that weights
    load unchanged. Raises ValueError where h or w is odd.
    """
    *batch, height, width, channels = latents.shape
    if height % PATCH or width % PATCH:
        raise ValueError(f"latents of {height}x{width} do not divide into {PATCH}x{PATCH} patches")
    rows, columns, b = height // PATCH, width // PATCH, len(batch)
    patches = latents.reshape(*batch, rows, PATCH, columns, PATCH, channels)
    patches = patches.transpose(*range(b), b, b + 2, b + 4, b + 1, b + 3)
    return patches.reshape(*batch, rows * columns, channels * PATCH * PATCH)


def unpack(tokens: Float[Any, "*B N patch"], grid: Grid) -> Float[Any, "*B height width c"]:
    """The inverse of `pack` for a grid of (rows, columns) tokens: [*B, N, 4c] to [*B, 2 rows, 2
    columns, c]. Raises ValueError where N is not rows times columns."""
    rows, columns = grid
    *batch, count, width = tokens.shape
    if count != rows * columns:
        raise ValueError(f"{count} tokens do not fill a grid of {rows}x{columns}")
    channels, b = width // (PATCH * PATCH), len(batch)
    patches = tokens.reshape(*batch, rows, columns, channels, PATCH, PATCH)
    patches = patches.transpose(*range(b), b, b + 3, b + 1, b + 4, b + 2)
    return patches.reshape(*batch, rows * PATCH, columns * PATCH, channels)


def latent_grid(latents: Float[Any, "*B height width c"]) -> Grid:
    """Rows and columns of tokens that `pack` makes of latents."""
    return latents.shape[-3] // PATCH, latents.shape[-2] // PATCH


def grid_positions(rows: int, columns: int, origin: Grid = (0, 0)) -> Int32[np.ndarray, "N 2"]:
    """Row and column of every token of a grid, row by row, counted from `origin`."""
    row, column = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    return (np.stack([row, column], axis=-1).reshape(-1, 2) + np.asarray(origin)).astype(np.int32)


def reference_origins(target_grid: Grid, reference_grids: Sequence[Grid]) -> list[Grid]:
    """Where each reference's grid begins: diagonally past the target and all references before it
    (UNO).

    A 4x4 target and a 2x3 reference put the references at (4, 4) and (6, 7): no two pictures
    share a row or a column.
    """
    row, column = target_grid
    origins = []
    for rows, columns in reference_grids:
        origins.append((row, column))
        row, column = row + rows, column + columns
    return origins


def reference_positions(
    target_grid: Grid, reference_grids: Sequence[Grid]
) -> Int32[np.ndarray, "R 2"]:
    """`grid_positions` of all references one behind the other, each from its origin of
    `reference_origins`.
    """
    origins = reference_origins(target_grid, reference_grids)
    parts = [
        grid_positions(*grid, origin) for grid, origin in zip(reference_grids, origins, strict=True)
    ]
    return np.concatenate([np.zeros((0, 2), np.int32), *parts])


def timed_reference_positions(reference_grids: Sequence[Grid]) -> Int32[np.ndarray, "R 3"]:
    """FLUX.2's (t, row, column) of all references in a row: t = 10 + 10·i for reference i from 0.

    Rows and columns count from 0 in every picture (diffusers' `_prepare_image_ids`).
    """
    parts = [
        np.pad(grid_positions(*grid), ((0, 0), (1, 0)), constant_values=REFERENCE_TIME * (i + 1))
        for i, grid in enumerate(reference_grids)
    ]
    return np.concatenate([np.zeros((0, 3), np.int32), *parts])


def pack_references(
    latents: Sequence[Sequence[np.ndarray]],
    target_grids: Sequence[Grid],
    length: int,
    channels: int,
    positions_of: ReferencePositions = reference_positions,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Packs each sample's reference latents into one row of `length` tokens, with their positions.

    `channels` are a token's, 4c. `positions_of` is the backbone's (`BackboneConfig`). Returns what
    `batch.References` holds: tokens [B, length, channels] float32 (padding is zero), mask
    [B, length], positions [B, length, axes]. Raises ValueError where a row does not fit.
    """
    tokens = np.zeros((len(latents), length, channels), np.float32)
    mask = np.zeros((len(latents), length), bool)
    axes = _positions(positions_of, (0, 0), ()).shape[-1]
    positions = np.zeros((len(latents), length, axes), np.int32)
    for i, (row, target_grid) in enumerate(zip(latents, target_grids, strict=True)):
        places = _positions(positions_of, target_grid, tuple(latent_grid(latent) for latent in row))
        mask[i, : len(places)], positions[i, : len(places)] = True, places
        if row:
            tokens[i, : len(places)] = np.concatenate([pack(latent) for latent in row])
    return tokens, mask, positions


@lru_cache(maxsize=4096)
def _positions(
    positions_of: ReferencePositions, target_grid: Grid, reference_grids: tuple[Grid, ...]
) -> np.ndarray:
    return positions_of(target_grid, reference_grids)
