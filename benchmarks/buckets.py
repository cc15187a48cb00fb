"""How many shapes of batch and how much padding, for photographs of mixed aspect ratios: the table of docs/data.md.

    python benchmarks/buckets.py

100,000 examples are drawn, not read: targets as cameras take them, one to four references, prompts of 8 to 128 tokens.
"""

import numpy as np

from squeeze_jax.data.buckets import Sizes, make_buckets, shapes, waste
from squeeze_jax.data.images import nearest_size, reference_size

RATIOS = {(3, 4): 0.3, (4, 3): 0.25, (1, 1): 0.2, (2, 3): 0.1, (3, 2): 0.1, (9, 16): 0.03, (16, 9): 0.02}
"""height : width and how often."""
ONE, FIVE = ((512, 512),), ((512, 512), (448, 576), (576, 448), (384, 704), (704, 384))
BATCH = 256


def draw(count: int, buckets: tuple[tuple[int, int], ...]) -> list[Sizes]:
    rng = np.random.default_rng(0)
    ratios = list(RATIOS)

    def picture() -> tuple[int, int]:
        height, width = ratios[rng.choice(len(ratios), p=list(RATIOS.values()))]
        side = int(rng.integers(800, 4000)) / max(height, width)
        return round(height * side), round(width * side)

    found = []
    for _ in range(count):
        height, width = nearest_size(*picture(), buckets)
        references = [reference_size(*picture(), 512) for _ in range(rng.choice([1, 2, 3, 4], p=[0.6, 0.2, 0.15, 0.05]))]
        tokens = sum(h // 16 * (w // 16) for h, w in references)
        text, image = int(rng.integers(8, 129)), 256 * len(references)
        found.append(Sizes(height // 8, width // 8, text, image, len(references), tokens))
    return found


def main() -> None:
    print("| | shapes | padding, % of tokens |\n|---|---|---|")
    sizes = draw(100_000, ONE)
    for name, some, batch in (
        ("512×512, one shape for all", sizes, len(sizes)),
        ("512×512, by number of references", sizes, BATCH),
        ("five sizes, by target tokens and number of references", draw(100_000, FIVE), BATCH),
    ):
        buckets = make_buckets(some, batch)
        print(f"| {name} | {shapes(buckets)} | {100 * waste(buckets, some):.1f} |")


if __name__ == "__main__":
    main()
