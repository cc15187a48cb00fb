"""`evaluate` and `score` on the shipped miniature: shards, kills, three suites' files."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from squeeze_jax.commands import evaluate
from squeeze_jax.data.images import load_image
from squeeze_jax.miniature import evaluation as miniature
from squeeze_jax.sampling import png_metadata

pytest.importorskip("torch")
pytest.importorskip("matplotlib")

from tiny_judges import REFERENCES, save_clip, save_dino, save_dreambench

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluate")
    save_dino(root / "dino")
    save_clip(root / "clip")
    save_dreambench(root / "bench")
    return root


def dreambench(root, out, *more):
    return ["--suite", "dreambench", "--dreambench", str(root / "bench"), "--images", "2",
            "--steps", "2", "--at-once", "2", "--out", str(out), *more]  # fmt: skip


def pictures(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.png")
    }


def names(kind):
    return {
        f"{subject}/0{p}-{i}.{kind}" for subject in ("can", "dog") for p in (0, 1) for i in (0, 1)
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "dreambench"], "needs --dreambench DIR"),
        (["--suite", "prompts"], "no prompts: give a JSON file"),
        (["--suite", "prompts", "nowhere.json"], "nowhere.json: no such file"),
        (["--suite", "sensitivity", "P", "--dino", "x"], "belong together"),
        (["--suite", "prompts", "P", "--steps", "2", "3"], "several are for --suite sensitivity"),
        (["--suite", "prompts", "P", "--images", "0"], "--images 0 must be at least 1"),
        (["--suite", "prompts", "P", "--shard", "2/2"], "must be i/n with i below n"),
        (["--suite", "prompts", "P", "--out", "P"], "is a file; give a folder"),
        (["--suite", "prompts", "P", "--out", "gs://a/b"], "--out gs:/a/b/report.html: written to"),
        (["--tau1", "0.5"], "--tau1: --suite critters has no use for it"),
        (["--list-only"], "--list-only: --suite critters has no use for it"),
        (["--suite", "sensitivity", "P", "--shard", "1/2"], "--shard: --suite sensitivity has no"),
        (["--suite", "prompts", "P", "--pairs", "8"], "--pairs: --suite prompts has no use"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_before_weights_are_read(
    arguments, message, capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr(evaluate, "load", lambda *_: pytest.fail("weights were read"))
    monkeypatch.chdir(tmp_path)
    prompts = str(REFERENCES / "prompts.json")
    assert evaluate.main([prompts if word == "P" else word for word in arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_folder_of_the_critters_report_may_be_new(tmp_path, monkeypatch):
    monkeypatch.setattr(miniature, "score_critters", lambda _, out, *a, **b: out.write_text("{}"))
    out = tmp_path / "new" / "scores.json"
    assert evaluate.main(["--pairs", "1", "--out", str(out)]) == 0
    assert [path.name for path in out.parent.iterdir()] == ["scores.json"]


def test_the_list_alone_is_written_for_another_system(root, tmp_path):
    assert evaluate.main(dreambench(root, tmp_path, "--list-only")) == 0
    found = json.loads((tmp_path / "pictures.json").read_text())
    assert found["images_per_prompt"] == 2 and len(found["prompts"]) == 4
    assert found["prompts"][0]["references"] == ["can/01.jpg"]
    assert [path.name for path in tmp_path.iterdir()] == ["pictures.json"]


@pytest.mark.slow
def test_pictures_do_not_depend_on_shards_or_on_what_is_there(root, tmp_path):
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    assert evaluate.main(dreambench(root, whole)) == 0
    wanted = pictures(whole)
    assert set(wanted) == names("png") and len(set(wanted.values())) == 8
    for shard in ("1/3", "0/3", "2/3"):
        assert evaluate.main(dreambench(root, sharded, "--shard", shard)) == 0
    assert pictures(sharded) == wanted
    for name in ("can/00-1.png", "dog/01-0.png"):
        (whole / name).unlink()
    kept = {path: path.stat().st_mtime_ns for path in whole.rglob("*.png")}
    judges = ["--dino", str(root / "dino"), "--clip", str(root / "clip")]
    assert evaluate.main(dreambench(root, whole, *judges)) == 0
    assert pictures(whole) == wanted
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert {"report.html", "scores.json"} <= {path.name for path in whole.iterdir()}
    inside = png_metadata.read(whole / "dog" / "00-0.png")
    assert inside.prompt == "a dog in the snow" and inside.settings.steps == 2
    assert inside.references[0].path.endswith("dog/02.jpg")
    assert evaluate.main([*dreambench(root, whole), "--seed", "1"]) == 2  # not mixed


@pytest.mark.slow
def test_the_suite_prompts_writes_what_a_judge_is_asked(root, tmp_path):
    prompts = str(REFERENCES / "prompts.json")
    given = [prompts, "--suite", "prompts", "--steps", "2", "--out", str(tmp_path)]
    assert evaluate.main(given) == 0
    lines = (tmp_path / "requests.jsonl").read_text().splitlines()
    requests = [json.loads(line) for line in lines]
    assert [one["id"] for one in requests] == ["0000-0", "0001-0", "0002-0"]
    assert all(load_image(one["picture"]).size == (64, 64) for one in requests)
    page = (tmp_path / "report.html").read_text()
    assert page.count("<img") >= 3 and "None yet" in page


@pytest.mark.slow
def test_a_grid_is_one_sheet_and_one_table(root, tmp_path):
    prompts = str(REFERENCES / "prompts.json")
    given = [prompts, "--suite", "sensitivity", "--tau1", "0", "0.8", "--tau2", "0.8", "0",
             "--cfg-scale", "1", "--steps", "2", "--out", str(tmp_path)]  # fmt: skip
    assert evaluate.main(given) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    found = [(one["tau1"], one["tau2"]) for one in scores["settings"]]
    assert found == [(0.0, 0.0), (0.8, 0.8), (0.8, 0.0)]
    sheet = load_image(tmp_path / "contact_sheet.png")
    drawn = pictures(tmp_path)
    assert sheet.height == 4 * 132 and len(drawn) == 3 * 3 + 1
    assert evaluate.main(given) == 0
    assert pictures(tmp_path) == drawn


def interrupted(command, done, environment):
    """Runs a command again and again, killed whenever `done()` grows, until it ends by itself."""
    kills, before = 0, done()
    while True:
        with subprocess.Popen(
            [sys.executable, "-m", "squeeze_jax", *command], env=environment, cwd=ROOT,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        ) as process:  # fmt: skip
            while process.poll() is None and (done() == before or kills >= 2):
                time.sleep(0.01)
            if process.poll() is not None:
                assert process.returncode == 0, process.stderr.read()
                return kills
            process.send_signal(signal.SIGKILL)
            process.wait()
        kills, before = kills + 1, done()


@pytest.mark.slow
@pytest.mark.telling
def test_killed_while_drawing_and_scoring_it_ends_as_if_it_had_not_been(root, tmp_path):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    cache = str(tmp_path / "cache")
    environment = os.environ | {"PYTHONPATH": path, "SQUEEZE_JAX_CACHE": cache}
    judges = ["--dino", str(root / "dino"), "--clip", str(root / "clip")]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = ["evaluate", *dreambench(root, whole, *judges)]
    subprocess.run(
        [sys.executable, "-m", "squeeze_jax", *command], env=environment, cwd=ROOT, check=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    drawing = ["evaluate", *dreambench(root, killed)]
    assert interrupted(drawing, lambda: len(list(killed.rglob("[0-9]*.png"))), environment) > 0
    assert pictures(killed) == pictures(whole)
    scoring = ["score", str(killed), *judges]
    assert interrupted(scoring, lambda: len(list(killed.rglob("*.safetensors"))), environment) > 0
    one, other = (json.loads((folder / "scores.json").read_text()) for folder in (whole, killed))
    assert one["scores"] == other["scores"] and one["prompts"] == other["prompts"]
