"""Many pictures of one prompt: `vmap` over keys around the whole staged sampler, one program.

    python examples/sample_many.py --count 8 --out many.png

The shipped miniature draws; its encoders make the inputs and the pictures, the functional core
everything in between.
"""

import argparse
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from squeeze_jax import Pipeline, Settings, functional
from squeeze_jax.interop.load import DEMO
from squeeze_jax.sampling.batching import pad_references

PROMPT = "a big critter jumping on the beach at sunset, with a red balloon, on the left"
REFERENCE = DEMO / "references" / "critter-0.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("many.png"))
    given = parser.parse_args()

    config, trained, frozen = functional.load(DEMO / "system")
    pipeline = Pipeline.load()
    states, latents = pipeline.encode([given.prompt], [[Image.open(REFERENCE)]])
    references = pad_references(latents, config.target_grid, config.model.dit.reference_positions)

    def draw(key):
        settings = Settings(steps=given.steps)
        return functional.sample(trained, frozen, states, references, key, config, settings)

    keys = jax.random.split(jax.random.key(0), given.count)
    tokens = jax.jit(jax.vmap(draw))(keys)[:, 0]

    pictures = pipeline.decode(tokens)  # in [-1, 1]
    strip = np.concatenate(list(pictures), axis=1)
    Image.fromarray(np.round((strip + 1) * 127.5).astype(np.uint8)).save(given.out)
    print(f"{given.count} pictures: {given.out}")


if __name__ == "__main__":
    main()
