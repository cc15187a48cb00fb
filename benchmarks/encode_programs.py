"""How many programs the autoencoder's encode takes for photographs of many sizes.

    python benchmarks/encode_programs.py [--time]

200 photographs of random aspect ratios (1:2 to 2:1, a fifth of them small, long side of 512 pixels
or less) are encoded as references of an extraction, eight pictures at a time, and one after the
other as in sampling. By size: one program for each size and number of pictures, as it was. On
canvases: what `encode_pictures` does. With `--time` the first ones are encoded, too, by an
autoencoder of FLUX.1's depth with widths of 8 to 16.
"""

import sys
import time

import numpy as np
from flax import nnx

from squeeze_jax.data.feature_extractor import FeatureExtractor
from squeeze_jax.data.images import reference_size
from squeeze_jax.data.references import canvas_side, encode_pictures
from squeeze_jax.models.autoencoder import Autoencoder, AutoencoderConfig

COUNT, BATCH, LONG_SIDE = 200, 8, 512
TIMED = 16
NARROW = AutoencoderConfig(block_out_channels=(8, 8, 16, 16), norm_groups=4)


def draw() -> list[tuple[int, int]]:
    rng = np.random.default_rng(0)
    ratios = 2 ** rng.uniform(-1, 1, COUNT)
    sides = np.where(rng.random(COUNT) < 0.2, rng.integers(128, 512, COUNT), 2048)
    shapes = [(side, round(side / r)) if r > 1 else (round(side * r), side) for r, side in zip(ratios, sides)]
    return [reference_size(int(height), int(width), LONG_SIDE) for height, width in shapes]


class Counter:
    """Counts programs: shapes that `encode` is asked for. Runs them only with an `encoder`."""

    def __init__(self, encoder: FeatureExtractor | None = None) -> None:
        self.encoder, self.programs = encoder, set()

    def latents(self, images: list[np.ndarray], canvas: tuple[int, int] | None = None) -> list[np.ndarray]:
        sizes = {image.shape[:2] for image in images}
        whole = canvas is None or sizes == {canvas}
        self.programs.add((len(images), whole, canvas or sizes.pop()))
        return images if self.encoder is None else self.encoder.latents(images, canvas)


def by_size(encoder: Counter, pictures: list[np.ndarray]) -> list[np.ndarray]:
    """As it was: those of one size together."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, picture in enumerate(pictures):
        groups.setdefault(picture.shape, []).append(index)
    found = {i: one for some in groups.values() for i, one in zip(some, encoder.latents([pictures[i] for i in some]))}
    return [found[i] for i in range(len(pictures))]


def on_canvases(encoder: Counter, pictures: list[np.ndarray]) -> list[np.ndarray]:
    return encode_pictures(encoder, pictures, BATCH, on_canvases=True)


def main() -> None:
    sizes = draw()
    rng = np.random.default_rng(1)
    pictures = [rng.uniform(-1, 1, (*size, 3)).astype(np.float32) for size in sizes]
    print(f"{COUNT} photographs of {len(set(sizes))} sizes\n| | by size | on canvases |\n|---|---|---|")
    for name, step in (("eight at a time", BATCH), ("one at a time", 1)):
        counts = []
        for encode in (by_size, on_canvases):
            counter = Counter()
            for start in range(0, COUNT, step):
                encode(counter, pictures[start : start + step])
            counts.append(len(counter.programs))
        print(f"| programs, {name} | {counts[0]} | {counts[1]} |")
    areas = [sum(h * w for h, w in some) for some in (sizes, [(canvas_side(h), canvas_side(w)) for h, w in sizes])]
    print(f"| million pixels | {areas[0] / 1e6:.1f} | {areas[1] / 1e6:.1f} |")
    if (timed := pictures[:TIMED]) and "--time" in sys.argv:
        autoencoder, seconds, found = Autoencoder(NARROW, rngs=nnx.Rngs(0)), [], []
        for encode in (by_size, on_canvases):
            counter = Counter(FeatureExtractor(lambda: None, autoencoder, {}))  # pyright: ignore
            start = time.perf_counter()
            found.append([encode(counter, [picture])[0] for picture in timed])
            seconds.append(f"{time.perf_counter() - start:.0f} ({len(counter.programs)} programs)")
        print(f"| s for the first {TIMED}, one at a time, with compilation | {seconds[0]} | {seconds[1]} |")
        worst = max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in zip(*found))
        print(f"largest difference: {worst:.1e} of the largest latent")


if __name__ == "__main__":
    main()
