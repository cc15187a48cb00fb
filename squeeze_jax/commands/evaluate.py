"""`evaluate`: draws a suite's pictures with a checkpoint, and scores them."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from etils import epath

from squeeze_jax.commands.parallel import Parallel
from squeeze_jax.commands.run import check_finite, guarded, parse_shard, setup

if TYPE_CHECKING:
    from squeeze_jax.evaluation.suites import Prompts
    from squeeze_jax.sampling.pipeline import Pipeline, Settings


@dataclass(frozen=True)
class Evaluate:
    """Draws a suite's pictures with a checkpoint and scores them; started again, it goes on.

    docs/evaluation.md says what each suite does, and every choice that a score depends on.
    """

    file: Annotated[Path | None, tyro.conf.Positional] = None
    """Prompts as JSON in UNO's schema (prompts, sensitivity); for dreambench instead of the
    published ones."""
    suite: Literal["critters", "emoji", "dreambench", "prompts", "sensitivity"] = "critters"
    """critters, emoji: the miniatures' held-out data, by retrieval among redrawn candidates (no
    learned judge); dreambench: DINO-I, CLIP-I, CLIP-T; prompts: a request file for a judge model;
    sensitivity: a grid of tau1, tau2, guidance and steps."""
    checkpoint: epath.Path | None = None
    """Work folder (also gs://bucket/…), weights or exported folder; none: the shipped miniature."""
    out: Path | None = None
    """critters, emoji: JSON report to write (scores.json); others: folder (evaluation/SUITE)."""
    pairs: int = 512
    """critters, emoji: held-out pairs."""
    dreambench: Path | None = None
    """DreamBench as published: a folder with dataset/SUBJECT/00.jpg … and its prompts."""
    images: int | None = None
    """Pictures a prompt; default: 4 for dreambench, else 1."""
    dino: Path | None = None
    """Folder of facebook/dino-vits16. With --clip: scores as soon as all pictures are there."""
    clip: Path | None = None
    """Folder of openai/clip-vit-base-patch32."""
    shard: str = "0/1"
    """i/n: this process draws every n-th batch from i; not for sensitivity."""
    list_only: bool = False
    """Write the list of pictures and stop: another system draws them (dreambench, prompts)."""
    size: str | None = None
    """512 or 512x768 (height × width); default: the checkpoint's."""
    steps: tuple[int, ...] = ()
    """Euler steps; of sensitivity, one or several, as the next three."""
    tau1: tuple[float, ...] = ()
    tau2: tuple[float, ...] = ()
    cfg_scale: tuple[float, ...] = ()
    """Default of all four: the checkpoint's own; tau1 and tau2 of sensitivity: 0 and the own."""
    seed: int = 0
    """Each picture has its own of this, its prompt and its number."""
    at_once: int = 16
    """Pictures drawn together."""
    merge_lora: bool = True
    """Add a LoRA to the base at loading, rounded once: less memory and work."""
    parallel: Parallel = field(default_factory=Parallel)


DRAWN_UNUSED = (
    "dreambench", "images", "dino", "clip", "shard", "list_only", "size", "steps", "tau1",
    "tau2", "cfg_scale", "seed", "at_once",
)  # fmt: skip
UNUSED = {
    "critters": DRAWN_UNUSED,
    "emoji": DRAWN_UNUSED,
    "dreambench": ("pairs",),
    "prompts": ("pairs",),
    "sensitivity": ("pairs", "shard", "list_only"),
}  # fmt: skip
"""Flags that a suite does not look at: given, they are refused."""


def main(arguments: list[str] | None = None) -> int:
    given = tyro.cli(
        Evaluate, args=sys.argv[1:] if arguments is None else arguments, prog="squeeze_jax evaluate"
    )
    return guarded(lambda: run(given))


def run(given: Evaluate) -> None:
    setup()
    check_finite(given)
    check_used(given)
    suites = {"critters": run_drawn, "emoji": run_drawn, "sensitivity": run_sensitivity}
    suites.get(given.suite, run_pictures)(given)


def check_used(given: Evaluate) -> None:
    """Raises InputError for a flag that the suite would pass over without a word."""
    from squeeze_jax.errors import InputError

    others = Evaluate()
    for name in UNUSED[given.suite]:
        if getattr(given, name) != getattr(others, name):
            raise InputError(
                f"--{name.replace('_', '-')}: --suite {given.suite} has no use for it; leave it "
                "out, or name another --suite"
            )


def run_drawn(given: Evaluate) -> None:
    """Suites critters and emoji."""
    from squeeze_jax.errors import InputError
    from squeeze_jax.evaluation.grids import CHUNK
    from squeeze_jax.folder_lock import hold
    from squeeze_jax.interop.tensors import check_writable
    from squeeze_jax.miniature.emoji.evaluation import score_emoji
    from squeeze_jax.miniature.evaluation import score_critters

    suite = given.suite
    if given.file is not None:
        raise InputError(f"{given.file}: --suite {suite} takes no prompts; say which suite does")
    out = given.out or Path("scores.json")
    check_writable(out, "--out")
    pipeline = load(given, min(given.pairs, CHUNK))
    data = getattr(pipeline.config.data, suite)
    if data is None:
        raise InputError(
            f"this checkpoint was not trained on {suite}: --suite {suite} cannot score it; give "
            "another --checkpoint"
        )
    if not 1 <= given.pairs <= data.held_out:
        raise InputError(
            f"--pairs {given.pairs} must be from 1 to {data.held_out}, the held-out pairs of this "
            "checkpoint's data"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    score = {"critters": score_critters, "emoji": score_emoji}[suite]
    with hold(out.with_name(out.name + ".lock"), f"an evaluation into {out.name}"):
        score(pipeline, out, given.pairs, checkpoint=str(given.checkpoint or "demo"))


def run_pictures(given: Evaluate) -> None:
    """Suites dreambench and prompts."""
    from squeeze_jax.evaluation.judged import check_no_other_scores, write_requests
    from squeeze_jax.evaluation.picture_set import MANIFEST, begin_picture_set
    from squeeze_jax.evaluation.suites import (
        Work,
        draw_set,
        load_judges,
        plan_set,
        score_set,
        show_set,
    )

    out, prompts = open_suite(given)
    judges = load_judges(given.dino, given.clip)
    if judges is not None:
        check_no_other_scores(out, judged=False)  # before anything is drawn
    images = given.images or (4 if given.suite == "dreambench" else 1)
    settings, name = settings_of(given), str(given.checkpoint or "demo")
    work = Work(parse_shard(given.shard), given.at_once)
    pipeline = None if given.list_only else load(given, given.at_once)
    pictures = plan_set(pipeline, given.suite, prompts, images, name, settings, given.at_once)
    if pipeline is None:
        begin_picture_set(out, pictures)
        print(f"list of pictures to draw: {out / MANIFEST}")
        return
    if not draw_set(pipeline, pictures, out, settings, work):
        return
    if given.suite == "prompts":
        print(f"requests for a judge: {write_requests(out, pictures)}")
    if judges is not None:
        score_set(out, pictures, judges, out)
        return
    show_set(out, pictures)
    if given.suite == "dreambench":
        print(f"to score them: python -m squeeze_jax score {out} --dino DIR --clip DIR")


def run_sensitivity(given: Evaluate) -> None:
    from squeeze_jax.evaluation.sensitivity import grid, run_grid
    from squeeze_jax.evaluation.suites import load_judges

    out, prompts = open_suite(given)
    judges = load_judges(given.dino, given.clip)
    pipeline = load(given, given.at_once)
    settings = grid(
        settings_of(given, single=False), pipeline.config,
        given.tau1, given.tau2, given.cfg_scale, given.steps,
    )  # fmt: skip
    run_grid(
        pipeline, settings, prompts, out, str(given.checkpoint or "demo"), given.images or 1,
        given.at_once, judges,
    )  # fmt: skip


def open_suite(given: Evaluate) -> "tuple[Path, Prompts]":
    """The folder to write into, and what to draw: all that can be wrong before weights are read."""
    from squeeze_jax.errors import InputError
    from squeeze_jax.evaluation.suites import open_prompts
    from squeeze_jax.interop.tensors import check_writable

    out = given.out or Path("evaluation") / given.suite
    if out.is_file():
        raise InputError(f"--out {out} is a file; give a folder")
    check_writable(out / "report.html", "--out")
    if given.suite == "dreambench" and given.dreambench is None:
        raise InputError("--suite dreambench needs --dreambench DIR, the folder of its pictures")
    for flag, value in (("--at-once", given.at_once), ("--images", given.images)):
        if value is not None and value < 1:
            raise InputError(f"{flag} {value} must be at least 1")
    return out, open_prompts(given.file, given.dreambench)


def load(given: Evaluate, images: int) -> "Pipeline":
    from squeeze_jax.interop.load import checkpoint_folder
    from squeeze_jax.sampling.pipeline import Pipeline

    mesh = given.parallel.mesh(checkpoint_folder(given.checkpoint), images)
    return Pipeline.load(given.checkpoint, mesh, merge_lora=given.merge_lora)


def settings_of(given: Evaluate, single: bool = True) -> "Settings":
    """Size and seed; with `single`, also the one value of each flag that a grid has several of."""
    from squeeze_jax.data.images import parse_size
    from squeeze_jax.errors import InputError
    from squeeze_jax.sampling.settings import Settings

    height, width = parse_size(given.size) if given.size else (None, None)
    if not single:
        return Settings(height, width, seed=given.seed)
    values = {}
    for name in ("steps", "tau1", "tau2", "cfg_scale"):
        several = getattr(given, name)
        if len(several) > 1:
            raise InputError(
                f"--{name.replace('_', '-')} has {len(several)} values; several are for --suite "
                "sensitivity"
            )
        values[name] = several[0] if several else None
    return Settings(height, width, **values, seed=given.seed)
