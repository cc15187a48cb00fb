"""Decodes large pictures tile by tile, in the memory of one tile.

Tiles overlap by a quarter and fade into each other, as in diffusers'
`AutoencoderKL.tiled_decode`. Norms and attention see one tile each, so the result is close to
that of decoding all at once but not equal to it.
"""

from collections.abc import Callable

import numpy as np

TILE = 128
"""Latents along a tile's side (1,024 pixels of FLUX.1's autoencoder: its `sample_size`); smaller
pictures are one tile."""
OVERLAP = 0.25
"""Share of a tile that its neighbour covers as well (diffusers' value)."""


def decode_tiles(
    decode: Callable[[np.ndarray], np.ndarray],
    latents: np.ndarray,
    *,
    tile: int = TILE,
    overlap: float = OVERLAP,
) -> np.ndarray:
    """Pictures [B, height, width, 3] of latents [B, h, w, c]; `decode` does so for one tile [B, ≤
    tile, ≤ tile, c].
    """
    if max(latents.shape[1:3]) <= tile:
        return decode(latents)
    stride = int(tile * (1 - overlap))
    limit = 0  # pixels of a tile that the next one does not redraw
    rows: list[np.ndarray] = []
    above: list[np.ndarray] = []
    for top in range(0, latents.shape[1], stride):
        row: list[np.ndarray] = []
        for left in range(0, latents.shape[2], stride):
            part = latents[:, top : top + tile, left : left + tile]
            picture = np.array(decode(part))
            factor = picture.shape[1] // part.shape[1]
            extent, limit = (
                int(tile * factor * overlap),
                tile * factor - int(tile * factor * overlap),
            )
            if above:
                fade(above[len(row)], picture, extent, axis=1)
            if row:
                fade(row[-1], picture, extent, axis=2)
            row.append(picture)
        rows.append(np.concatenate([picture[:, :limit, :limit] for picture in row], axis=2))
        above = row
    return np.concatenate(rows, axis=1)


def fade(before: np.ndarray, after: np.ndarray, extent: int, axis: int) -> None:
    """Blends the first `extent` places of `after` along an axis with the last ones of `before`,
    linearly, in place. Both are pictures [B, height, width, 3]."""
    extent = min(before.shape[axis], after.shape[axis], extent)
    share = (np.arange(extent, dtype=np.float32) / extent).reshape(
        [-1 if i == axis else 1 for i in range(after.ndim)]
    )
    old, new = [slice(None)] * after.ndim, [slice(None)] * after.ndim
    old[axis], new[axis] = slice(before.shape[axis] - extent, None), slice(0, extent)
    after[tuple(new)] = before[tuple(old)] * (1 - share) + after[tuple(new)] * share
