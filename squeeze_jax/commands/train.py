"""`train`: a preset, its overrides, a work folder; extracts what is not there yet, trains, samples, scores."""

import sys
import time
from pathlib import Path

from squeeze_jax.commands.run import guarded, setup

USAGE = """usage: python train.py PRESET [--path.to.field VALUE …] [--workdir DIR] [--from DIR]

Trains, or resumes if DIR has a checkpoint. PRESET is a file of configs/; any field of it can be overridden
(`python train.py PRESET --help` lists all, with their meaning and default).

  --workdir DIR   where checkpoints, metrics and pictures go (default: runs/<name of the preset>)
  --from DIR      begin with the trained weights of another run's folder, as stage 2 does with stage 1's
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


def run(arguments: list[str]) -> None:
    setup()
    from squeeze_jax.commands.features import extract_features
    from squeeze_jax.commands.grids import critter_scores, grid_sampler
    from squeeze_jax.config import load_preset, override
    from squeeze_jax.interop.checkpoint import write_config
    from squeeze_jax.training.loop import train

    started = time.perf_counter()
    workdir, start_from = take(arguments, "--workdir"), take(arguments, "--from")
    preset = load_preset(arguments[0])
    config = override(preset, arguments[1:], f"train.py {arguments[0]}")
    folder = Path(workdir) if workdir else Path("runs") / Path(arguments[0]).stem
    folder.mkdir(parents=True, exist_ok=True)

    features = Path(config.data.features) if config.data.features else folder / "features"
    if config.data.features is None:
        extract_features(config, features)
    print(f"records: {features}; {time.perf_counter() - started:.0f} s")
    sampler = grid_sampler(config, folder, features)
    result = train(
        config, folder, features, start_from=Path(start_from) if start_from else None, sample=sampler
    )
    write_config(folder, config)
    print(f"trained {result.step} steps, validation loss {result.validation:.4f}; {time.perf_counter() - started:.0f} s")
    if config.data.critters is not None and config.log.score:
        critter_scores(config, result, folder, config.log.score)
    print(f"checkpoints: {folder / 'checkpoints'}   metrics: {folder / 'metrics.jsonl'}   pictures: {folder / 'samples'}")
    print(f"sample from it: python sample.py --checkpoint {folder} --prompt '…' --reference PICTURE --out out.png")
    print(f"done in {time.perf_counter() - started:.0f} s")
