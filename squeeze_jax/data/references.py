"""Reference pictures to latents: the one road of extraction, sampling, sample grids and
certificates.

A program is compiled for every size and number of pictures. Photographs have many sizes, so
references are encoded on canvases of few sizes (`Autoencoder.encode`), and pictures of one canvas
in powers of two.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32
from PIL import Image

from squeeze_jax.data.images import resize_for_reference

CANVAS = 128
"""Pixels: sides of canvases are multiples of it, or half of it. With a long side of 512 pixels
these are nine sizes, with 4 % more pixels than photographs of the usual aspect ratios have, and a
fifth more where ratios are random (our decision: `benchmarks/encode_programs.py`)."""
Size = tuple[int, int]
"""Height and width in pixels."""


@runtime_checkable
class PictureEncoder(Protocol):
    """What encodes pictures."""

    def latents(
        self, images: list[Float32[np.ndarray, "_ _ 3"]], canvas: Size | None = None
    ) -> list[np.ndarray]:
        """Latents [h, w, c] after shift and scale of pictures in [-1, 1]: of one size, or of any
        sizes on a canvas that holds them."""
        ...


def encode_references(
    encoder: PictureEncoder, images: Sequence[Sequence[Image.Image]], long_side: int
) -> list[list[np.ndarray]]:
    """Resizes and encodes each sample's references.

    Returns latents [h, w, c], in the order of `images`. `long_side` is `data.reference_long_side`,
    in pixels.
    """
    resized = [[resize_for_reference(image, long_side) for image in sample] for sample in images]
    pictures = [picture for sample in resized for picture in sample]
    latents = iter(encode_pictures(encoder, pictures, on_canvases=True))
    return [[next(latents) for _ in sample] for sample in resized]


def encode_pictures(
    encoder: PictureEncoder,
    pictures: Sequence[np.ndarray],
    batch: int | None = None,
    *,
    on_canvases: bool = False,
) -> list[np.ndarray]:
    """Encodes pictures [height, width, 3] of any sizes to latents [h, w, c], in order: those of one
    size together, or those of one canvas, at most `batch` at once (None: all)."""
    groups: dict[Size, list[int]] = {}
    for index, (height, width, _) in enumerate(picture.shape for picture in pictures):
        size = (canvas_side(height), canvas_side(width)) if on_canvases else (height, width)
        groups.setdefault(size, []).append(index)
    latents: dict[int, np.ndarray] = {}
    for size, indices in groups.items():
        for some in _powers_of_two(indices, batch or len(indices)):
            made = encoder.latents([pictures[index] for index in some], size)
            latents.update(zip(some, made, strict=True))
    return [latents[index] for index in range(len(pictures))]


def canvas_side(side: int) -> int:
    """The smallest side of a canvas that holds a picture's."""
    return CANVAS // 2 if side <= CANVAS // 2 else -(-side // CANVAS) * CANVAS


def _powers_of_two(indices: list[int], most: int) -> Iterator[list[int]]:
    """Them in order in pieces of `most`; what is left in pieces of 1, 2, 4, 8, …, the largest
    first."""
    start = 0
    while (left := len(indices) - start) > 0:
        count = most if left >= most else 1 << (left.bit_length() - 1)
        yield indices[start : start + count]
        start += count
