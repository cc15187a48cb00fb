"""The suites that draw pictures: from flags to files, as far as they share it."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from squeeze_jax.errors import InputError
from squeeze_jax.evaluation.dreambench import dreambench_prompts, open_dataset
from squeeze_jax.evaluation.generate import AT_ONCE, describe_system, generate
from squeeze_jax.evaluation.judged import check_no_other_scores
from squeeze_jax.evaluation.judges import Judge, load_clip, load_dino
from squeeze_jax.evaluation.picture_set import (
    PictureSet,
    Prompt,
    begin_picture_set,
    check_references,
    read_prompts,
)
from squeeze_jax.evaluation.report import (
    print_report,
    require_matplotlib,
    write_page,
    write_report,
)
from squeeze_jax.evaluation.score_pictures import score_pictures, to_json
from squeeze_jax.evaluation.score_report import make_report, report_pictures
from squeeze_jax.folder_lock import hold
from squeeze_jax.sampling.pipeline import Pipeline, Settings

FEATURES = "features"
"""Folder of a report that keeps the judges' features."""


class Prompts(NamedTuple):
    """What a suite draws."""

    folder: Path
    """Where paths of references begin."""
    rows: tuple[Prompt, ...]


class Work(NamedTuple):
    """How much of it this process does."""

    shard: tuple[int, int] = (0, 1)
    """i of n parts of the prompts."""
    at_once: int = AT_ONCE
    """Images that are drawn together."""


def open_prompts(file: Path | None, dreambench: Path | None) -> Prompts:
    """DreamBench's prompts (`file` may hold them), or those of a JSON file in UNO's schema. Raises
    InputError where neither is given."""
    if dreambench is not None:
        dataset = open_dataset(dreambench).absolute()
        return Prompts(dataset, dreambench_prompts(dataset, file))
    if file is None:
        raise InputError("no prompts: give a JSON file in UNO's schema, or --dreambench DIR")
    return Prompts(file.parent.absolute(), read_prompts(file))


def plan_set(
    pipeline: Pipeline | None,
    suite: str,
    prompts: Prompts,
    images: int,
    checkpoint: str,
    settings: Settings,
    at_once: int = AT_ONCE,
) -> PictureSet:
    """What is to be drawn; without a pipeline, by another system, which is to be named there."""
    system = {"name": "say here what drew the pictures, with which settings and seeds"}
    if pipeline is not None:
        system = describe_system(pipeline, checkpoint, settings, at_once)
    return PictureSet(suite, prompts.folder, images, system, prompts.rows)


def draw_set(
    pipeline: Pipeline, pictures: PictureSet, out: Path, settings: Settings, work: Work
) -> bool:
    """Draws what is missing of this process's share; whether all shards are complete now."""
    check_references(pictures)
    begin_picture_set(out, pictures)
    for sentence in _warnings(pipeline, pictures, settings):
        print(f"warning: {sentence}")
    index, count = work.shard
    with hold(out / f".draw-{index}-of-{count}.lock", "an evaluation of this shard"):
        generate(pipeline, pictures, out, settings, work.shard, work.at_once)
    absent = pictures.missing(out)
    if absent:
        print(f"pictures: {out}, {len(absent)} are left to the other shards")
    else:
        print(f"pictures: {out}")
    return not absent


def _warnings(pipeline: Pipeline, pictures: PictureSet, settings: Settings) -> Sequence[str]:
    shown = any(prompt.references for prompt in pictures.prompts)
    said = pipeline.resolved(settings).empty_stages(
        pipeline.config, shown and pipeline.uses_references
    )
    if shown and not pipeline.uses_references:
        said = [*said, "this checkpoint was trained on the MLLM alone: it stays on throughout"]
    return said


def load_judges(dino: Path | None, clip: Path | None) -> tuple[Judge, Judge] | None:
    """Both judges, or None where neither folder is given. Raises InputError for one alone."""
    if dino is None and clip is None:
        return None
    if dino is None or clip is None:
        raise InputError("--dino and --clip belong together; give both folders")
    require_matplotlib()
    return load_dino(dino), load_clip(clip)


def show_set(folder: Path, pictures: PictureSet) -> None:
    """Writes a page of pictures that have no scores yet, unless there is a report of scores."""
    if not (folder / "scores.json").exists():
        write_page(folder, report_pictures(pictures, folder))
        print(f"report: {folder / 'report.html'}")


def score_set(folder: Path, pictures: PictureSet, judges: tuple[Judge, Judge], out: Path) -> None:
    """Scores a folder's pictures and writes report.html and scores.json into `out`. Raises
    InputError where a judge model's scores are there."""
    check_no_other_scores(out, judged=False)
    out.mkdir(parents=True, exist_ok=True)
    with hold(out / ".score.lock", "a scoring into this folder"):
        results = score_pictures(folder, pictures, *judges, cache=out / FEATURES)
        report = make_report(results)
        print_report(report)
        write_report(out, report, to_json(results, folder))
    print(f"report: {out / 'report.html'}")
