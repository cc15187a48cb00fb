"""How many programs the autoencoder's encode takes for photographs of many sizes, and how long.

    python benchmarks/encode_programs.py [--large]

200 photographs of random aspect ratios (1:2 to 2:1, long side of 512 pixels or less) are encoded as
references of an extraction, eight examples at a time, and one after the other as in sampling. Before:
one program for each size and number of pictures. Now: canvases of few sizes, numbers that are powers
of two. The autoencoder has FLUX.1's depth; its widths are 8 to 16, with `--large` FLUX.1's own.
"""

import sys
import time
from collections.abc import Iterable

import numpy as np
from flax import nnx

from squeeze_jax.data.feature_extractor import FeatureExtractor
from squeeze_jax.data.images import reference_size
from squeeze_jax.data.references import encode_pictures
from squeeze_jax.models.autoencoder import Autoencoder, AutoencoderConfig

COUNT, BATCH, LONG_SIDE = 200, 8, 512
NARROW = {"block_out_channels": (8, 8, 16, 16), "norm_groups": 4}


def draw() -> list[tuple[int, int]]:
    rng = np.random.default_rng(0)
    ratios = 2 ** rng.uniform(-1, 1, COUNT)
    sides = np.where(rng.random(COUNT) < 0.2, rng.integers(128, 512, COUNT), 2048)
    shapes = [(side, round(side / r)) if r > 1 else (round(side * r), side) for r, side in zip(ratios, sides)]
    return [reference_size(int(height), int(width), LONG_SIDE) for height, width in shapes]


def by_size(encoder: FeatureExtractor, pictures: list[np.ndarray]) -> list[np.ndarray]:
    """As it was: those of one size together."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, picture in enumerate(pictures):
        groups.setdefault(picture.shape, []).append(index)
    found = {i: one for some in groups.values() for i, one in zip(some, encoder.latents([pictures[i] for i in some]))}
    return [found[i] for i in range(len(pictures))]


def on_canvases(encoder: FeatureExtractor, pictures: list[np.ndarray]) -> list[np.ndarray]:
    return encode_pictures(encoder, pictures, BATCH, on_canvases=True)


def measure(autoencoder: Autoencoder, encode, pieces: Iterable[list[np.ndarray]]):
    """Programs, seconds with compilation, latents."""
    encoder, pieces = FeatureExtractor(lambda: None, autoencoder, {}), list(pieces)  # pyright: ignore
    asked, plain = set(), encoder._encode

    def noted(*x):
        asked.add(tuple(part.shape for part in x))
        return plain(*x)

    encoder._encode = noted
    start = time.perf_counter()
    latents = [one for piece in pieces for one in encode(encoder, piece)]
    return len(asked), time.perf_counter() - start, latents


def main() -> None:
    sizes = draw()
    rng = np.random.default_rng(1)
    pictures = [rng.uniform(-1, 1, (*size, 3)).astype(np.float32) for size in sizes]
    config = AutoencoderConfig(**({} if "--large" in sys.argv else NARROW))
    autoencoder = Autoencoder(config, rngs=nnx.Rngs(0))
    print(f"{COUNT} photographs of {len(set(sizes))} sizes")
    print("| | programs | s, with compilation |\n|---|---|---|")
    for name, step in (("eight at a time", BATCH), ("one at a time", 1)):
        pieces = [pictures[i : i + step] for i in range(0, COUNT, step)]
        before = measure(autoencoder, by_size, pieces)
        after = measure(autoencoder, on_canvases, pieces)
        for how, (programs, seconds, _) in (("by size", before), ("on canvases", after)):
            print(f"| {name}, {how} | {programs} | {seconds:.0f} |", flush=True)
        worst = max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in zip(before[2], after[2]))
        print(f"largest difference, of the largest latent: {worst:.1e}")


if __name__ == "__main__":
    main()
