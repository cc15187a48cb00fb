"""`compare` over folders as training leaves them; which rows of an ablation share a training."""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_config

from squeeze_jax.checkpoints.manager import write_config
from squeeze_jax.commands import compare
from squeeze_jax.config import Config, SamplingConfig, load_preset
from squeeze_jax.errors import InputError
from squeeze_jax.evaluation import ablation
from squeeze_jax.evaluation.ablation import (
    PUBLISHED,
    Drawing,
    plan_rows,
    preset_table,
    run_rows,
    trains_alike,
)
from squeeze_jax.evaluation.runs import POINTS, Curve, compare_report, name_runs, read_run, thin
from squeeze_jax.evaluation.similarity import Estimate

PRESET = """
import dataclasses, sys
sys.path.insert(0, {tests!r})
from tiny import tiny_config
from squeeze_jax.config import *
config = tiny_config(name={name!r}{changes})
"""


def make_run(folder, config, losses=(3.0, 2.0, 1.0), scores=None):
    folder.mkdir(parents=True)
    write_config(folder, config)
    rows = [{"step": 10 * i, "stage": 1, "loss": loss} for i, loss in enumerate(losses, 1)]
    rows += [{"step": 10 * len(losses), "validation_loss": losses[-1] / 2}]
    text = "\n".join(map(json.dumps, rows)) + '\n{"step": 99, "lo'  # a kill cut the last line short
    (folder / "metrics.jsonl").write_text(text)
    (folder / "samples").mkdir()
    for step in (5, 30):
        Image.new("RGB", (64, 96), (step * 8, 0, 0)).save(folder / "samples" / f"{step:06d}.png")
    if scores is not None:
        (folder / "scores.json").write_text(json.dumps(scores))
    return folder


CRITTERS = {
    "scores": {
        "staged (the demo's own τ)": {
            "tasks": {"subject easy": {"value": 0.5, "low": 0.4, "high": 0.6, "hits": "01"}}
        },
        "reference pasted": {"tasks": {"subject easy": {"value": 0.1, "low": 0.0, "high": 0.2}}},
    }
}
DREAMBENCH = {
    "scores": {"overall": {"DINO-I all": {"value": 0.7, "low": 0.6, "high": 0.8}}, "groups": {}}
}


JUDGED = {
    "judged": "replies.jsonl",
    "scores": {
        "overall": {"value": 3.0, "low": 2.0, "high": 4.0, "pictures": 2, "missing": 0},
        "look": {"value": 1.0, "low": None, "high": None, "pictures": 1, "missing": 1},
    },
}


def make_set(folder, names=("dog/00", "dog/01"), suite="dreambench", scores=DREAMBENCH):
    """As evaluate writes it, with a picture of each prompt but the last."""
    prompts = [{"name": name, "prompt": f"a picture of {name}", "references": []} for name in names]
    values = {"format": 1, "suite": suite, "references": ".", "images_per_prompt": 1}
    values |= {"system": {}, "prompts": prompts}
    (folder / "dog").mkdir(parents=True)
    (folder / "pictures.json").write_text(json.dumps(values))
    for name in names[:-1]:
        Image.new("RGB", (32, 32), "green").save(folder / f"{name}-0.png")
    (folder / "scores.json").write_text(json.dumps(scores))


def test_a_run_is_read_as_training_left_it(tmp_path):
    run = read_run(make_run(tmp_path / "a", tiny_config(), scores=CRITTERS))
    assert run.loss == Curve([10, 20, 30], [3.0, 2.0, 1.0])
    assert run.validation == Curve([30], [0.5])
    assert run.scores == {"subject easy": Estimate(0.5, 0.4, 0.6)}, "not of the pasted reference"
    assert run.samples.name == "000030.png"
    make_set(tmp_path / "a" / "evaluation" / "dreambench")
    assert set(read_run(tmp_path / "a").scores) == {"subject easy", "DINO-I all"}
    with pytest.raises(InputError, match=r"no config\.json in it"):
        read_run(tmp_path / "nothing")


def test_scores_of_two_suites_are_not_mixed(tmp_path):
    folder = make_run(tmp_path / "a", tiny_config(), scores=CRITTERS)
    make_set(folder / "evaluation" / "dreambench")
    other = {"scores": {"overall": {"DINO-I all": {"value": 0.2, "low": 0.1, "high": 0.3}}}}
    make_set(folder / "evaluation" / "prompts", suite="prompts", scores=other)
    assert {name: one.value for name, one in read_run(folder).scores.items()} == {
        "subject easy": 0.5,
        "DINO-I all": 0.7,
        "prompts: DINO-I all": 0.2,
    }


def test_what_a_judge_said_is_compared_whatever_it_calls_it(tmp_path):
    folder = make_run(tmp_path / "a", tiny_config())
    make_set(folder / "evaluation" / "prompts", suite="prompts", scores=JUDGED)
    assert read_run(folder).scores == {
        "prompts: overall": Estimate(3.0, 2.0, 4.0),
        "prompts: look": Estimate(1.0, None, None),
    }


def test_compare_writes_a_page_with_everything(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    other = tiny_config(sampling=SamplingConfig(steps=6, tau1=0.7, tau2=0.5))
    one = make_run(tmp_path / "x" / "run", tiny_config(), scores=CRITTERS)
    two = make_run(tmp_path / "y" / "run", other, losses=(3.0, 2.5))
    for folder in (one, two):
        make_set(folder / "evaluation" / "dreambench")
    assert compare.main([str(one), str(two), "--out", str(tmp_path / "out")]) == 0
    values = json.loads((tmp_path / "out" / "scores.json").read_text())["runs"]
    assert list(values) == ["x/run", "y/run"]
    assert values["x/run"]["scores"]["subject easy"] == {"value": 0.5, "low": 0.4, "high": 0.6}
    assert [values[name]["validation_loss"] for name in values] == [0.5, 1.25]
    assert [values[name]["step"] for name in values] == [30, 20]
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/svg+xml") == 2, "two diagrams: training and validation loss"
    assert page.count("data:image/") == 2 + 2 + 2, "a grid of each run, a drawn prompt of each"
    plain = page.replace(' class="short"', "")
    assert "<td>sampling.tau1</td><td>0.9</td><td>0.7</td>" in plain
    assert re.search(r"0\.500\d* \(0\.400\d*–0\.600\d*\)", page)
    said = capsys.readouterr().out
    assert re.search(r"0\.700\d* \(0\.600\d*–0\.800\d*\)", said)
    assert "report:" in said


def test_what_cannot_be_compared_is_one_sentence(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    run = make_run(tmp_path / "a", tiny_config())
    for words, said in (
        ([run], "name at least two"),
        ([run, run], "a run is named twice"),
        ([run, tmp_path / "b"], "no config.json in it"),
    ):
        assert compare.main([*map(str, words), "--out", str(tmp_path / "out")]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_names_tell_folders_apart(tmp_path):
    names = name_runs([tmp_path / "a" / "x" / "run", tmp_path / "b" / "x" / "run", tmp_path / "c"])
    assert len(names) == 3
    assert all(str(path).endswith(name) for name, path in names.items())


def test_long_curves_are_averaged_not_cut():
    values = np.random.default_rng(0).random(5 * POINTS).tolist()
    thinned = thin(Curve(list(range(len(values))), values))
    assert len(thinned.steps) == POINTS
    assert thinned.steps[-1] == len(values) - 1
    np.testing.assert_allclose(thinned.values, np.reshape(values, (POINTS, 5)).mean(1))
    assert thin(Curve([1, 2], [3.0, 4.0])) == Curve([1, 2], [3.0, 4.0])


def test_presets_that_differ_in_sampling_alone_share_a_training(tmp_path, request):
    tests = str(request.config.rootpath / "tests")
    for name, changes in (
        ("a", ""),
        ("b_tau", ", sampling=SamplingConfig(steps=6, tau1=0.0, tau2=0.0, cfg_scale=4.0)"),
        ("c_steps", ", sampling=SamplingConfig(steps=7, tau1=0.9, tau2=0.5)"),
        ("d_rate", ", optimizer=OptimizerConfig(learning_rate=2e-2, warmup_steps=2, ema=0.9)"),
    ):
        (tmp_path / f"{name}.py").write_text(PRESET.format(tests=tests, name=name, changes=changes))
    rows = plan_rows(sorted(tmp_path.glob("*.py")), [0, 3], tmp_path / "runs", ["--log.every", "7"])
    assert [row.name for row in rows[:3]] == ["a/seed-0", "a/seed-3", "b_tau/seed-0"]
    assert {row.config.log.every for row in rows} == {7}
    assert [row.config.training.seed for row in rows] == [0, 3] * 4
    trained = {row.name: f"{row.trained.parent.name}/{row.trained.name}" for row in rows}
    shared = [name for name, folder in trained.items() if name != folder]
    assert shared == ["b_tau/seed-0", "b_tau/seed-3", "c_steps/seed-0", "c_steps/seed-3"]
    assert trained["b_tau/seed-3"] == "a/seed-3"
    assert rows[3].trainer.stem == "a"
    finished = make_run(tmp_path / "done", dataclasses.replace(rows[1].config, name="elsewhere"))
    again = plan_rows(sorted(tmp_path.glob("*.py")), [0, 3], tmp_path / "runs", [], [finished])
    taken = [row.name for row in again if row.trained == finished]
    assert taken == ["a/seed-3", "b_tau/seed-3", "c_steps/seed-3"], "of its seed and training"
    assert [row.trainer for row in again if row.trained == finished] == [None] * 3
    with pytest.raises(InputError, match="give at least one, each once"):
        plan_rows([tmp_path / "a.py"], [0, 0], tmp_path, [])
    with pytest.raises(InputError, match="no presets"):
        plan_rows([], [0], tmp_path, [])


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What a pipeline is to an ablation."""

    config: Config | None = None


def test_a_row_done_again_with_another_config_is_drawn_again(tmp_path, request, monkeypatch):
    """As `row.json` asks where the config has changed: its file is deleted, and ablate started."""
    drawn = []
    monkeypatch.setattr(ablation, "source_of", lambda config: "made up")
    monkeypatch.setattr(ablation, "saved_step", lambda folder: 4)
    monkeypatch.setattr(ablation, "open_examples", lambda config, **_: {"held_out": []})
    monkeypatch.setattr(ablation, "Pipeline", SimpleNamespace(load=lambda folder: Loaded()))

    def draw(pipeline, examples, path):
        drawn.append(pipeline.config.sampling.tau1)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")

    def score(pipeline, path):
        path.write_text(json.dumps({"tau1": pipeline.config.sampling.tau1}))

    monkeypatch.setattr(ablation, "draw_grid", draw)
    tests, preset = str(request.config.rootpath / "tests"), tmp_path / "a.py"
    for tau1 in (0.9, 0.7):
        sampling = f", sampling=SamplingConfig(steps=6, tau1={tau1}, tau2=0.5)"
        preset.write_text(PRESET.format(tests=tests, name="a", changes=sampling))
        given = ["--log.score", "4", "--log.grid", "1"]
        (row,) = plan_rows([preset], [0], tmp_path / "runs", given)
        for _ in range(2):  # the second time nothing is left to do
            list(run_rows([row], Drawing(), lambda row: None, {"made up": score}))
        assert json.loads((row.folder / "scores.json").read_text()) == {"tau1": tau1}
        (row.folder / "row.json").unlink()
        list(run_rows([row], Drawing(), lambda row: None, {"made up": score}))  # killed at the end
        (row.folder / "row.json").unlink()
    assert drawn == [0.9, 0.7]


def test_a_row_done_again_with_other_times_of_training_is_trained_again(
    tmp_path, request, monkeypatch
):
    monkeypatch.setattr(ablation, "source_of", lambda config: None)
    monkeypatch.setattr(ablation, "saved_step", lambda folder: 4)
    monkeypatch.setattr(ablation, "_shift", lambda config: config.sampling.steps / 3)
    tests, preset, trained = str(request.config.rootpath / "tests"), tmp_path / "a.py", []
    for steps in (6, 6, 7):
        sampling = f", sampling=SamplingConfig(steps={steps}, tau1=0.9, tau2=0.5)"
        preset.write_text(PRESET.format(tests=tests, name="a", changes=sampling))
        (row,) = plan_rows([preset], [0], tmp_path / "runs", [])
        list(run_rows([row], Drawing(), lambda row: trained.append(row.config.sampling.steps), {}))
        (row.folder / "row.json").unlink()
    assert trained == [6, 7]


def test_weights_of_a_run_that_has_not_finished_are_not_taken(tmp_path, request, monkeypatch):
    tests, preset = str(request.config.rootpath / "tests"), tmp_path / "a.py"
    preset.write_text(PRESET.format(tests=tests, name="a", changes=""))
    run = make_run(tmp_path / "run", tiny_config())
    total = tiny_config().total_steps
    monkeypatch.setattr(ablation, "saved_step", lambda folder: total - 1)
    with pytest.raises(InputError, match=f"stands at step {total - 1} of {total}; let it finish"):
        plan_rows([preset], [0], tmp_path / "runs", [], [run])
    monkeypatch.setattr(ablation, "saved_step", lambda folder: total)
    assert plan_rows([preset], [0], tmp_path / "runs", [], [run])[0].trained == run


def test_steps_are_another_training_where_its_times_follow_them():
    """FLUX.2's shift depends on the number of steps, FLUX.1's does not."""
    for preset, alike in (("flux_stage2", True), ("klein_stage2", False)):
        config = load_preset(Path(__file__).parents[2] / "configs" / f"{preset}.py")
        sampling = dataclasses.replace(config.sampling, steps=9)
        assert trains_alike(config, dataclasses.replace(config, sampling=sampling)) == alike


def test_what_decides_weights_is_no_matter_of_sampling():
    config = tiny_config()
    for name, value in (("tau1", 0.7), ("tau2", 0.1), ("cfg_scale", 1.0), ("tau_tokens", 9)):
        sampling = dataclasses.replace(config.sampling, **{name: value})
        assert trains_alike(config, dataclasses.replace(config, name="x", sampling=sampling))
    training = dataclasses.replace(config.training, seed=5)
    assert not trains_alike(config, dataclasses.replace(config, training=training))


def test_seeds_are_averaged_beside_the_papers_figures(tmp_path):
    runs = [
        read_run(make_run(tmp_path / str(loss), tiny_config(), losses=(loss,), scores=CRITTERS))
        for loss in (2.0, 3.0)
    ]
    table = preset_table({"lap": runs, "mine": runs[:1]})
    assert table.rows[0] == [
        "lap",
        2,
        "1.2500 (1.0000–1.5000)",
        "0.5000 (0.5000–0.5000)",
        "0.7524 / 0.8502 / 0.2878",
    ]
    assert table.rows[1] == ["mine", 1, "1.0000", "0.5000", None]
    report, _ = compare_report(runs, "t")
    assert report.title == "t"


def test_the_papers_figures_are_those_of_the_docs(request):
    lines = (request.config.rootpath / "docs" / "decisions.md").read_text().splitlines()
    for name, figures in PUBLISHED.items():
        (line,) = [line for line in lines if f"`configs/ablations/{name}.py`" in line]
        assert [f"{figure:.4f}" for figure in figures] == [
            cell.strip() for cell in line.split("|")[3:6]
        ]
        assert (request.config.rootpath / "configs" / "ablations" / f"{name}.py").is_file()
