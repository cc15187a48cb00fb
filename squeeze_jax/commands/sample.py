"""`sample`: a prompt and reference pictures to new pictures."""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from etils import epath

from squeeze_jax.commands.parallel import Parallel
from squeeze_jax.commands.run import guarded, setup
from squeeze_jax.sampling.solver_names import SolverName

AT_ONCE = 16
"""Images drawn together, as when a `Pipeline` is called."""


@dataclass(frozen=True)
class Sample:
    """Draws the references' subjects doing what the prompt says; settings are embedded in the PNG
    as text."""

    prompt: str
    """What the picture should show."""
    out: Path
    """PNG to write; with several images PATH-0.png, PATH-1.png, …"""
    reference: Annotated[list[Path], tyro.conf.UseAppendAction] = field(default_factory=list)
    """Picture of a subject; may be given several times. None: text only."""
    checkpoint: epath.Path | None = None
    """Work folder (also gs://bucket/…) or weights folder; none: the shipped miniature."""
    size: str | None = None
    """512 or 512x768 (height × width), multiples of 16 pixels; default: the checkpoint's."""
    steps: int | None = None
    """Euler steps (FLUX: 25)."""
    tau1: float | None = None
    """At t ≥ tau1 the MLLM's tokens alone (FLUX: 0.95). t = 1 is pure noise, where the first step
    begins; 1.1 with --tau2 0 keeps both conditions on throughout."""
    tau2: float | None = None
    """At t < tau2 the references' tokens alone (FLUX: 0.85); 0 is never, 1.1 throughout."""
    cfg_scale: tuple[float, ...] | None = None
    """Classifier-free guidance (FLUX: 2.5); 1 is off. Three numbers: one a stage."""
    seed: int = 0
    num_images: int = 1
    """Image i is what seed + i alone gives, to one grey level."""
    solver: SolverName = "euler"
    """multistep: second order, one evaluation a step."""
    cache_interval: int = 1
    """TaylorSeer: of so many steps in a row one is evaluated, the others are extrapolated; 1
    evaluates all."""
    max_order: int = 1
    """Order of TaylorSeer's expansion, 0 to 2."""
    first_block_threshold: float = 0.0
    """First-block cache: a step whose first block's work changed by at most this share leaves the
    others out; 0 is off."""
    int8: bool = False
    """Keep the transformer's blocks in 8 bits a weight (qwix): half of bfloat16's memory."""
    merge_lora: bool = True
    """Add the LoRA to the base at loading, rounded once: less memory and work. Off under --int8."""
    parallel: Parallel = field(default_factory=Parallel)


def main(arguments: list[str] | None = None) -> int:
    given = tyro.cli(
        Sample, args=sys.argv[1:] if arguments is None else arguments, prog="sample.py"
    )
    return guarded(lambda: run(given))


def run(given: Sample) -> None:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from squeeze_jax.data.images import load_image, parse_size, save_png, to_uint8
    from squeeze_jax.errors import InputError
    from squeeze_jax.interop.tensors import check_writable

    started = time.perf_counter()
    # Everything that the user may have got wrong is looked at before anything is loaded.
    if not given.prompt.strip():
        raise InputError("--prompt is empty; say what the picture should show")
    if given.num_images < 1:
        raise InputError(f"--num-images is {given.num_images}; it must be at least 1")
    if given.out.suffix.lower() != ".png":
        raise InputError(f"--out {given.out} must end in .png")
    check_writable(given.out, "--out")
    if given.tau1 is not None and given.tau2 is not None and given.tau2 > given.tau1:
        raise InputError(f"--tau2 {given.tau2} is larger than --tau1 {given.tau1}; it must not be")
    if given.cfg_scale is not None and len(given.cfg_scale) not in (1, 3):
        raise InputError(
            f"--cfg-scale has {len(given.cfg_scale)} numbers; give one, or three: one a stage"
        )
    height, width = parse_size(given.size) if given.size else (None, None)
    references = [load_image(path) for path in given.reference]

    setup()
    from squeeze_jax.app.strip import counts, stages_of_steps
    from squeeze_jax.checkpoints.manager import read_config
    from squeeze_jax.data.feature_extractor import FeatureExtractor
    from squeeze_jax.data.placement import data_parallel_size
    from squeeze_jax.interop.load import checkpoint_folder
    from squeeze_jax.sampling.batching import split_evenly
    from squeeze_jax.sampling.pipeline import Pipeline, Settings, encode_prompts
    from squeeze_jax.sampling.png_metadata import Reference, text_of
    from squeeze_jax.sampling.schedule import MAX_STEPS
    from squeeze_jax.sampling.solver_config import SolverConfig
    from squeeze_jax.sampling.training_range import beyond_training

    if given.steps is not None and not 1 <= given.steps <= MAX_STEPS:
        raise InputError(f"--steps is {given.steps}; it must be from 1 to {MAX_STEPS}")
    SolverConfig(
        given.solver, given.cache_interval, given.max_order, given.first_block_threshold
    )  # refuses what cannot be
    checkpoint = checkpoint_folder(given.checkpoint)
    mesh = given.parallel.mesh(checkpoint, min(given.num_images, AT_ONCE))
    # The MLLM reads and makes room before the transformer is loaded: never are both in memory.
    config = read_config(checkpoint)
    encoders = FeatureExtractor.of(config, mesh)
    encoded = encode_prompts(encoders, config, [given.prompt], [references])
    encoders.forget_reader()
    merge_lora = given.merge_lora and not given.int8
    pipeline = Pipeline.load(given.checkpoint, mesh, merge_lora=merge_lora, encoders=encoders)
    if given.int8:
        pipeline = pipeline.quantised()
    scale: Any = (
        given.cfg_scale[0] if given.cfg_scale and len(given.cfg_scale) == 1 else given.cfg_scale
    )
    settings = Settings(
        height, width, given.steps, given.tau1, given.tau2, scale, given.seed, given.num_images,
        given.solver, given.cache_interval, given.max_order, given.first_block_threshold,
    )  # fmt: skip
    resolved = pipeline.resolved(settings)
    used = references if pipeline.uses_references else []
    for number, (path, image) in enumerate(zip(given.reference, references), 1):
        print(f"reference {number}: {path} ({image.height}x{image.width})")
    if not used:
        why = "no reference" if not references else "this checkpoint was trained on the MLLM alone"
        print(f"{why}: the MLLM stays on throughout")
    stages = stages_of_steps(pipeline.config, resolved, bool(used))
    print("stages: " + ", ".join(f"{name} {plural(number)}" for name, number in counts(stages)))
    for sentence in (
        *resolved.empty_stages(pipeline.config, bool(used)),
        *beyond_training(pipeline.config, len(used), resolved.height, resolved.width),
    ):
        print(f"warning: {sentence}")
    kept = [
        Reference(str(path), image.height, image.width)
        for path, image in zip(given.reference, references)
    ]
    pieces = split_evenly(range(given.num_images), AT_ONCE, data_parallel_size(mesh))
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    ) as bar:
        task = bar.add_task("compiling", total=resolved.steps * len(pieces))
        ready = pipeline.ready(*encoded, settings)
        for number, piece in enumerate(pieces):
            tokens: Any = None
            for state in pipeline.stream_ready(ready, [resolved.seeds[i] for i in piece]):
                tokens = state.tokens.block_until_ready()
                bar.update(
                    task, completed=number * resolved.steps + state.step, description=state.stage
                )
            for i, picture in zip(
                dict.fromkeys(piece), to_uint8(pipeline.decode(tokens, settings))
            ):
                path = (
                    given.out
                    if given.num_images == 1
                    else given.out.with_name(f"{given.out.stem}-{i}.png")
                )
                made_by = str(given.checkpoint or "demo")
                text = text_of(given.prompt, kept, made_by, pipeline.step, resolved, i, stages)
                save_png(path, picture, text)
                bar.console.print(f"picture: {path}", markup=False, highlight=False, soft_wrap=True)
    print(f"done in {time.perf_counter() - started:.1f} s")


def plural(steps: int) -> str:
    """`1 step`, `2 steps`."""
    return f"{steps} step{'' if steps == 1 else 's'}"
