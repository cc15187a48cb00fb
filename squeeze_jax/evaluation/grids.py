"""Pictures of held-out examples: sample grids during training, and samples that suites score."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from etils import epath
from flax import nnx
from PIL import Image

from squeeze_jax.batch import HiddenStates
from squeeze_jax.config import Config
from squeeze_jax.data.feature_extractor import FeatureExtractor
from squeeze_jax.data.images import resize_for_target, to_uint8
from squeeze_jax.data.mixture import record_folders
from squeeze_jax.data.record_writer import Example
from squeeze_jax.data.records import read_metadata
from squeeze_jax.data.references import encode_references
from squeeze_jax.data.sources import open_examples, source_of
from squeeze_jax.errors import InputError
from squeeze_jax.processes import is_main
from squeeze_jax.sampling.batching import group_prompts
from squeeze_jax.sampling.pipeline import Pipeline, Ready, Settings, data_parallel_size, mesh_of
from squeeze_jax.sharding import make_mesh
from squeeze_jax.storage import AnyPath, write_beside
from squeeze_jax.training.loop import SampleFunction
from squeeze_jax.training.state import Params, Split

CHUNK = 64
"""Pictures sampled at once."""


def grid_sampler(
    config: Config, folder: AnyPath, features: epath.PathLike
) -> SampleFunction | None:
    """A function that draws held-out examples: a row of references, of samples, of true targets."""
    if config.log.grid == 0:
        return None
    if source_of(config) is None:
        print(f"no sample grids: the records in {features} come without their pictures")
        return None
    encoders, parallel = FeatureExtractor.of(config), config.parallel
    # The rows that records were made of: with `skip_bad` those that can be used.
    rows = open_examples(config, check_images=config.data.skip_bad)["held_out"]
    examples = []
    for i in range(len(rows)):
        if len(examples) == config.log.grid:
            break
        try:
            encoders.reader.check(rows.prompt(i), rows.references(i))
            examples.append(rows[i])
        except InputError:
            if not config.data.skip_bad:
                raise
    if not examples:
        print("no sample grids: no held-out row can be used")
        return None
    if not config.data.online:
        for records, _ in record_folders(config.data, features):
            check_encoders(encoders, records)
    mesh = make_mesh(parallel.data, parallel.fsdp, parallel.tensor, heads=config.model.dit.heads)
    encoded = [
        piece._replace(states=jax.tree.map(np.asarray, piece.states))
        for piece in encode_examples(encoders, config, examples, data_parallel_size(mesh))
    ]
    encoders.forget_reader()  # the MLLM makes room for training
    pipelines: list[Pipeline] = []

    def sample(split: Split, leaves: Params, step: int) -> None:
        system_leaves = nnx.split(split.merge(leaves))[1]
        if not pipelines:
            pipelines.append(Pipeline.of(split.merge(leaves), config, encoders))
        pipelines[0].params = (system_leaves,)
        drawn = draw_examples(pipelines[0], encoded, Settings())
        _save_grid(config, examples, drawn, folder / "samples" / f"{step:06d}.png")

    return sample


def draw_grid(pipeline: Pipeline, examples: Sequence[Example], path: AnyPath) -> None:
    """Draws held-out examples with the config's own settings, as a run's grids are."""
    _save_grid(pipeline.config, examples, sample_examples(pipeline, examples, Settings()), path)


def _save_grid(
    config: Config, examples: Sequence[Example], drawn: np.ndarray, path: AnyPath
) -> None:
    """A row of references, of samples, of true targets."""
    size = (config.data.height, config.data.width)
    shown = [_shown(e.references[0], size) if e.references else _blank(size) for e in examples]
    targets = [to_uint8(resize_for_target(e.target, *size)) for e in examples]
    grid = np.concatenate([np.concatenate(row, 1) for row in (shown, list(drawn), targets)])
    if is_main():
        write_beside(path, lambda part: Image.fromarray(grid).save(part, "PNG"))


def check_encoders(encoders: FeatureExtractor, features: epath.Path) -> None:
    """Raises InputError where records were made by other encoders than sampling would use."""
    for split in ("train", "held_out"):
        there = read_metadata(features / split).settings.get("encoders", {})
        wanted = json.loads(json.dumps(encoders.settings))
        if differing := [name for name in there | wanted if there.get(name) != wanted.get(name)]:
            listed = ", ".join(
                f"{name} {there.get(name)!r} there and {wanted.get(name)!r} here"
                for name in differing
            )
            raise InputError(
                f"{features / split}: made by other encoders ({listed}); extract with this config"
            )


def sample_examples(
    pipeline: Pipeline,
    examples: Sequence[Example],
    settings: Settings,
    done: Callable[[int], None] = lambda count: None,
) -> np.ndarray:
    """uint8 pictures [n, height, width, 3], one an example, each from its own prompt, references
    and seed (its number).

    `done` is called with the number of pictures after every chunk.
    """
    places = data_parallel_size(mesh_of(pipeline.params))
    return draw_examples(
        pipeline,
        encode_examples(pipeline.encoders, pipeline.config, examples, places),
        settings,
        done,
    )


class Encoded(NamedTuple):
    """Some examples, as the frozen encoders give them."""

    numbers: list[int]
    """Which they are; the last one may come several times."""
    states: HiddenStates
    latents: list[list[np.ndarray]]


def encode_examples(
    encoders: FeatureExtractor, config: Config, examples: Sequence[Example], places: int
) -> Iterator[Encoded]:
    """Examples in pieces that are drawn together, filling so many places of a mesh."""
    for piece in group_prompts([e.references for e in examples], CHUNK, places):
        some = [examples[i] for i in piece]
        states = encoders.read([e.prompt for e in some], [e.references for e in some])
        longest = config.data.reference_long_side
        yield Encoded(
            piece, states, encode_references(encoders, [e.references for e in some], longest)
        )


def draw_examples(
    pipeline: Pipeline,
    encoded: Iterable[Encoded],
    settings: Settings,
    done: Callable[[int], None] = lambda count: None,
) -> np.ndarray:
    """`sample_examples` of what `encode_examples` made: pictures [examples, height, width, 3]."""
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


def _shown(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """A reference fitted into a cell, on white."""
    cell = Image.new("RGB", (size[1], size[0]), "white")
    fitted = image.copy()
    fitted.thumbnail((size[1], size[0]))
    cell.paste(fitted, ((size[1] - fitted.width) // 2, (size[0] - fitted.height) // 2))
    return np.asarray(cell)


def _blank(size: tuple[int, int]) -> np.ndarray:
    return np.full((*size, 3), 255, np.uint8)
