"""Pictures and scores of a system in training: what `train` hands to the loop, and what it prints at the end."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from flax import nnx
from PIL import Image

from squeeze_jax.batch import HiddenStates
from squeeze_jax.commands.features import row_sources
from squeeze_jax.config import Config
from squeeze_jax.data.critters import Pair
from squeeze_jax.data.encoders import FrozenEncoders
from squeeze_jax.data.extract import Example
from squeeze_jax.data.features import read_metadata
from squeeze_jax.data.images import resize_for_reference, resize_for_target, to_uint8
from squeeze_jax.data.sources import CritterRows
from squeeze_jax.errors import InputError
from squeeze_jax.interop.tensors import write_beside, write_json
from squeeze_jax.processes import is_main
from squeeze_jax.sampling.pipeline import Pipeline, Ready, Settings, alike, mesh_of, places_of
from squeeze_jax.sharding import make_mesh
from squeeze_jax.training.loop import Result, SampleFunction
from squeeze_jax.training.metrics import progress_bar
from squeeze_jax.training.state import Leaves, Split

CHUNK = 64
"""Pictures sampled at once."""


def grid_sampler(config: Config, folder: Path, features: epath.PathLike) -> SampleFunction | None:
    """A function that draws held-out examples: a row of references, of samples, of true targets."""
    if config.log.grid == 0:
        return None
    if config.data.manifest is None and config.data.critters is None:
        print(f"no sample grids: the records in {features} come without their pictures")
        return None
    rows = row_sources(config, check_images=False)["held_out"]
    examples = [rows[i] for i in range(min(config.log.grid, len(rows)))]
    encoders, parallel = FrozenEncoders.of(config), config.parallel
    if not config.data.online:
        check_encoders(encoders, epath.Path(features))
    mesh = make_mesh(parallel.data, parallel.fsdp, parallel.tensor, heads=config.model.dit.heads)
    encoded = [
        piece._replace(states=jax.tree.map(np.asarray, piece.states))
        for piece in encode_examples(encoders, config, examples, places_of(mesh))
    ]
    encoders.forget_reader()  # the MLLM makes room for training
    pipelines: list[Pipeline] = []

    def sample(split: Split, leaves: Leaves, step: int) -> None:
        system_leaves = nnx.split(split.merge(leaves))[1]
        if not pipelines:
            pipelines.append(Pipeline.of(split.merge(leaves), config, encoders))
        pipelines[0].leaves = (system_leaves,)
        drawn = draw_examples(pipelines[0], encoded, Settings())
        size = (config.data.height, config.data.width)
        grid = np.concatenate(
            [
                np.concatenate([_shown(e.references[0], size) if e.references else _blank(size) for e in examples], 1),
                np.concatenate(list(drawn), 1),
                np.concatenate([to_uint8(resize_for_target(e.target, *size)) for e in examples], 1),
            ]
        )
        path = folder / "samples" / f"{step:06d}.png"
        if is_main():
            write_beside(path, lambda part: Image.fromarray(grid).save(part, "PNG"))

    return sample


def check_encoders(encoders: FrozenEncoders, features: epath.Path) -> None:
    """Raises InputError where records were made by other encoders: those that sampling would use."""
    for split in ("train", "held_out"):
        there = read_metadata(features / split).settings.get("encoders", {})
        wanted = json.loads(json.dumps(encoders.settings))
        if differing := [name for name in there | wanted if there.get(name) != wanted.get(name)]:
            listed = ", ".join(f"{name} {there.get(name)!r} there and {wanted.get(name)!r} here" for name in differing)
            raise InputError(f"{features / split}: made by other encoders ({listed}); extract with this config")


def sample_examples(
    pipeline: Pipeline,
    examples: Sequence[Example],
    settings: Settings,
    done: Callable[[int], None] = lambda count: None,
) -> np.ndarray:
    """uint8 pictures [n, height, width, 3], one an example, each from its own prompt, references and seed (its number).

    `done` is called with the number of pictures after every chunk.
    """
    places = places_of(mesh_of(pipeline.leaves))
    return draw_examples(pipeline, encode_examples(pipeline.encoders, pipeline.config, examples, places), settings, done)


class Encoded(NamedTuple):
    """Some examples, as the frozen encoders give them."""

    numbers: list[int]
    """Which they are; the last one may come several times."""
    states: HiddenStates
    latents: list[list[np.ndarray]]


def encode_examples(
    encoders: FrozenEncoders, config: Config, examples: Sequence[Example], places: int
) -> Iterator[Encoded]:
    """Examples in pieces that are drawn together, filling so many places of a mesh."""
    for piece in alike([e.references for e in examples], CHUNK, places):
        some = [examples[i] for i in piece]
        states = encoders.read([e.prompt for e in some], [e.references for e in some])
        yield Encoded(piece, states, reference_latents(encoders, config, some))


def draw_examples(
    pipeline: Pipeline,
    encoded: Iterable[Encoded],
    settings: Settings,
    done: Callable[[int], None] = lambda count: None,
) -> np.ndarray:
    """`sample_examples` of what `encode_examples` made."""
    pieces: list[list[int]] = []

    def batches() -> Iterator[tuple[Ready, list[int]]]:
        for numbers, states, latents in encoded:
            pieces.append(numbers)
            yield pipeline.ready(states, latents, settings), numbers

    pictures: dict[int, np.ndarray] = {}
    for drawn in pipeline.draw(batches()):
        piece = pieces.pop(0)
        pictures |= zip(piece, to_uint8(drawn))
        done(len(set(piece)))
    return np.stack([pictures[i] for i in sorted(pictures)])


def reference_latents(
    encoders: FrozenEncoders, config: Config, examples: Sequence[Example]
) -> list[list[np.ndarray]]:
    """Latents of every example's references, those of one size encoded together."""
    pictures = [
        [resize_for_reference(image, config.data.reference_long_side) for image in e.references] for e in examples
    ]
    by_size: dict[Any, list[np.ndarray]] = {}
    for row in pictures:
        for picture in row:
            by_size.setdefault(picture.shape, []).append(picture)
    encoded: dict[Any, Iterator[np.ndarray]] = {size: iter(encoders.latents(some)) for size, some in by_size.items()}
    return [[next(encoded[picture.shape]) for picture in row] for row in pictures]


def critter_scores(config: Config, result: Result, folder: Path, count: int) -> None:
    """Scores held-out critters by retrieval, prints the table and writes scores.json."""
    pipeline = Pipeline.of(result.split.merge(result.leaves), config, FrozenEncoders.of(config), result.step)
    score_critters(pipeline, folder / "scores.json", count, ("demo",), str(folder))


SETTINGS = ("demo", "mllm", "both", "withheld")


def score_critters(
    pipeline: Pipeline, out: Path, count: int, settings: Sequence[str] = SETTINGS, checkpoint: str = "demo"
) -> None:
    """Retrieval scores of `count` held-out pairs beside chance, pasted references and the autoencoder's ceiling.

    settings: `demo` (the checkpoint's τ), `mllm` (τ = 0, 0: the MLLM alone throughout), `both` (τ = 1, 0: both
    throughout), `withheld` (no reference: text only).
    """
    from squeeze_jax.evaluation.critters import (
        paired_difference,
        references_pasted,
        render,
        score_settings,
        true_targets,
    )

    assert pipeline.config.data.critters is not None
    rows = CritterRows(pipeline.config.data.critters, "held_out")
    count = min(count, len(rows))
    pairs: list[Pair] = [rows.pair(i) for i in range(count)]
    examples = [rows[i] for i in range(count)]
    bare = [example._replace(references=[]) for example in examples]
    ways = {
        "demo": ("staged (the demo's own τ)", examples, Settings()),
        "mllm": ("MLLM alone throughout", examples, Settings(tau1=0.0, tau2=0.0)),
        "both": ("both throughout", examples, Settings(tau1=1.0, tau2=0.0)),
        "withheld": ("references withheld", bare, Settings()),
    }

    def codec(pictures: np.ndarray) -> np.ndarray:
        latents = np.stack(pipeline.encoders.latents(list(pictures * 2 - 1)))
        return np.clip((pipeline.encoders.decode(latents) + 1) / 2, 0, 1)

    images = {}
    with progress_bar() as bar:
        for label, some, how in (ways[name] for name in settings):
            task = bar.add_task(label, total=count, figures="")
            images[label] = sample_examples(pipeline, some, how, done=lambda n, task=task: bar.advance(task, n))
    size = pipeline.config.data.critters.size
    targets = true_targets(pairs, size)
    padded = np.concatenate([targets, targets[-1:].repeat(-count % CHUNK, 0)]).astype(np.float32) / 255
    ceiling = np.concatenate([codec(padded[i : i + CHUNK]) for i in range(0, len(padded), CHUNK)])[:count]
    images |= {"reference pasted": references_pasted(pairs, size), "true target through the autoencoder": ceiling}
    scores = score_settings(images, pairs, seed=0, codec=codec)
    if not is_main():
        return
    print(f"retrieval of {count} held-out pairs, step {pipeline.step}:")
    print(render(scores))
    report = {
        "pairs": count,
        "checkpoint": checkpoint,
        "step": pipeline.step,
        "encoders": pipeline.encoders.settings,
        "critters": vars(pipeline.config.data.critters),
        "sampling": {label: vars(pipeline.resolved(how)) for label, _, how in (ways[name] for name in settings)},
        "scores": {name: score.to_json() for name, score in scores.items()},
    }
    if {"demo", "mllm"} <= set(settings):
        difference = paired_difference(scores[ways["demo"][0]], scores[ways["mllm"][0]], "subject hard")
        points = [100 * value for value in (difference.value, difference.low, difference.high)]
        print("subject hard, staged minus MLLM alone: {:+.1f} points ({:+.1f} to {:+.1f})".format(*points))
        report["staged minus MLLM alone, subject hard"] = difference._asdict()
    write_json(out, report)
    print(f"scores: {out}")


def _shown(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """A reference fitted into a cell, on white."""
    cell = Image.new("RGB", (size[1], size[0]), "white")
    fitted = image.copy()
    fitted.thumbnail((size[1], size[0]))
    cell.paste(fitted, ((size[1] - fitted.width) // 2, (size[0] - fitted.height) // 2))
    return np.asarray(cell)


def _blank(size: tuple[int, int]) -> np.ndarray:
    return np.full((*size, 3), 255, np.uint8)
