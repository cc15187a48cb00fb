"""The suite `critters`: samples of held-out pairs, scored by retrieval among redrawn pictures."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from squeeze_jax.config import Config
from squeeze_jax.data.feature_extractor import FeatureExtractor
from squeeze_jax.data.record_writer import Example
from squeeze_jax.evaluation.grids import CHUNK, sample_examples
from squeeze_jax.interop.tensors import write_json
from squeeze_jax.miniature.critters import Pair
from squeeze_jax.miniature.scores import (
    CHANCE,
    TASKS,
    Scores,
    paired_difference,
    references_pasted,
    render,
    score_settings,
    true_targets,
)
from squeeze_jax.miniature.source import CritterRows
from squeeze_jax.processes import is_main
from squeeze_jax.sampling.pipeline import Pipeline, Settings
from squeeze_jax.storage import AnyPath, write_beside
from squeeze_jax.training.loop import Result
from squeeze_jax.training.metrics import progress_bar


def score_run(config: Config, result: Result, folder: AnyPath, count: int) -> None:
    """Scores held-out critters by retrieval, says so in three lines and writes scores.json and a
    contact sheet."""
    pipeline = Pipeline.of(
        result.split.merge(result.params), config, FeatureExtractor.of(config), result.step
    )
    score_critters(pipeline, folder / "scores.json", count, ("demo",), str(folder), brief=True)


SHOWN = 12
"""Pairs of a contact sheet."""


def save_sheet(path: AnyPath, examples: Sequence[Example], drawn: np.ndarray) -> None:
    """A row of references, one of what was drawn and one of true targets, at three times their
    size."""
    rows = [
        [np.asarray(example.references[0]) for example in examples],
        list(drawn),
        [np.asarray(example.target) for example in examples],
    ]
    sheet = Image.fromarray(np.concatenate([np.concatenate(row, 1) for row in rows]))
    large = sheet.resize((3 * sheet.width, 3 * sheet.height), Image.Resampling.NEAREST)
    write_beside(path, lambda part: large.save(part, "PNG"))


def summary(scores: Scores) -> str:
    """One line: each task in percent."""
    tasks = (f"{task} {100 * scores.share(task).value:.0f} %" for task in TASKS)
    return f"right among 16 (chance {100 * CHANCE:.0f} %): " + ", ".join(tasks)


SETTINGS = ("demo", "mllm", "both", "withheld")


def score_critters(
    pipeline: Pipeline,
    out: AnyPath,
    count: int,
    settings: Sequence[str] = SETTINGS,
    checkpoint: str = "demo",
    brief: bool = False,
) -> None:
    """Retrieval scores of `count` held-out pairs.

    brief: three lines and a contact sheet beside `out` in place of the tables.

    Beside them stand chance, pasted references and the ceiling that the autoencoder sets.

    settings: `demo` (the checkpoint's τ), `mllm` (τ = 0, 0: the MLLM alone throughout), `both`
    (τ = 1.1, 0: both throughout), `withheld` (no reference: text only).
    """
    assert pipeline.config.data.critters is not None
    rows = CritterRows(pipeline.config.data.critters, "held_out")
    count = min(count, len(rows))
    pairs: list[Pair] = [rows.pair(i) for i in range(count)]
    examples = [rows[i] for i in range(count)]
    bare = [example._replace(references=[]) for example in examples]
    ways = {
        "demo": ("staged (the demo's own τ)", examples, Settings()),
        "mllm": ("MLLM alone throughout", examples, Settings(tau1=0.0, tau2=0.0)),
        "both": ("both throughout", examples, Settings(tau1=1.1, tau2=0.0)),
        "withheld": ("references withheld", bare, Settings()),
    }

    def codec(pictures: np.ndarray) -> np.ndarray:
        latents = np.stack(pipeline.encoders.latents(list(pictures * 2 - 1)))
        return np.clip((pipeline.encoders.decode(latents) + 1) / 2, 0, 1)

    images = {}
    with progress_bar() as bar:
        for label, some, how in (ways[name] for name in settings):
            task = bar.add_task(label, total=count, figures="")
            images[label] = sample_examples(
                pipeline, some, how, done=lambda n, task=task: bar.advance(task, n)
            )
    size = pipeline.config.data.critters.size
    targets = true_targets(pairs, size)
    padded = (
        np.concatenate([targets, targets[-1:].repeat(-count % CHUNK, 0)]).astype(np.float32) / 255
    )
    ceiling = np.concatenate([codec(padded[i : i + CHUNK]) for i in range(0, len(padded), CHUNK)])[
        :count
    ]
    images |= {
        "reference pasted": references_pasted(pairs, size),
        "true target through the autoencoder": ceiling,
    }
    scores = score_settings(images, pairs, seed=0, codec=codec)
    if not is_main():
        return
    step = "" if pipeline.step is None else f", step {pipeline.step}"
    print(f"retrieval of {count} held-out pairs{step}:")
    if brief:
        sheet = out.with_name("contact_sheet.png")
        save_sheet(sheet, examples[:SHOWN], images[ways[settings[0]][0]][:SHOWN])
        print(summary(scores[ways[settings[0]][0]]))
        print(f"contact sheet to open (references, drawn, true targets): {sheet}")
    else:
        print(render(scores))
    report = {
        "pairs": count,
        "checkpoint": checkpoint,
        "step": pipeline.step,
        "encoders": pipeline.encoders.settings,
        "critters": vars(pipeline.config.data.critters),
        "sampling": {
            label: vars(pipeline.resolved(how))
            for label, _, how in (ways[name] for name in settings)
        },
        "scores": {name: score.to_json() for name, score in scores.items()},
    }
    if {"demo", "mllm"} <= set(settings):
        difference = paired_difference(
            scores[ways["demo"][0]], scores[ways["mllm"][0]], "subject hard"
        )
        points = [100 * value for value in (difference.value, difference.low, difference.high)]
        print(
            "subject hard, staged minus MLLM alone: {:+.1f} points ({:+.1f} to {:+.1f})".format(
                *points
            )
        )
        report["staged minus MLLM alone, subject hard"] = difference._asdict()
    write_json(out, report)
    print(f"scores: {out}")
