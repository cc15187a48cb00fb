"""`train`: a preset, its overrides, a work folder; extracts what is not there yet, trains, samples, scores."""

import dataclasses
import sys
import time
from pathlib import Path

from squeeze_jax.commands.run import guarded, setup

USAGE = """usage: python train.py PRESET [--path.to.field VALUE …] [--workdir DIR] [--from DIR]

Trains, or resumes if DIR has a checkpoint. PRESET is a file of configs/; any field of it can be overridden
(`python train.py PRESET --help` lists all, with their meaning and default).

  --workdir DIR   where checkpoints, metrics and pictures go (default: runs/<name of the preset>)
  --from DIR      begin with the trained weights of another run's folder, as stage 2 does with stage 1's; or with an
                  exported folder, a LoRA file, or a FLUX.1 transformer (under a config with a LoRA it becomes the base)
  --accept-changes   continue a run though the preset differs from the one that it was saved with

Several processes (docs/pods.md) run the same command, each with

  --distributed   on Cloud TPU, under Slurm or MPI, where the environment says who the others are; or
  --coordinator HOST:PORT --num-processes N --process-id I
"""


def main(arguments: list[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    return guarded(lambda: run(arguments))


def take(arguments: list[str], flag: str) -> str | None:
    """Removes `flag VALUE` (or `flag=VALUE`) from the arguments and returns the value."""
    from squeeze_jax.errors import InputError

    for place, argument in enumerate(arguments):
        if argument.startswith(f"{flag}="):
            return arguments.pop(place).split("=", 1)[1]
        if argument == flag:
            if place + 1 == len(arguments):
                raise InputError(f"{flag} needs a value")
            arguments.pop(place)
            return arguments.pop(place)
    return None


def take_switch(arguments: list[str], flag: str) -> bool:
    """Removes a flag without a value and returns whether it was there."""
    there = flag in arguments
    arguments[:] = [argument for argument in arguments if argument != flag]
    return there


def take_number(arguments: list[str], flag: str) -> int | None:
    """`take`, as a whole number."""
    from squeeze_jax.errors import InputError

    value = take(arguments, flag)
    try:
        return None if value is None else int(value)
    except ValueError:
        raise InputError(f"{flag} {value!r} must be a whole number") from None


def run(arguments: list[str]) -> None:
    setup()
    import jax

    from squeeze_jax.processes import barrier, init_distributed, is_main

    others = (
        take(arguments, "--coordinator"),
        take_number(arguments, "--num-processes"),
        take_number(arguments, "--process-id"),
    )
    if take_switch(arguments, "--distributed") or any(part is not None for part in others):
        init_distributed(*others)
    from squeeze_jax.checkpoints.manager import write_config
    from squeeze_jax.checkpoints.trained import start_of
    from squeeze_jax.config import load_preset, override
    from squeeze_jax.data.extraction import extract_features
    from squeeze_jax.data.sources import open_examples
    from squeeze_jax.data.storage import reachable
    from squeeze_jax.errors import InputError
    from squeeze_jax.evaluation.grids import grid_sampler
    from squeeze_jax.planning.work import step_work
    from squeeze_jax.training.loop import train

    say = print if is_main() else lambda text: None
    started = time.perf_counter()
    workdir, start_from = take(arguments, "--workdir"), take(arguments, "--from")
    accept_changes = take_switch(arguments, "--accept-changes")
    preset = load_preset(arguments[0])
    config = override(preset, arguments[1:], f"train.py {arguments[0]}")
    if workdir and "://" in workdir:
        raise InputError(
            f"--workdir {workdir}: a work folder lies on a disk that all processes see; mount the bucket (docs/pods.md "
            "says which will do) and give its path. Records may lie in a bucket as they are (--data.features)"
        )
    if start_from is not None and start_of(Path(start_from)) == "transformer" and config.lora is not None:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, dit_weights=start_from))
        say(f"the base under the LoRA: {start_from}")
        start_from = None
    folder = Path(workdir) if workdir else Path("runs") / Path(arguments[0]).stem
    folder.mkdir(parents=True, exist_ok=True)

    features = reachable(config.data.features or folder / "features")  # may lie in a bucket
    if config.data.features is None and not config.data.online:
        extract_features(config, features, shard=(jax.process_index(), jax.process_count()))
        barrier("records extracted")
    if not config.data.online:
        say(f"records: {features}; {time.perf_counter() - started:.0f} s")
    result = train(
        config,
        folder,
        features,
        start_from=Path(start_from) if start_from else None,
        accept_changes=accept_changes,
        sample=grid_sampler(config, folder, features),
        work=lambda stage, batch: step_work(config, stage, batch),
        examples=open_examples(config) if config.data.online else None,
        say=say,
    )
    write_config(folder, config)
    say(f"trained {result.step} steps, validation loss {result.validation:.4f}; {time.perf_counter() - started:.0f} s")
    if config.data.critters is not None and config.log.score:
        from squeeze_jax.miniature.evaluation import score_run

        score_run(config, result, folder, config.log.score)
    say(f"checkpoints: {folder / 'checkpoints'}   metrics: {folder / 'metrics.jsonl'}   pictures: {folder / 'samples'}")
    say(f"sample from it: python sample.py --checkpoint {folder} --prompt '…' --reference PICTURE --out out.png")
    say(f"done in {time.perf_counter() - started:.0f} s")
