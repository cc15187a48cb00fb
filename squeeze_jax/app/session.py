"""What the page does, without the page: read uploads, draw with previews, restore settings from
a picture."""

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from threading import Lock
from typing import NamedTuple

import numpy as np
from PIL import Image

from squeeze_jax.app.strip import stages_of_steps, strip
from squeeze_jax.data.images import MULTIPLE, load_image, save_png, to_uint8
from squeeze_jax.diffusion.stages import MAX_TAU
from squeeze_jax.errors import InputError
from squeeze_jax.sampling.pipeline import Pipeline, Settings
from squeeze_jax.sampling.png_metadata import Embedded, Reference, text_of
from squeeze_jax.sampling.schedule import MAX_STEPS
from squeeze_jax.sampling.solver_config import DEFAULT_SOLVER
from squeeze_jax.sampling.training_range import beyond_training

MAX_BYTES, MAX_PIXELS, MAX_REFERENCES = 25 * 2**20, 50_000_000, 4
LIMITS = (
    f"up to {MAX_REFERENCES} pictures of {MAX_BYTES // 2**20} MB "
    f"and {MAX_PIXELS // 10**6} megapixels"
)
PREVIEWS = 12
"""About how many previews a run shows."""


class Range(NamedTuple):
    """What a slider offers: from `low` to `high` by `step`."""

    low: float
    high: float
    step: float


@dataclass(frozen=True)
class AppState:
    """A loaded checkpoint with the name it goes by, and the folder where pictures are put."""

    pipeline: Pipeline
    checkpoint: str
    folder: Path
    lock: Lock = field(default_factory=Lock)
    """Held while something is computed: a run that was stopped goes on to the end of what it is
    at."""

    @property
    def ranges(self) -> dict[str, Range]:
        """By setting. Sizes go from half the checkpoint's own to twice it."""
        own = self.pipeline.resolved(Settings())

        def side(length: int) -> Range:
            return Range(max(MULTIPLE, length // 2 // MULTIPLE * MULTIPLE), 2 * length, MULTIPLE)

        return {
            "height": side(own.height),
            "width": side(own.width),
            "steps": Range(1, MAX_STEPS, 1),
            "tau1": Range(0.0, MAX_TAU, 0.01),
            "tau2": Range(0.0, MAX_TAU, 0.01),
            "cfg_scale": Range(1.0, 10.0, 0.1),
            "seed": Range(0, 2**32 - 1, 1),
            "num_images": Range(1, 8, 1),
        }


class Upload(NamedTuple):
    """A reference as the page holds it."""

    path: Path
    name: str
    """What the file was called where it came from."""


class View(NamedTuple):
    """What the page shows of a run. None: as it was."""

    pictures: list[np.ndarray] | list[Path] | None
    """Previews, at the end the files."""
    strip: str
    said: str
    finished: bool = False


def accept(uploads: Sequence[Upload], folder: Path) -> tuple[list[Upload], list[str]]:
    """Those uploads that are pictures, as upright RGB files in `folder` (what the model sees), and
    what is wrong with the others, a sentence each.
    """
    folder = folder / "accepted"
    folder.mkdir(exist_ok=True)
    good, wrong = [], []
    for upload in uploads:
        if folder in upload.path.parents:  # accepted before
            good.append(upload)
            continue
        try:
            image = read_reference(upload)
        except InputError as error:
            wrong.append(str(error))
            continue
        path = Path(mkdtemp(dir=folder)) / "reference.png"
        image.save(path, compress_level=1)
        good.append(Upload(path, upload.name))
    if len(good) > MAX_REFERENCES:
        wrong.append(
            f"{len(good)} references are more than {MAX_REFERENCES}; "
            f"only the first {MAX_REFERENCES} are kept"
        )
    return good[:MAX_REFERENCES], wrong


def read_reference(upload: Upload) -> Image.Image:
    """The picture of an upload. Raises InputError, naming the file as its owner does."""
    if not upload.path.exists():
        raise InputError(f"{upload.name}: it is not kept here any more; add it again")
    try:
        size = upload.path.stat().st_size
        if size > MAX_BYTES:
            raise InputError(
                f"{upload.path}: {size / 2**20:.0f} MB are more than the limit of "
                f"{MAX_BYTES // 2**20} MB"
            )
        return load_image(upload.path, MAX_PIXELS)
    except InputError as error:
        raise InputError(str(error).replace(str(upload.path), upload.name)) from error


def plan(studio: AppState, settings: Settings, references: int, done: int = 0) -> str:
    """The strip of a run with so many references, with a warning for each stage that no step
    begins in, and for what the checkpoint was not trained for.

    Raises InputError where there is no such run.
    """
    resolved, config = studio.pipeline.resolved(settings), studio.pipeline.config
    used = references if studio.pipeline.uses_references else 0
    stages = stages_of_steps(config, resolved, bool(used))
    warnings = resolved.empty_stages(config, bool(used))
    warnings += beyond_training(config, used, resolved.height, resolved.width)
    return strip(stages, done, warnings)


def draw(
    studio: AppState, prompt: str, uploads: Sequence[Upload], settings: Settings
) -> Iterator[View]:
    """Views of a run while it goes on; the last has the finished PNGs, each with its settings
    inside.

    Raises InputError for an empty prompt, impossible settings and references that cannot be read.
    """
    started = time.perf_counter()
    pipeline, shown = studio.pipeline, len(uploads)
    resolved = pipeline.resolved(settings)
    if not prompt.strip():
        raise InputError("The prompt is empty; say what the picture should show")
    said = "Reading prompt and references; what is new in size or number is compiled first …"
    yield View(None, plan(studio, settings, shown), said)
    images = [read_reference(upload) for upload in uploads]
    pictures = np.zeros(0)
    stream = pipeline.stream(prompt, images, settings, every=-(-resolved.steps // PREVIEWS))
    while True:
        with studio.lock:
            progress = next(stream, None)
            if progress is None:
                break
            pictures = to_uint8(pipeline.decode(progress.tokens, settings))
        said = f"Step {progress.step} of {progress.steps}: {progress.stage}"
        yield View(list(pictures), plan(studio, settings, shown, progress.step), said)
    references = [
        Reference(upload.name, image.height, image.width) for upload, image in zip(uploads, images)
    ]
    used = bool(uploads) and pipeline.uses_references
    stages = stages_of_steps(pipeline.config, resolved, used)
    files, folder = [], Path(mkdtemp(dir=studio.folder))
    for i, picture in enumerate(pictures):
        files.append(folder / f"{file_stem(prompt)}-{resolved.seeds[i]}.png")
        text = text_of(prompt, references, studio.checkpoint, pipeline.step, resolved, i, stages)
        save_png(files[-1], picture, text)
    count = "1 picture" if len(files) == 1 else f"{len(files)} pictures"
    said = f"{count} in {time.perf_counter() - started:.1f} s"
    yield View(files, plan(studio, settings, shown, resolved.steps), said, finished=True)


def file_stem(prompt: str) -> str:
    """The prompt's first words as a file name."""
    return "-".join(re.findall(r"[a-z0-9]+", prompt.lower())[:6])[:60] or "picture"


def restore(studio: AppState, picture: Embedded) -> tuple[dict[str, int | float], list[str]]:
    """The values that the page takes over from a picture, and what it could not, a sentence
    each."""
    values, notes = {}, []
    for name, (low, high, _) in studio.ranges.items():
        value = getattr(picture.settings, name)
        value = picture.settings.seeds[0] if name == "seed" else value
        if isinstance(value, tuple):
            notes.append(f"{name} is one number a stage there, {value}; this page has one for all.")
        elif low <= value <= high:
            values[name] = value
        else:
            notes.append(f"{name} {value:g} is left out: this page goes from {low:g} to {high:g}.")
    if picture.settings.solver_config != DEFAULT_SOLVER:
        notes.append(
            f"It was drawn with cheaper steps ({picture.settings.solver_config}); "
            "this page evaluates every step."
        )
    if picture.settings.int8:
        notes.append("It was drawn with weights in 8 bits; this page has the checkpoint's own.")
    if picture.references:
        names = ", ".join(f"{Path(r.path).name} ({r.height}x{r.width})" for r in picture.references)
        notes.append(f"References are not inside a picture; add them again: {names}.")
    made_with, here = (
        name if step is None else f"{name} at step {step}"
        for name, step in (
            (picture.checkpoint, picture.checkpoint_step),
            (studio.checkpoint, studio.pipeline.step),
        )
    )  # fmt: skip
    if made_with != here:
        notes.append(f"It was drawn with the checkpoint {made_with}; this page has {here}.")
    return values, notes


def settings_of(values: dict[str, int | float | None]) -> Settings:
    """Settings from what the sliders say. Raises InputError for an emptied one."""
    given: dict[str, int | float] = {}
    for name, value in values.items():
        if value is None:
            raise InputError(f"{name} is empty; give a number")
        given[name] = value if name in ("tau1", "tau2", "cfg_scale") else int(value)
    return Settings(**given)  # pyright: ignore[reportArgumentType]


def carried(studio: AppState, height: int, width: int) -> tuple[float, float]:
    """The checkpoint's τ1 and τ2 at a size: where it says so, they move with it
    (`sampling.tau_tokens`)."""
    resolved = studio.pipeline.resolved(Settings(height, width))
    return resolved.tau1, resolved.tau2
