"""`train`: a preset, its overrides, a work folder; extracts what is not there yet, trains, samples,
scores."""

import dataclasses
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from squeeze_jax.commands.run import guarded, setup

Flag = tyro.conf.FlagCreatePairsOff[bool]


@dataclass(frozen=True)
class Train:
    """Trains a preset, or resumes it if its work folder has a checkpoint.

    Any field of the preset can be overridden (`--optimizer.learning-rate 3e-4`); `python train.py
    PRESET --help` lists all of them, with their meaning and default.

    Several processes (docs/pods.md) run the same command, each with `--distributed`, or with
    `--coordinator`, `--num-processes` and `--process-id`.
    """

    preset: Annotated[Path, tyro.conf.Positional]
    """A file of configs/, or the name of one (`demo`, `klein_stage2`); `train --list` lists
    them."""
    workdir: str | None = None
    """Where checkpoints, metrics and pictures go, also gs://bucket/…; none: runs/<name of the
    preset>."""
    start_from: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """Begin with the trained weights of another run's folder, as stage 2 does with stage 1's; or
    with an exported folder, a LoRA file, or a FLUX.1 or FLUX.2 transformer (under a config with a
    LoRA it becomes the base). A run's folder may be gs://bucket/…"""
    accept_changes: Flag = False
    """Continue a run though the preset differs from the one that it was saved with; or begin with
    weights (`--from`) whose preset asked for another input of the MLLM or another guidance."""
    distributed: Flag = False
    """Find the other processes by the environment: Cloud TPU, Slurm, MPI."""
    coordinator: str | None = None
    """HOST:PORT of process 0."""
    num_processes: int | None = None
    process_id: int | None = None


def main(arguments: list[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments == ["--list"]:
        return guarded(print_presets)
    # Without a preset, help is about the flags here; behind one, it is the preset's own.
    about_preset = bool(arguments) and not arguments[0].startswith("-")
    given, overrides = tyro.cli(
        Train, args=arguments, prog="train.py", return_unknown_args=True, add_help=not about_preset
    )
    return guarded(lambda: run(given, overrides))


def print_presets() -> None:
    from squeeze_jax.preset_files import list_presets

    presets = list_presets()
    width = max(map(len, presets)) + 2
    print("\n".join(f"{name:{width}}{about}" for name, about in presets.items()))


def run(given: Train, overrides: list[str]) -> None:
    setup()
    from squeeze_jax.processes import ending_together, init_distributed

    others = given.coordinator, given.num_processes, given.process_id
    if given.distributed or any(part is not None for part in others):
        init_distributed(*others)
    with ending_together():
        run_together(given, overrides)


def run_together(given: Train, overrides: list[str]) -> None:
    """The command on each process, once all have met."""
    import jax

    from squeeze_jax.checkpoints.build import check_base
    from squeeze_jax.checkpoints.trained import start_kind
    from squeeze_jax.config import load_preset, override
    from squeeze_jax.data.extraction import extract_features
    from squeeze_jax.data.sources import open_examples
    from squeeze_jax.errors import InputError
    from squeeze_jax.evaluation.grids import grid_sampler
    from squeeze_jax.folder_lock import hold_for_run
    from squeeze_jax.interop.formats import distilled_name
    from squeeze_jax.interop.load import checkpoint_folder
    from squeeze_jax.planning.work import step_work
    from squeeze_jax.processes import barrier, is_main
    from squeeze_jax.storage import as_path, is_remote, reachable
    from squeeze_jax.training.loop import train

    say = print if is_main() else lambda text: None
    started = time.perf_counter()
    config = override(load_preset(given.preset), overrides, f"train.py {given.preset}")
    for flag, place in (("--workdir", given.workdir), ("--from", given.start_from)):
        if place and is_remote(place) and not place.startswith("gs://"):
            raise InputError(
                f"{flag} {place}: Orbax reads and writes arrays on disks and in gs:// buckets; "
                "mount this one (docs/pods.md) and give its path"
            )
    folder = as_path(given.workdir or Path("runs") / given.preset.stem)
    start_from = checkpoint_folder(given.start_from) if given.start_from else None
    is_base = start_from is not None and start_kind(start_from) == "transformer"
    if is_base and config.lora is not None:
        config = dataclasses.replace(
            config, model=dataclasses.replace(config.model, dit_weights=str(start_from))
        )
        say(f"the base under the LoRA: {start_from}")
        start_from = None
    if name := distilled_name(config.model.dit_weights):
        say(
            f"warning: {name} is distilled to 4 steps and not made for training; "
            "take its base, FLUX.2-klein-base-4B or -9B"
        )
    check_base(config)
    folder.mkdir(parents=True, exist_ok=True)

    features = reachable(config.data.features or folder / "features")  # may lie in a bucket
    if not (config.data.features or config.data.mix or config.data.online):
        extract_features(config, features, shard=(jax.process_index(), jax.process_count()))
        barrier("records extracted")
    if not config.data.online:
        mixed = ", ".join(f"{name} (weight {weight:g})" for name, weight in config.data.mix)
        say(f"records: {mixed or features}; {time.perf_counter() - started:.0f} s")
    with hold_for_run(folder / "run.lock", "a run"):
        result = train(
            config,
            folder,
            features,
            start_from=start_from,
            accept_changes=given.accept_changes,
            sample=grid_sampler(config, folder, features),
            work=lambda stage, batch: step_work(config, stage, batch),
            examples=open_examples(config) if config.data.online else None,
            say=say,
        )
    say(
        f"trained {result.step} steps, validation loss {result.validation:.4f}; "
        f"{time.perf_counter() - started:.0f} s"
    )
    if config.data.critters is not None and config.log.score:
        from squeeze_jax.miniature.evaluation import score_run

        score_run(config, result, folder, config.log.score)
    say(
        f"checkpoints: {folder / 'checkpoints'}   metrics: {folder / 'metrics.jsonl'}   "
        f"pictures: {folder / 'samples'}"
    )
    say(
        f"sample from it: python sample.py --checkpoint {folder} --prompt '…' "
        "--reference PICTURE --out out.png"
    )
    say(f"done in {time.perf_counter() - started:.0f} s")
