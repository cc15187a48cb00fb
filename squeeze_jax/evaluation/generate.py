"""Draws a picture set: in batches that never change, so that pictures do not either.

Batches are a list of prompts cut into pieces, whoever draws them and however often the drawing is
started again; a shard takes every n-th batch. A picture is therefore the same, bit for bit, after a
kill, or in any sharding on the same kind of machine. (Over another mesh it may differ by a grey
level.)
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from squeeze_jax.checkpoints.fingerprint import fingerprint
from squeeze_jax.config import Config
from squeeze_jax.data.images import load_image, save_png, to_uint8
from squeeze_jax.data.placement import data_parallel_size, mesh_of
from squeeze_jax.data.references import encode_references
from squeeze_jax.evaluation.picture_set import PictureSet, Prompt
from squeeze_jax.processes import is_main
from squeeze_jax.sampling.batching import plan_batches
from squeeze_jax.sampling.pipeline import Pipeline, Ready, Settings
from squeeze_jax.sampling.png_metadata import Reference, text_of
from squeeze_jax.training.metrics import progress_bar

AT_ONCE = 16
"""Pictures drawn together."""
SINGLE_LONG_SIDE, MULTI_LONG_SIDE = 512, 320
"""Longest side of references in DreamBench, of one subject and of several (UNO), in pixels; never
more than the checkpoint was trained with (`data.reference_long_side`)."""


def seed_of(seed: int, prompt: Prompt, i: int) -> int:
    """The seed of a prompt's picture `i`, from 0 to 2³² − 1: of what is drawn, not of its place
    among other prompts."""
    text = f"{seed}\n{prompt.name}\n{prompt.text}\n{i}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")


def long_side(config: Config, references: int) -> int:
    """Pixels that a prompt's references have at most on their longer side."""
    return min(
        config.data.reference_long_side, SINGLE_LONG_SIDE if references <= 1 else MULTI_LONG_SIDE
    )


def describe_system(
    pipeline: Pipeline, checkpoint: str, settings: Settings, at_once: int
) -> dict[str, Any]:
    """What decides a picture, beside its prompt, references and number."""
    how = dict(vars(pipeline.resolved(settings)))
    del how["num_images"]
    return {
        "checkpoint": checkpoint,
        "step": pipeline.step,
        "weights": "+".join(fingerprint(state) for state in pipeline.params),
        **how,
        "cfg_scale": list(how["cfg_scale"]) if isinstance(how["cfg_scale"], tuple)
        else how["cfg_scale"],
        "reference_long_side": {
            "one": long_side(pipeline.config, 1),
            "several": long_side(pipeline.config, 2),
        },
        "at_once": at_once,
    }  # fmt: skip


def generate(
    pipeline: Pipeline,
    pictures: PictureSet,
    folder: Path,
    settings: Settings,
    shard: tuple[int, int] = (0, 1),
    at_once: int = AT_ONCE,
) -> None:
    """Draws the pictures of shard i of n that are not in the folder yet, and writes each whole.

    settings: `seed` is the set's, of which each picture has its own (`seed_of`); `num_images` is
    not looked at. Raises InputError where a reference cannot be read.
    """
    prompts = pictures.prompts
    places = data_parallel_size(mesh_of(pipeline.params))
    parts, fews = plan_batches(
        [prompt.references for prompt in prompts], pictures.images, at_once, places
    )

    def absent(part: Sequence[int], few: Sequence[int]) -> list[tuple[int, int]]:
        wanted = dict.fromkeys((row, i) for row in part for i in few)
        return [(row, i) for row, i in wanted if pictures.find(folder, prompts[row], i) is None]

    own = parts[shard[0] :: shard[1]]
    shown: dict[int, list[Reference]] = {}
    under_way: list[tuple[list[int], list[int]]] = []

    def batches() -> Iterator[tuple[Ready, list[int]]]:
        for part in own:
            todo = [few for few in fews if absent(part, few)]
            for few in fews:
                if few not in todo:
                    bar.advance(task, len({(row, i) for row in part for i in few}))
            if not todo:
                continue
            loaded = [_load(pictures, prompts[row]) for row in part]
            for row, references in zip(part, loaded):
                paths = pictures.reference_paths(prompts[row])
                shown[row] = [
                    Reference(str(p), r.height, r.width) for p, r in zip(paths, references)
                ]
            ready = _ready(pipeline, [prompts[row].text for row in part], loaded, settings)
            for few in todo:
                under_way.append((part, few))
                yield ready, [seed_of(settings.seed, prompts[row], i) for row in part for i in few]

    with progress_bar() as bar:
        total = sum(len(set(part)) for part in own) * pictures.images
        task = bar.add_task(folder.name, total=total, figures="")
        for drawn in pipeline.draw(batches()):
            part, few = under_way.pop(0)
            drawn_of = dict(zip(((row, i) for row in part for i in few), to_uint8(drawn)))
            for row, i in absent(part, few) if is_main() else ():
                text = _text(pipeline, pictures, prompts[row], i, settings, shown[row])
                save_png(folder / f"{prompts[row].name}-{i}.png", drawn_of[row, i], text)
            bar.advance(task, len(drawn_of))


def _load(pictures: PictureSet, prompt: Prompt) -> list[Image.Image]:
    return [load_image(path) for path in pictures.reference_paths(prompt)]


def _ready(
    pipeline: Pipeline,
    texts: Sequence[str],
    references: Sequence[Sequence[Image.Image]],
    settings: Settings,
) -> Ready:
    """A part's prompts, encoded; each one's references at the size for their number."""
    states = pipeline.encoders.read(list(texts), [list(row) for row in references])
    sides = [long_side(pipeline.config, len(row)) for row in references]
    latents: list[list[np.ndarray]] = [[] for _ in sides]
    for side in dict.fromkeys(sides):
        of_side = [k for k in range(len(sides)) if sides[k] == side]
        encoded = encode_references(pipeline.encoders, [references[k] for k in of_side], side)
        for k, row in zip(of_side, encoded):
            latents[k] = row
    return pipeline.ready(states, latents, settings)


def _text(
    pipeline: Pipeline,
    pictures: PictureSet,
    prompt: Prompt,
    i: int,
    settings: Settings,
    references: Sequence[Reference],
) -> dict[str, Any]:
    """What is embedded in a picture, as `sample` does: it can be drawn again from that."""
    own = replace(pipeline.resolved(settings), seed=seed_of(settings.seed, prompt, i), num_images=1)
    used = bool(references) and pipeline.uses_references
    stages = own.make_schedule(pipeline.config, used).stage_names(own.steps)
    checkpoint = str(pictures.system.get("checkpoint"))
    return text_of(prompt.text, references, checkpoint, pipeline.step, own, 0, stages)
