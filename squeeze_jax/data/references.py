"""Reference pictures to latents: the one road of extraction, sampling, sample grids and
certificates."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32
from PIL import Image

from squeeze_jax.data.images import resize_for_reference


@runtime_checkable
class PictureEncoder(Protocol):
    """What encodes pictures of one size."""

    def latents(self, images: list[Float32[np.ndarray, "height width 3"]]) -> list[np.ndarray]:
        """Latents [h, w, c] after shift and scale of pictures in [-1, 1], all of one size."""
        ...


def encode_references(
    encoder: PictureEncoder, images: Sequence[Sequence[Image.Image]], long_side: int
) -> list[list[np.ndarray]]:
    """Resizes and encodes each sample's references; those of one size are encoded together.

    Returns latents [h, w, c], in the order of `images`. `long_side` is `data.reference_long_side`,
    in pixels.
    """
    resized = [[resize_for_reference(image, long_side) for image in sample] for sample in images]
    latents = iter(encode_pictures(encoder, [picture for sample in resized for picture in sample]))
    return [[next(latents) for _ in sample] for sample in resized]


def encode_pictures(
    encoder: PictureEncoder, pictures: Sequence[np.ndarray], batch: int | None = None
) -> list[np.ndarray]:
    """Encodes pictures of any sizes, in order: those of one size together, at most `batch` at
    once (None: all)."""
    by_size: dict[tuple[int, ...], list[int]] = {}
    for index, picture in enumerate(pictures):
        by_size.setdefault(picture.shape, []).append(index)
    latents: dict[int, np.ndarray] = {}
    for indices in by_size.values():
        for start in range(0, len(indices), batch or len(indices)):
            some = indices[start : start + batch] if batch else indices
            latents.update(
                zip(some, encoder.latents([pictures[index] for index in some]), strict=True)
            )
    return [latents[index] for index in range(len(pictures))]
