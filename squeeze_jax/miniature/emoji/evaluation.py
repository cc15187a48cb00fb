"""The suite `emoji`: pictures of held-out subjects asked for in held-out sentence forms, judged by
retrieval."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from squeeze_jax.config_data import EmojiConfig
from squeeze_jax.data.record_writer import Example
from squeeze_jax.evaluation.grids import CHUNK, sample_examples
from squeeze_jax.interop.tensors import write_json
from squeeze_jax.miniature.emoji.pairs import Pair, pair_at
from squeeze_jax.miniature.emoji.scores import CHANCE, EmojiScores, judge_all
from squeeze_jax.miniature.emoji.subjects import Split
from squeeze_jax.miniature.scores import paired_gain
from squeeze_jax.processes import is_main
from squeeze_jax.sampling.pipeline import Pipeline, Settings
from squeeze_jax.storage import AnyPath
from squeeze_jax.training.metrics import progress_bar

EXAM_SEED = 1_000
"""No training data has it."""
STAGED, MLLM, BOTH = "staged", "MLLM alone throughout", "both throughout"
WITHHELD, PASTED, CEILING = "references withheld", "reference pasted", "true target, autoencoder"
WAYS = {
    STAGED: Settings(),
    MLLM: Settings(tau1=0.0, tau2=0.0),
    BOTH: Settings(tau1=1.1, tau2=0.0),
    WITHHELD: Settings(),
}


class Part(NamedTuple):
    """One part of the exam."""

    title: str
    split: Split
    subjects: int
    size: tuple[int, int]
    """Height and width in pixels."""
    share: float
    """Of the pairs that are asked for, so many are drawn."""


PARTS = (
    Part("one subject", "held_out", 1, (64, 64), 1.0),
    Part("one subject of a category never seen", "held_out_category", 1, (64, 64), 0.25),
    Part("one subject, 48 x 80 pixels", "held_out", 1, (48, 80), 0.25),
    Part("one subject, 80 x 48 pixels", "held_out", 1, (80, 48), 0.25),
    Part("two subjects", "held_out", 2, (64, 96), 1.0),
)


def pairs_of(part: Part, count: int) -> list[Pair]:
    """The first `count` pairs of a part of the exam."""
    indices = range(count) if part.subjects == 1 else range(1, 2 * count, 2)
    known = {"subjects": part.subjects, "sizes": (part.size,), "complete": True}
    return [pair_at(EXAM_SEED, index, part.split, **known) for index in indices]


def score_emoji(
    pipeline: Pipeline,
    out: AnyPath,
    count: int,
    checkpoint: str,
    parts: Sequence[Part] = PARTS,
    ways: Sequence[str] = tuple(WAYS),
) -> None:
    """Draws and judges `count` held-out pairs (fewer in the smaller parts), prints a table for
    each part and writes them as JSON, with every pair's hit.

    Parts with more subjects than the checkpoint was trained on are drawn all the same: they show
    what the multi-subject stage is for.
    """
    emoji = pipeline.config.data.emoji or EmojiConfig()
    report: dict = {
        "checkpoint": checkpoint,
        "step": pipeline.step,
        "encoders": pipeline.encoders.settings,
        "emoji": vars(emoji),
        "parts": {},
    }
    for part in parts:
        pairs = pairs_of(part, max(1, round(part.share * count)))
        scores = judge_all(draw_part(pipeline, part, pairs, ways), pairs)
        if is_main():
            print(f"\n{part.title}: {len(pairs)} pairs\n{render(scores)}", flush=True)
        report["parts"][part.title] = {
            "pairs": len(pairs),
            "chance": CHANCE,
            "ways": {name: score.to_json() for name, score in scores.items()},
        }
        if STAGED in scores and MLLM in scores:
            gain = paired_gain(scores[STAGED].hits(), scores[MLLM].hits())
            report["parts"][part.title]["staged minus MLLM alone"] = gain._asdict()
            if is_main():
                points = [100 * value for value in gain]
                print(
                    "subject, staged minus MLLM alone: {:+.1f} points ({:+.1f} to {:+.1f})".format(
                        *points
                    )
                )
    if is_main():
        write_json(out, report)
        print(f"scores: {out}")


def draw_part(
    pipeline: Pipeline, part: Part, pairs: Sequence[Pair], ways: Sequence[str]
) -> dict[str, np.ndarray]:
    """Pictures uint8 [n, height, width, 3] of every way, then the pasted reference and what the
    autoencoder makes of the truth."""
    examples = [Example(p.prompt.text, p.references(), p.target()) for p in pairs]
    bare = [example._replace(references=[]) for example in examples]
    height, width = part.size
    pictures = {}
    with progress_bar() as bar:
        for name in ways:
            task = bar.add_task(name, total=len(pairs), figures="")
            settings = Settings(
                height=height, width=width, tau1=WAYS[name].tau1, tau2=WAYS[name].tau2
            )
            pictures[name] = sample_examples(
                pipeline,
                bare if name == WITHHELD else examples,
                settings,
                done=lambda n, task=task: bar.advance(task, n),
            )
    pasted = [e.references[0].resize((width, height)) for e in examples]
    targets = np.stack([np.asarray(e.target) for e in examples])
    pictures[PASTED] = np.stack([np.asarray(picture) for picture in pasted])
    pictures[CEILING] = through_autoencoder(pipeline, targets)
    return pictures


def through_autoencoder(pipeline: Pipeline, pictures: np.ndarray) -> np.ndarray:
    """uint8 pictures [n, height, width, 3], encoded and decoded in full batches."""
    at_once = min(CHUNK, len(pictures))
    padded = np.concatenate([pictures, pictures[-1:].repeat(-len(pictures) % at_once, 0)])
    done = []
    for start in range(0, len(padded), at_once):
        some = padded[start : start + at_once].astype(np.float32) / 127.5 - 1
        decoded = pipeline.encoders.decode(np.stack(pipeline.encoders.latents(list(some))))
        done.append(np.clip(np.rint((decoded + 1) * 127.5), 0, 255).astype(np.uint8))
    return np.concatenate(done)[: len(pictures)]


def render(scores: dict[str, EmojiScores]) -> str:
    """Markdown, in percent with 95 % intervals."""
    names = list(next(iter(scores.values())).to_json()["factors"])
    two = len(next(iter(scores.values())).judged[0].subjects) == 2
    first = ["subjects right and in place, %", "exchanged"] if two else ["right among 16, %"]
    copied = ["copied"]
    lines = [["", *first, "scene, right of two", *names, *copied]]
    lines.append(["---"] * len(lines[0]))
    for way, score in scores.items():
        shares = [score.subject(), *([score.swapped()] if two else []), score.scene()]
        shares += [score.factor(name) for name in names] + [score.copied()]
        whole, rest = shares[0], shares[1:]
        interval = f" ({100 * whole.low:.1f}–{100 * whole.high:.1f})"
        cells = [f"{100 * whole.value:.1f}{interval}"]
        lines.append([way, *cells, *(f"{100 * share.value:.1f}" for share in rest)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
