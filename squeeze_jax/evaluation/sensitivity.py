"""The suite `sensitivity`: the same pictures under a grid of τ1, τ2, guidance and steps.

Each setting has a folder of its own, laid out as any picture set, so that an interrupted grid goes
on and each one can be scored by itself.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from squeeze_jax.config import Config
from squeeze_jax.data.images import load_image
from squeeze_jax.errors import InputError
from squeeze_jax.evaluation import paper
from squeeze_jax.evaluation.judges import Judge
from squeeze_jax.evaluation.picture_set import PictureSet
from squeeze_jax.evaluation.report import (
    Cell,
    Picture,
    Report,
    Section,
    Table,
    print_report,
    write_report,
)
from squeeze_jax.evaluation.score_pictures import score_pictures, to_json
from squeeze_jax.evaluation.score_report import show, spread
from squeeze_jax.evaluation.similarity import overall_means
from squeeze_jax.evaluation.suites import FEATURES, Prompts, Work, draw_set, plan_set
from squeeze_jax.interop.tensors import write_beside
from squeeze_jax.sampling.pipeline import Pipeline, Settings
from squeeze_jax.sampling.schedule import STAGE_NAMES
from squeeze_jax.sampling.settings import resolve

CELL = 128
"""Longest side of a picture on the sheet, in pixels."""
COLUMNS = 8
"""Prompts on the sheet, evenly over the list."""
SCORES = ("DINO-I all", "CLIP-I all", "CLIP-T")


def grid(
    settings: Settings,
    config: Config,
    tau1: Sequence[float],
    tau2: Sequence[float],
    cfg_scale: Sequence[float],
    steps: Sequence[int],
) -> list[Settings]:
    """Every combination with τ2 ≤ τ1. What is not given is the checkpoint's own; of τ1 and τ2 0
    (the MLLM alone), too. Raises InputError for what cannot be sampled."""
    own = resolve(settings, config)
    scales = cfg_scale or (own.cfg_scale,)
    found = [
        replace(settings, tau1=t1, tau2=t2, cfg_scale=scale, steps=n)
        for t1, t2, scale, n in product(
            dict.fromkeys(tau1 or (0.0, own.tau1)),
            dict.fromkeys(tau2 or (0.0, own.tau2)),
            dict.fromkeys(scales),
            dict.fromkeys(steps or (own.steps,)),
        )
        if t2 <= t1
    ]
    if not found:
        raise InputError("--tau2 is larger than every --tau1; no combination is left")
    for one in found:
        resolve(one, config)  # refuses what cannot be
    return found


def run_grid(
    pipeline: Pipeline,
    settings: Sequence[Settings],
    prompts: Prompts,
    out: Path,
    checkpoint: str,
    images: int = 1,
    at_once: int = 16,
    judges: tuple[Judge, Judge] | None = None,
) -> None:
    """Draws all settings' pictures, writes contact_sheet.png, report.html and scores.json."""
    sets: list[tuple[Settings, Path, PictureSet]] = []
    for one in settings:
        folder = out / name_setting(one)
        pictures = plan_set(pipeline, "sensitivity", prompts, images, checkpoint, one, at_once)
        draw_set(pipeline, pictures, folder, one, Work(at_once=at_once))
        sets.append((one, folder, pictures))
    results = [
        score_pictures(folder, pictures, *judges, cache=out / FEATURES) if judges else None
        for _, folder, pictures in sets
    ]
    sheet = contact_sheet(sets)
    write_beside(out / "contact_sheet.png", lambda part: sheet.save(part, "PNG"))
    rows, scores = [], []
    for (one, folder, pictures), scored in zip(sets, results):
        means = overall_means(scored.system) if scored else {}
        rows.append([*_numbers(pipeline, one, pictures), *(show(means.get(n)) for n in SCORES)])
        scores.append(
            {"tau1": one.tau1, "tau2": one.tau2, "cfg_scale": one.cfg_scale, "steps": one.steps,
             "folder": str(folder)} | (to_json(scored, folder) if scored else {})
        )  # fmt: skip
    columns = ["tau1", "tau2", "CFG", "steps", *[f"steps: {name}" for name in STAGE_NAMES]]
    shown = list(SCORES) if judges else []
    table = Table([*columns, *shown], [row[: len(columns) + len(shown)] for row in rows])
    theirs = Table(
        ["tau1", "tau2", "CFG", "DINO-I", "CLIP-I", "CLIP-T"],
        [[f"{value:g}" for value in key] + list(row) for key, row in paper.SENSITIVITY.items()],
        "What the paper reports, on the whole of DreamBench.",
    )
    report = Report(
        f"Sensitivity: {checkpoint}",
        [
            Section("Settings", [table, theirs]),
            Section(
                "Pictures",
                ["Rows are settings, columns prompts; every row begins with the same noise.",
                 Picture(sheet, "the first picture of each prompt")],
            ),
        ],
    )  # fmt: skip
    print_report(report)
    write_report(out, report, {"checkpoint": checkpoint, "settings": scores})
    print(f"contact sheet: {out / 'contact_sheet.png'}\nreport: {out / 'report.html'}")


def name_setting(one: Settings) -> str:
    """The folder of a setting."""
    scale = one.cfg_scale
    scales = scale if isinstance(scale, tuple) else (scale,)
    cfg = "_".join(f"{value:g}" for value in scales if value is not None)
    return f"tau1_{one.tau1:g}-tau2_{one.tau2:g}-cfg_{cfg}-steps_{one.steps}"


def _numbers(pipeline: Pipeline, one: Settings, pictures: PictureSet) -> list[Cell]:
    """Of a setting's row: its values, and the steps of each stage."""
    resolved = pipeline.resolved(one)
    used = pipeline.uses_references and any(prompt.references for prompt in pictures.prompts)
    stages = resolved.make_schedule(pipeline.config, used).stage_names(resolved.steps)
    values = [f"{one.tau1:g}", f"{one.tau2:g}", str(one.cfg_scale), resolved.steps]
    return [*values, *(stages.count(name) for name in STAGE_NAMES)]


def contact_sheet(sets: Sequence[tuple[Settings, Path, PictureSet]]) -> Image.Image:
    """The first picture of some prompts: a row a setting, below a row of the references."""
    pictures = sets[0][2]
    prompts = spread(pictures.prompts, COLUMNS)
    label, gap = 150, 4
    font = ImageFont.load_default(14)
    width = label + len(prompts) * (CELL + gap)
    height = (len(sets) + 1) * (CELL + gap)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)

    def put(path: Path, row: int, column: int) -> None:
        image = load_image(path)
        scale = CELL / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        kind = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.BICUBIC
        sheet.paste(image.resize(size, kind), (label + column * (CELL + gap), row * (CELL + gap)))

    draw.text((4, 4), "reference", "black", font)
    for column, prompt in enumerate(prompts):
        for path in pictures.reference_paths(prompt)[:1]:
            put(path, 0, column)
    for row, (one, folder, of_setting) in enumerate(sets, 1):
        said = f"tau1 {one.tau1:g}\ntau2 {one.tau2:g}\nCFG {one.cfg_scale}\n{one.steps} steps"
        draw.multiline_text((4, row * (CELL + gap) + 4), said, "black", font)
        for column, prompt in enumerate(prompts):
            path = of_setting.find(folder, prompt, 0)
            assert path is not None
            put(path, row, column)
    return sheet
