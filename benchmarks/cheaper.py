"""What cheaper steps cost on the miniature, beside simply fewer steps.

    python benchmarks/cheaper.py [--pairs 64] [--out FILE.json]          (int8 needs the `quantize` extra)

Every way draws the same held-out pairs from the same noise. `calls` are evaluations of the guided velocity an image (a
first-block cache: the mean over batches of 64, blocks that were left out counted as not run); `off` is the relative
distance of the latents to those of 48 to 50 steps of second order that change stage at the same times; the scores are
`evaluate`'s, with 95 % intervals of about ±5 points at 64 pairs.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

from squeeze_jax.batch import HiddenStates
from squeeze_jax.data.images import to_uint8
from squeeze_jax.data.references import encode_references
from squeeze_jax.interop.tensors import write_json
from squeeze_jax.miniature.scores import score_settings
from squeeze_jax.miniature.source import CritterRows
from squeeze_jax.sampling.caching import ALWAYS_EVALUATED
from squeeze_jax.sampling.pipeline import Pipeline, Settings
from squeeze_jax.sampling.schedule import MAX_STEPS

AT_ONCE = 64
Batch = tuple[HiddenStates, list[list[np.ndarray]], list[int]]
"""Hidden states, latents of references and seeds, as `Pipeline.sample` takes them."""
WAYS: dict[str, Settings] = {
    **{f"Euler, {steps} steps": Settings(steps=steps) for steps in (25, 16, 12, 10, 8, 6)},
    **{f"multistep, {steps} steps": Settings(steps=steps, solver="multistep") for steps in (25, 12, 8, 6)},
    **{
        f"25 steps, TaylorSeer {interval}, order {order}": Settings(steps=25, cache_interval=interval, max_order=order)
        for interval, order in ((2, 1), (3, 0), (3, 1), (3, 2), (5, 1))
    },
    **{f"25 steps, first block {x}": Settings(steps=25, first_block_threshold=x) for x in (0.05, 0.1, 0.2, 0.4)},
    "25 steps, int8": Settings(steps=25),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    pipeline = Pipeline.load()
    assert pipeline.config.data.critters is not None
    rows = CritterRows(pipeline.config.data.critters, "held_out")
    count = min(given.pairs, len(rows)) // AT_ONCE * AT_ONCE
    batches: list[Batch] = []
    for start in range(0, count, AT_ONCE):
        some = [rows[i] for i in range(start, start + AT_ONCE)]
        states = pipeline.encoders.read([e.prompt for e in some], [e.references for e in some])
        latents = encode_references(
            pipeline.encoders, [e.references for e in some], pipeline.config.data.reference_long_side
        )
        batches.append((states, latents, list(range(start, start + AT_ONCE))))

    def drawn(pipeline: Pipeline, settings: Settings) -> np.ndarray:
        return np.concatenate([np.asarray(pipeline.sample(*batch, settings)) for batch in batches])

    def finely(settings: Settings) -> np.ndarray:
        """Latents by small steps whose stages end where those of `settings` do."""
        fine, some = 50 // settings.steps, []
        for batch in batches:
            borders = pipeline.run(*batch, settings).schedule.borders
            run = pipeline.run(*batch, Settings(steps=fine * settings.steps, solver="multistep"))
            schedule = run.schedule._replace(borders=fine * borders)
            every = np.array([0, MAX_STEPS], np.int32)
            some.append(run.sampler.denoise(pipeline.params, run.state, run.prepared, schedule, run.scales, every)[0])
        return np.concatenate(some)

    truths = {steps: finely(Settings(steps=steps)) for steps in {settings.steps for settings in WAYS.values()}}
    off, calls, images = {}, {}, {}
    for way, settings in WAYS.items():
        own = pipeline.quantised() if "int8" in way else pipeline
        tokens = drawn(own, settings)
        truth = truths[settings.steps]
        off[way] = float(np.linalg.norm(tokens - truth) / np.linalg.norm(truth))
        calls[way] = evaluations(own, batches, settings)
        images[way] = np.concatenate([to_uint8(own.decode(part, settings)) for part in np.split(tokens, len(batches))])
        print(f"{way}: {calls[way]:.1f} calls, off by {off[way]:.3f}", flush=True)

    def codec(pictures: np.ndarray) -> np.ndarray:
        latents = np.stack(pipeline.encoders.latents(list(pictures * 2 - 1)))
        return np.clip((pipeline.encoders.decode(latents) + 1) / 2, 0, 1)

    scores = score_settings(images, [rows.pair(i) for i in range(count)], seed=0, codec=codec)
    print("| way | calls | off | subject hard, % | scene hard, % |\n|---|---|---|---|---|")
    report = {}
    for way in WAYS:
        found = {task: 100 * float(np.mean(scores[way].hits[task])) for task in ("subject hard", "scene hard")}
        print(f"| {way} | {calls[way]:.1f} | {off[way]:.3f} | {found['subject hard']:.1f} | {found['scene hard']:.1f} |")
        report[way] = {"calls": calls[way], "off": off[way], **found}
    if given.out:
        write_json(given.out, {"pairs": count, "ways": report})


def evaluations(pipeline: Pipeline, batches: list[Batch], settings: Settings) -> float:
    """Guided velocities an image; of a first-block cache the two branches' runs of all blocks, halved."""
    steps, run = pipeline.resolved(settings).steps, pipeline.run(*batches[0], settings)
    borders = [0, *(int(border) for border in run.schedule.borders)]
    begins = [max(b for b in borders if b <= i) for i in range(steps)]
    if settings.cache_interval > 1:
        return sum((i - begin) % settings.cache_interval == 0 or i < ALWAYS_EVALUATED for i, begin in enumerate(begins))
    if not settings.first_block_threshold:
        return steps
    runs = 0
    for batch in batches:
        run = pipeline.run(*batch, settings)
        state = run.state
        for i in range(steps):
            span = np.array([i, i + 1], np.int32)
            after = run.sampler.denoise(pipeline.params, state, run.prepared, run.schedule, run.scales, span)
            runs += sum(not np.array_equal(a.rest, b.rest) for a, b in zip(after.cache, state.cache, strict=True))
            state = jax.block_until_ready(after)
    return runs / 2 / len(batches)


if __name__ == "__main__":
    main()
