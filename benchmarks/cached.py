"""The miniature trained with cached references beside the shipped one, which is joint: what it costs and gives.

    python train.py configs/demo_weights.py --model.dit.reference-attention cached --workdir CACHED …
    python benchmarks/cached.py CACHED [--pairs 512] [--out FILE.json]

Both draw the same held-out pairs from the same noise. Scores are `evaluate`'s, with the 95 % interval of their paired
difference; seconds are medians of interleaved rounds over one batch of 16 images, the encoders' work left out.
"""

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

from squeeze_jax.evaluation.grids import encode_examples, sample_examples
from squeeze_jax.interop.tensors import write_json
from squeeze_jax.miniature.scores import TASKS, paired_difference, render, score_settings
from squeeze_jax.miniature.source import CritterRows
from squeeze_jax.sampling.pipeline import Pipeline, Settings

IMAGES, ROUNDS = 16, 5
WAYS = {"staged": Settings(), "both throughout": Settings(tau1=1.1, tau2=0.0)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cached", type=Path)
    parser.add_argument("--pairs", type=int, default=512)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    pipelines = {"joint": Pipeline.load(), "cached": Pipeline.load(given.cached)}
    joint = pipelines["joint"]
    assert joint.config.data.critters is not None
    rows = CritterRows(joint.config.data.critters, "held_out")
    count = min(given.pairs, len(rows))
    examples = [rows[i] for i in range(count)]

    def codec(pictures: np.ndarray) -> np.ndarray:
        latents = np.stack(joint.encoders.latents(list(pictures * 2 - 1)))
        return np.clip((joint.encoders.decode(latents) + 1) / 2, 0, 1)

    names = {f"{name}, {way}": (pipeline, WAYS[way]) for way in WAYS for name, pipeline in pipelines.items()}
    images = {name: sample_examples(pipeline, examples, how) for name, (pipeline, how) in names.items()}
    scores = score_settings(images, [rows.pair(i) for i in range(count)], seed=0, codec=codec)
    print(render(scores))
    report: dict = {"pairs": count, "scores": {name: score.to_json() for name, score in scores.items()}}
    for way in WAYS:
        for task in TASKS:
            share = paired_difference(scores[f"cached, {way}"], scores[f"joint, {way}"], task)
            report[f"cached minus joint, {way}, {task}"] = share._asdict()
            points = [100 * value for value in share]
            print(f"{way}, {task}: cached minus joint " + "{:+.1f} points ({:+.1f} to {:+.1f})".format(*points))
    taken = seconds(names, examples[:IMAGES])
    for name, value in taken.items():
        print(f"{name}: {value:.2f} s for {IMAGES} images")
    if given.out:
        write_json(given.out, {**report, "seconds": taken})


def seconds(names: dict[str, tuple[Pipeline, Settings]], examples: list) -> dict[str, float]:
    """Of drawing a batch once it is read, from `ready` to latents."""
    measured: dict[str, list[float]] = {name: [] for name in names}
    for number in range(ROUNDS + 1):  # the first compiles
        for name, (pipeline, settings) in names.items():
            (batch,) = encode_examples(pipeline.encoders, pipeline.config, examples, 1)
            jax.block_until_ready(batch.states)
            began = time.perf_counter()
            jax.block_until_ready(pipeline.sample(batch.states, batch.latents, batch.numbers, settings))
            if number:
                measured[name].append(time.perf_counter() - began)
    return {name: float(np.median(values)) for name, values in measured.items()}


if __name__ == "__main__":
    main()
