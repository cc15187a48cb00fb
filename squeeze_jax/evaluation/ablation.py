"""`ablate`: trains a folder of presets with several seeds, draws with each and tabulates all.

    WORKDIR/features              records, where the presets name none: one extraction for all
    WORKDIR/PRESET/seed-N         a run: what training writes, and samples/ or evaluation/SUITE
    WORKDIR/PRESET/seed-N/begun.json    the config that is drawn with: pictures of another one go
    WORKDIR/PRESET/seed-N/row.json      written once the row is finished: it is not looked at again
    WORKDIR/report.html, scores.json    all rows that are finished

Presets that differ only in how they are sampled (τ1, τ2, guidance) share one training, that of the
first of them. Started again after a kill, training goes on at its checkpoint, pictures that are
there stay, and finished rows are passed over.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from squeeze_jax.checkpoints.manager import read_config, saved_step
from squeeze_jax.config import Config, load_preset, override
from squeeze_jax.config_json import to_json
from squeeze_jax.data.sources import open_examples, source_of
from squeeze_jax.errors import InputError
from squeeze_jax.evaluation.grids import draw_grid
from squeeze_jax.evaluation.judges import Judge
from squeeze_jax.evaluation.report import Cell, Report, Section, Table
from squeeze_jax.evaluation.runs import Run, compare_report, read_run, run_values
from squeeze_jax.evaluation.suites import Prompts, Work, draw_set, plan_set, score_set
from squeeze_jax.interop.tensors import read_json, write_json
from squeeze_jax.sampling.pipeline import Pipeline, Settings

BEGUN, FINISHED, TRAINED = "begun.json", "row.json", "trained.json"
PUBLISHED = {
    "last_layer": (0.6566, 0.8128, 0.2893),
    "last_layer_vit": (0.7118, 0.8286, 0.2850),
    "lap": (0.7524, 0.8502, 0.2878),
    "single_stage": (0.7184, 0.8245, 0.2971),
    "single_stage_staged": (0.5763, 0.7686, 0.2995),
    "tau_0_0": (0.6905, 0.8225, 0.3044),
    "tau_097_090": (0.7490, 0.8466, 0.2963),
    "tau_085_070": (0.7282, 0.8376, 0.3034),
    "cfg_4": (0.7431, 0.8381, 0.3012),
}
"""Preset → DINO-I, CLIP-I, CLIP-T on DreamBench in the paper (docs/decisions.md, "Ablations")."""


class Row(NamedTuple):
    """A preset with one seed."""

    preset: Path
    seed: int
    config: Config
    overrides: list[str]
    """Of the preset, as train's command line takes them."""
    folder: Path
    trainer: Path | None
    """The preset that is trained for it: the first of those that train alike; None: the run was
    there before."""
    trained: Path
    """The folder of that training."""

    @property
    def name(self) -> str:
        return f"{self.preset.stem}/seed-{self.seed}"


class Drawing(NamedTuple):
    """What is drawn with each row's weights, and how it is scored."""

    suite: str = "prompts"
    """Of `prompts`."""
    prompts: Prompts | None = None
    """None: a grid of held-out examples, where the config has a source."""
    images: int = 1
    """Pictures a prompt."""
    judges: tuple[Judge, Judge] | None = None


Train = Callable[[Row], None]
"""Trains a row's preset in its folder, or resumes it."""
Score = Callable[[Pipeline, Path], None]
"""Scores a checkpoint's own held-out data and writes a scores.json."""


def plan_rows(
    presets: Sequence[Path],
    seeds: Sequence[int],
    workdir: Path,
    overrides: Sequence[str],
    there: Sequence[Path] = (),
) -> list[Row]:
    """The rows in order. there: finished runs, whose weights rows of the same training take.

    Raises InputError where there are no rows, for an impossible override, and for a run of `there`
    that has not finished.
    """
    if not presets:
        raise InputError("no presets: give a folder with at least one *.py in it")
    if not seeds or len(set(seeds)) != len(seeds):
        raise InputError(f"seeds {list(seeds)}: give at least one, each once")
    rows: list[Row] = []
    finished = [(_finished_config(folder), folder) for folder in there]
    for preset in presets:
        for seed in seeds:
            given = [*overrides, "--training.seed", str(seed)]
            config = override(load_preset(preset), given, "squeeze_jax ablate")
            folder = workdir / preset.stem / f"seed-{seed}"
            alike = [(None, run) for own, run in finished if _learned(own) == _learned(config)]
            alike += [
                (row.trainer, row.trained) for row in rows if trains_alike(row.config, config)
            ]
            first = alike[0] if alike else (preset, folder)
            rows.append(Row(preset, seed, config, given, folder, *first))
    return rows


def _finished_config(folder: Path) -> Config:
    config, step = read_config(folder), saved_step(folder)
    if step is not None and step < config.total_steps:
        raise InputError(
            f"--trained {folder}: stands at step {step} of {config.total_steps}; let it finish"
        )
    return config


def trains_alike(one: Config, other: Config) -> bool:
    """Whether two configs train the same weights: they differ at most in name and sampling."""
    return _training(one) == _training(other) and _shift(one) == _shift(other)


def _learned(config: Config) -> tuple[object, ...]:
    """What tells trainings apart, wherever data and weights lie and whatever came before."""
    training = config.training
    parts = config.model.dit, config.aggregator, config.lora, config.diffusion, config.optimizer
    return (*parts, training.stages, training.seed, _shift(config))


def _training(config: Config) -> Config:
    """A config without what trained weights do not depend on."""
    sampling = dataclasses.replace(
        config.sampling, steps=1, tau1=1.0, tau2=0.0, tau_tokens=None, cfg_scale=1.0
    )
    return dataclasses.replace(config, name="", sampling=sampling)


def _shift(config: Config) -> float:
    """Of the times that training draws, which may follow the sampler's number of steps."""
    rows, columns = config.target_grid
    return config.schedule_shift(rows * columns, config.sampling.steps)


def run_rows(
    rows: Sequence[Row], drawing: Drawing, train: Train, score: Mapping[str, Score]
) -> Iterator[Row]:
    """Finishes row after row, in order, and yields each. score: by the name of a source."""
    for row in rows:
        if not _is_finished(row, drawing):
            _finish(row, drawing, train, score)
        yield row


def _finish(row: Row, drawing: Drawing, train: Train, score: Mapping[str, Score]) -> None:
    begun = row.folder / BEGUN
    if not begun.exists():
        write_json(begun, _values(row.config))
    marker = row.trained / TRAINED
    wanted = _values(_training(row.config)) | {"shift": _shift(row.config)}
    if row.trainer is not None and not (marker.exists() and read_json(marker) == wanted):
        train(row._replace(preset=row.trainer, folder=row.trained))
        write_json(marker, wanted)
    _remove_others(row, begun)
    _draw(row, drawing, score)
    write_json(row.folder / FINISHED, _row_values(row, drawing))


def _remove_others(row: Row, begun: Path) -> None:
    """Removes grids and scores that another config has left in the folder, which would be taken for
    this one's. (Training and picture sets refuse another by themselves.)"""
    wanted = _values(row.config)
    if read_json(begun) != wanted:
        for old in [*(row.folder / "samples").glob("*.png"), row.folder / "scores.json"]:
            old.unlink(missing_ok=True)
        write_json(begun, wanted)


def _draw(row: Row, drawing: Drawing, score: Mapping[str, Score]) -> None:
    """Draws and scores what is not there yet."""
    source, config = source_of(row.config), row.config
    step = saved_step(row.trained)
    grid = row.folder / "samples" / f"{step:06d}.png"
    scorer = score.get(source or "") if config.log.score else None
    if scorer is not None and (row.folder / "scores.json").exists():
        scorer = None
    draws_grid = source is not None and config.log.grid > 0 and not grid.exists()
    if drawing.prompts is None and not draws_grid and scorer is None:
        return
    pipeline = dataclasses.replace(Pipeline.load(row.trained), config=config)
    if drawing.prompts is not None:
        _draw_set(row, pipeline, drawing, drawing.prompts)
    if draws_grid:
        held_out = open_examples(config, check_images=config.data.skip_bad)["held_out"]
        examples = [held_out[i] for i in range(min(config.log.grid, len(held_out)))]
        draw_grid(pipeline, examples, grid)
    if scorer is not None:
        scorer(pipeline, row.folder / "scores.json")


def _draw_set(row: Row, pipeline: Pipeline, drawing: Drawing, prompts: Prompts) -> None:
    out = row.folder / "evaluation" / drawing.suite
    name, settings = str(row.trained), Settings()
    pictures = plan_set(pipeline, drawing.suite, prompts, drawing.images, name, settings)
    complete = draw_set(pipeline, pictures, out, settings, Work())
    if complete and drawing.judges is not None:
        score_set(out, pictures, drawing.judges, out)


def _is_finished(row: Row, drawing: Drawing) -> bool:
    """Raises InputError where the folder holds a row of another config or other drawings."""
    path = row.folder / FINISHED
    if not path.exists():
        return False
    there, wanted = read_json(path), _row_values(row, drawing)
    if there == wanted:
        return True
    differing = [name for name in there | wanted if there.get(name) != wanted.get(name)]
    raise InputError(
        f"{path}: finished with another {', '.join(differing)}; give another --workdir, or delete "
        f"this file to do the row again"
    )


def _row_values(row: Row, drawing: Drawing) -> dict[str, Any]:
    prompts = drawing.prompts
    names = [] if prompts is None else [f"{one.name}: {one.text}" for one in prompts.rows]
    return {
        "config": _values(row.config),
        "suite": drawing.suite if prompts else None,
        "prompts": names,
        "images": drawing.images,
        "scored": drawing.judges is not None,
    }


def _values(config: Config) -> dict[str, Any]:
    """A config as JSON has it."""
    return json.loads(to_json(config))


def read_row(row: Row) -> Run:
    """A finished row: its own pictures and scores; validation is that of its training, whose loss
    is drawn once."""
    own = read_run(row.folder, row.name, row.config)
    if row.trained == row.folder:
        return own
    return own._replace(validation=read_run(row.trained).validation)


def ablation_report(rows: Sequence[Row], title: str) -> tuple[Report, dict[str, Any]]:
    """The page of finished rows: a table by preset, then all rows side by side."""
    runs = {row.name: read_row(row) for row in rows}
    by_preset: dict[str, list[Run]] = {}
    for row in rows:
        by_preset.setdefault(row.preset.stem, []).append(runs[row.name])
    report, values = compare_report(list(runs.values()), title)
    table = preset_table(by_preset)
    shared = [
        f"{row.name} takes the weights of {row.trained}: it differs in sampling alone."
        for row in rows
        if row.trained != row.folder
    ]
    sections = [Section("Presets", [table, *shared]), *report.sections]
    return Report(title, sections), values | {"presets": list(by_preset)}


def preset_table(presets: Mapping[str, Sequence[Run]]) -> Table:
    """A row a preset: means over its seeds, with the least and the most of several."""
    runs = [run for own in presets.values() for run in own]
    measured = list(dict.fromkeys(name for run in runs for name in run.scores))
    rows: list[list[Cell]] = []
    for name, own in presets.items():
        losses = [run_values(run)["validation_loss"] for run in own]
        cells: list[Cell] = [_spread([loss for loss in losses if loss is not None])]
        cells += [
            _spread([run.scores[what].value for run in own if what in run.scores])
            for what in measured
        ]
        paper = " / ".join(f"{value:.4f}" for value in PUBLISHED.get(name, ())) or None
        rows.append([name, len(own), *cells, paper])
    return Table(
        ["preset", "seeds", "validation loss", *measured, "paper: DINO-I / CLIP-I / CLIP-T"],
        rows,
        "Means over seeds; of several the least and the most in brackets.",
    )


def _spread(values: Sequence[float]) -> str | None:
    if not values:
        return None
    mean = sum(values) / len(values)
    several = f" ({min(values):.4f}–{max(values):.4f})" if len(values) > 1 else ""
    return f"{mean:.4f}{several}"
