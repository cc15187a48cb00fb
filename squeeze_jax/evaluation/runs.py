"""What training runs left behind, side by side: loss curves, scores with intervals, pictures."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from squeeze_jax.checkpoints.manager import read_config
from squeeze_jax.config import Config
from squeeze_jax.config_json import differences
from squeeze_jax.data.images import load_image
from squeeze_jax.errors import InputError
from squeeze_jax.evaluation.picture_set import MANIFEST, PictureSet, read_picture_set
from squeeze_jax.evaluation.report import (
    Cell,
    Part,
    Picture,
    Plot,
    Report,
    Section,
    Table,
    draw_plot,
)
from squeeze_jax.evaluation.score_report import show, thumbnail
from squeeze_jax.evaluation.similarity import Estimate
from squeeze_jax.interop.tensors import read_json
from squeeze_jax.training.metrics import FILE

if TYPE_CHECKING:
    from matplotlib.axes import Axes  # pyright: ignore[reportMissingImports]

SHOWN = 8
"""Prompts of a picture set that are shown."""
POINTS = 400
"""Points of a loss curve: each is the mean of the rows that it stands for."""
FEW = 20
"""Points of a curve that are marked each."""
GRID_WIDTH = 900
"""Most pixels across a grid of samples."""


class Curve(NamedTuple):
    """A figure over steps: `values` at `steps`."""

    steps: list[int]
    values: list[float]


class Run(NamedTuple):
    """A run's folder, read."""

    name: str
    folder: Path
    config: Config
    loss: Curve
    validation: Curve
    scores: dict[str, Estimate]
    """Of all its scores.json, by what they measure."""
    samples: Path | None
    """The latest grid of samples."""
    sets: dict[str, tuple[Path, PictureSet]]
    """By suite: pictures that `evaluate` has drawn below the folder."""


def read_run(folder: Path, name: str | None = None, config: Config | None = None) -> Run:
    """Reads a work folder: metrics.jsonl, samples/, scores.json and evaluation/SUITE below it.

    config: of a folder that was only drawn into. Raises InputError where it is no work folder.
    """
    config = config or read_config(folder)
    rows = list(_metrics(folder / FILE))
    grids = sorted((folder / "samples").glob("*.png"))
    scores, sets = read_scores(folder / "scores.json"), {}
    for place in sorted(path.parent for path in folder.glob(f"evaluation/*/{MANIFEST}")):
        found = read_picture_set(place)
        sets[found.suite] = (place, found)
        # Scores of other prompts than DreamBench's are others, though they are called alike.
        of_suite = "" if found.suite == "dreambench" else f"{found.suite}: "
        own = read_scores(place / "scores.json")
        scores |= {f"{of_suite}{name}": value for name, value in own.items()}
    return Run(
        name or config.name,
        folder,
        config,
        _curve(rows, "loss"),
        _curve(rows, "validation_loss"),
        scores,
        grids[-1] if grids else None,
        sets,
    )


def _metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl; a line that a kill cut short is passed over."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _curve(rows: Sequence[Mapping[str, Any]], name: str) -> Curve:
    there = [(row["step"], row[name]) for row in rows if name in row]
    return Curve([step for step, _ in there], [value for _, value in there])


def read_scores(path: Path) -> dict[str, Estimate]:
    """What a scores.json of `evaluate`, `score` or a run of critters says; {} without one."""
    if not path.is_file():
        return {}
    found: dict[str, Estimate] = {}
    content = read_json(path)
    scores = content.get("scores", {})
    if not isinstance(scores, dict):
        return {}
    if "judged" in content:  # by what a judge model calls them
        return {name: _estimate(value) for name, value in scores.items()}
    for name, value in scores.get("overall", {}).items():  # DINO-I, CLIP-I, CLIP-T
        found[name] = _estimate(value)
    for label, score in scores.items():  # retrieval of critters, by how they were sampled
        for task, value in (score.get("tasks", {}) if isinstance(score, dict) else {}).items():
            if label.startswith("staged"):
                found[task] = _estimate(value)
    return found


def _estimate(value: Mapping[str, Any]) -> Estimate:
    return Estimate(value["value"], value.get("low"), value.get("high"))


def name_runs(folders: Sequence[Path]) -> dict[str, Path]:
    """A name for each folder: the shortest ends of their paths that tell them apart. Raises
    InputError where a folder is given twice."""
    absolute = [folder.absolute() for folder in folders]
    if len(set(absolute)) != len(absolute):
        raise InputError("a run is named twice; give each folder once")
    for length in range(1, max(len(path.parts) for path in absolute) + 1):
        names = ["/".join(path.parts[-length:]) for path in absolute]
        if len(set(names)) == len(names):
            return dict(zip(names, folders))
    raise AssertionError("different paths have different names")


def compare_report(runs: Sequence[Run], title: str) -> tuple[Report, dict[str, Any]]:
    """The page, and what scores.json holds."""
    sections = [
        Section("Scores", [scores_table(runs)]),
        Section("Loss", _loss_parts(runs)),
        Section("Settings that differ", [_settings(runs)]),
        Section("Pictures", [*_grids(runs), *_picture_sets(runs)]),
    ]
    return Report(title, sections), {"runs": {run.name: run_values(run) for run in runs}}


def run_values(run: Run) -> dict[str, Any]:
    """A run's figures as JSON."""
    return {
        "folder": str(run.folder),
        "step": max([0, *run.loss.steps, *run.validation.steps]),
        "loss": run.loss.values[-1] if run.loss.values else None,
        "validation_loss": run.validation.values[-1] if run.validation.values else None,
        "scores": {name: one._asdict() for name, one in run.scores.items()},
    }


def scores_table(runs: Sequence[Run]) -> Table:
    """A row a run: steps, validation loss, and every score that one of them has."""
    measured = list(dict.fromkeys(name for run in runs for name in run.scores))
    rows: list[list[Cell]] = []
    for run in runs:
        values = run_values(run)
        scores = [show(run.scores.get(name)) for name in measured]
        rows.append([run.name, values["step"], values["validation_loss"], *scores])
    return Table(
        ["run", "steps", "validation loss", *measured],
        rows,
        "Scores with 95 % intervals, as evaluate and score wrote them.",
        best={"validation loss": min},
    )


def _loss_parts(runs: Sequence[Run]) -> list[Part]:
    parts: list[Part] = []
    for label, field in (("training loss", "loss"), ("validation loss", "validation")):
        curves = {run.name: thin(getattr(run, field)) for run in runs}
        curves = {name: curve for name, curve in curves.items() if curve.steps}
        if curves:
            lines = {name: (curve.steps, curve.values) for name, curve in curves.items()}
            parts.append(draw_loss(lines, label))
    return parts or ["No run has a metrics.jsonl with a loss in it."]


def draw_loss(lines: Mapping[str, tuple[list[int], list[float]]], label: str) -> Plot:
    """A diagram of losses over steps; a run with few rows shows them as points."""

    def draw(axes: "Axes") -> None:
        for name, (steps, values) in lines.items():
            mark = "o" if len(steps) <= FEW else None
            axes.plot(steps, values, marker=mark, markersize=4, label=name, linewidth=1.2)
        axes.set(xlabel="step", ylabel=label)
        axes.legend(frameon=False)

    return draw_plot(draw)


def thin(curve: Curve) -> Curve:
    """A curve of at most `POINTS` points: neighbours are averaged."""
    per = -(-len(curve.steps) // POINTS)
    if per <= 1:
        return curve
    pieces = [curve.values[i : i + per] for i in range(0, len(curve.values), per)]
    return Curve(
        [curve.steps[min(i + per, len(curve.steps)) - 1] for i in range(0, len(curve.steps), per)],
        [sum(piece) / len(piece) for piece in pieces],
    )


def _settings(runs: Sequence[Run]) -> Table | str:
    """Fields of the configs in which the runs differ, a column a run."""
    first = runs[0].config
    changed: dict[str, dict[str, str]] = {}
    for run in runs[1:]:
        for line in differences(first, run.config):
            field, _, values = line.partition(": ")
            before, _, now = values.partition(" → ")
            changed.setdefault(field, {runs[0].name: before})[run.name] = now
    if not changed:
        return "The configs of all runs are the same."
    names = [run.name for run in runs]
    rows = [
        [field, *(values.get(name, values[names[0]]) for name in names)]
        for field, values in sorted(changed.items())
    ]
    return Table(["field", *names], rows)


def _grids(runs: Sequence[Run]) -> list[Part]:
    """The latest grid of each run: references, samples, true targets."""
    parts: list[Part] = []
    for run in runs:
        if run.samples is not None:
            caption = f"{run.name}, step {int(run.samples.stem):,}: reference, sample, target"
            image = load_image(run.samples)
            parts.append(Picture(image, caption, min(GRID_WIDTH, image.width)))
    return parts


def _picture_sets(runs: Sequence[Run]) -> list[Part]:
    """A table a suite: pictures of the same prompts, a column a run."""
    parts: list[Part] = []
    for suite in dict.fromkeys(name for run in runs for name in run.sets):
        there = [run for run in runs if suite in run.sets]
        prompts = {p.name: p for run in there for p in run.sets[suite][1].prompts}
        step = max(1, len(prompts) // SHOWN)
        rows: list[list[Cell]] = []
        for name, prompt in list(prompts.items())[::step][:SHOWN]:
            pictures = there[0].sets[suite][1]
            references = [path for path in pictures.reference_paths(prompt)[:1] if path.is_file()]
            cells: list[Cell] = [thumbnail(path, "") for path in references] or [None]
            for run in there:
                folder, own = run.sets[suite]
                found = own.find(folder, prompt, 0)
                cells.append(None if found is None else thumbnail(found, ""))
            rows.append([f"{name}: {prompt.text}", *cells])
        parts.append(Table(["prompt", "reference", *(run.name for run in there)], rows, suite))
    return parts
