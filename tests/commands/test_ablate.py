"""`ablate` in processes of its own: killed again and again, nothing is done twice or lost."""

import json
import signal
import subprocess
import sys
import time

import pytest
from miniature_preset import environment, write_preset


def start(folder, environment, **streams):
    words = [
        sys.executable,
        "-m",
        "squeeze_jax",
        "ablate",
        str(folder / "presets"),
        "--workdir",
        str(folder / "runs"),
    ]
    return subprocess.Popen([*words, "--seeds", "0,1"], env=environment, text=True, **streams)


def kill_when(folder, environment, there):
    """Starts it and kills it once a file of that pattern is there."""
    process = start(folder, environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 1200
    while process.poll() is None and not list(folder.glob(there)):
        assert time.monotonic() < end, there
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()


def states(folder, *patterns):
    """Bytes and times of files: what is done again has another time."""
    found = {
        path for pattern in patterns for path in (folder / "runs").glob(pattern) if path.is_file()
    }
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(found)}


@pytest.mark.slow
@pytest.mark.telling
def test_killed_again_and_again_nothing_is_done_twice_or_lost(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "presets").mkdir()
    write_preset(tmp_path / "presets" / "a.py", score=4)
    write_preset(tmp_path / "presets" / "tau_0_0.py", tau1=0.0, score=4)
    own = environment(tmp_path / "cache")
    kept = ("*/*/row.json", "*/*/trained.json", "*/*/scores.json", "features/**/*")
    before = {}
    for there in (
        "runs/a/seed-0/metrics.jsonl",
        "runs/a/seed-0/trained.json",
        "runs/a/seed-1/checkpoints/2",
    ):
        kill_when(tmp_path, own, there)
        now = states(tmp_path, *kept)
        assert {name: now.get(name) for name in before} == before, "what is finished stays as it is"
        before = now
    process = start(tmp_path, own, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    said, complaints = process.communicate(timeout=1800)
    assert process.returncode == 0, complaints[-2000:]
    now = states(tmp_path, *kept)
    assert {name: now[name] for name in before} == before
    runs = tmp_path / "runs"
    for seed in (0, 1):
        text = (runs / "a" / f"seed-{seed}" / "metrics.jsonl").read_text()
        steps = [row["step"] for row in map(json.loads, text.splitlines()) if "loss" in row]
        assert steps == [1, 2, 3, 4], "each step once"
    assert not (runs / "tau_0_0" / "seed-0" / "checkpoints").exists(), "it shares the training of a"
    grids = [
        (runs / name / "seed-0" / "samples" / "000004.png").read_bytes()
        for name in ("a", "tau_0_0")
    ]
    assert grids[0] != grids[1], "and samples in its own way"
    values = json.loads((runs / "scores.json").read_text())
    assert values["presets"] == ["a", "tau_0_0"]
    assert len(values["runs"]) == 4
    assert all(len(run["scores"]) == 4 for run in values["runs"].values())
    names = ("a/seed-0", "a/seed-1", "tau_0_0/seed-0")
    a, other, tau = (values["runs"][name]["validation_loss"] for name in names)
    assert a == tau != other
    assert (runs / "report.html").read_text().count("data:image/") == 2 + 4, "diagrams, grids"
    assert "0.6905 / 0.8225 / 0.3044" in said, "the paper's figures stand beside"

    again = start(tmp_path, own, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    said, complaints = again.communicate(timeout=900)
    assert again.returncode == 0, complaints[-2000:]
    assert states(tmp_path, *kept) == now
    assert "stage 1" not in said, "nothing is trained"
    write_preset(tmp_path / "presets" / "a.py", kind="last_layer", score=4)
    changed = start(tmp_path, own, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    _, complaints = changed.communicate(timeout=900)
    assert changed.returncode == 2
    assert "row.json: finished with another config" in complaints
