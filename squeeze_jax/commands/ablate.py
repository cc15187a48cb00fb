"""`ablate`: trains, draws and tabulates a folder of presets with several seeds."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from squeeze_jax.commands.run import guarded, setup


@dataclass(frozen=True)
class Ablate:
    """Trains every preset of a folder with every seed, draws with each, and tabulates all.

    Started again, it goes on where it was killed; finished rows are not done twice. Presets that
    differ only in sampling share a training. Any field can be overridden for all presets, as in
    train (`--data.features FEATURES`).
    """

    presets: Annotated[Path, tyro.conf.Positional]
    """Folder of presets (configs/ablations), or one preset."""
    workdir: Path
    """Folder for all runs and the report."""
    seeds: str = "0"
    """Seeds of each preset, with commas: 0,1,2."""
    trained: tuple[Path, ...] = ()
    """Finished runs: presets of the same training and seed take their weights. Those of
    configs/ablations that differ in sampling alone are stage 2's, which begins with stage 1: give
    runs/stage2, else they train stage 2 from nothing."""
    prompts: Path | None = None
    """Prompts to draw with each, as JSON in UNO's schema; none: a grid of held-out examples."""
    dreambench: Path | None = None
    """DreamBench's folder, to draw its prompts with each."""
    images: int = 1
    """Pictures a prompt."""
    dino: Path | None = None
    """Folder of facebook/dino-vits16; with --clip the pictures of prompts are scored."""
    clip: Path | None = None
    """Folder of openai/clip-vit-base-patch32."""


def main(arguments: list[str] | None = None) -> int:
    given, overrides = tyro.cli(
        Ablate,
        args=sys.argv[1:] if arguments is None else arguments,
        prog="squeeze_jax ablate",
        return_unknown_args=True,
    )
    return guarded(lambda: run(given, overrides))


def run(given: Ablate, overrides: list[str]) -> None:
    setup()
    from squeeze_jax.commands import train
    from squeeze_jax.data.extraction import extract_features
    from squeeze_jax.errors import InputError
    from squeeze_jax.evaluation.ablation import Drawing, ablation_report, plan_rows, run_rows
    from squeeze_jax.evaluation.report import print_report, require_matplotlib, write_report
    from squeeze_jax.evaluation.suites import load_judges, open_prompts
    from squeeze_jax.interop.tensors import check_writable
    from squeeze_jax.miniature.evaluation import score_critters
    from squeeze_jax.preset_files import find_presets

    require_matplotlib()
    check_writable(given.workdir / "report.html", "--workdir")
    try:
        seeds = [int(seed) for seed in given.seeds.split(",")]
    except ValueError:
        raise InputError(f"--seeds {given.seeds!r} must be numbers with commas: 0,1,2") from None
    presets = find_presets(given.presets)
    rows = plan_rows(presets, seeds, given.workdir, overrides, given.trained)
    for folder in given.trained:
        if all(row.trained != folder for row in rows):
            print(f"warning: --trained {folder}: not used, no preset trains so with these seeds")
    judges, drawing = load_judges(given.dino, given.clip), Drawing()
    if given.prompts is not None or given.dreambench is not None:
        suite = "prompts" if given.dreambench is None else "dreambench"
        prompts = open_prompts(given.prompts, given.dreambench)
        drawing = Drawing(suite, prompts, given.images, judges)
    data = rows[0].config.data
    if not (data.features or data.mix or data.online):
        features = given.workdir / "features"
        extract_features(rows[0].config, features)
        overrides = [*overrides, "--data.features", str(features)]
        rows = plan_rows(presets, seeds, given.workdir, overrides, given.trained)
    scorers = {
        "critters": lambda pipeline, out: score_critters(
            pipeline, out, pipeline.config.log.score, ("demo",), str(out.parent)
        )
    }
    title = f"Ablation: {given.presets}"
    finished = []
    for row in run_rows(
        rows,
        drawing,
        lambda row: train.run(
            train.Train(row.preset, str(row.folder)), [*row.overrides, "--log.score", "0"]
        ),
        scorers,
    ):
        finished.append(row)
        write_report(given.workdir, *ablation_report(finished, title))
    print_report(ablation_report(finished, title)[0])
    print(f"report: {given.workdir / 'report.html'}")
