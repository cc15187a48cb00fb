"""The commands as a user runs them: killed and resumed, real photographs, pictures with their settings inside."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from squeeze_jax.commands import sample
from squeeze_jax.data.records import read_metadata

ROOT = Path(__file__).parents[2]
PRESET = """
from squeeze_jax.config import *
from squeeze_jax.models.aggregator import AggregatorConfig
from squeeze_jax.models.dit import DiTConfig

config = Config(
    name="small",
    model=ModelConfig(
        dit=DiTConfig(in_channels=32, context_width=32, pooled_width=8, heads=2, head_width=16,
                      num_double_blocks=1,
                      num_single_blocks=1, rope_axes=(4, 6, 6), guidance=False),
        latent_pixels=4, dtype="float32", frozen_dtype="float32",
    ),
    aggregator=AggregatorConfig(layers=tuple(range(5)), width=128, out_width=32, heads=4, mlp_width=32, refiner_blocks=1),
    lora=None,
    data=DataConfig(height=64, width=64, reference_long_side=64, batch_per_chip=4, SOURCE),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2, ema=0.9),
    training=TrainingConfig(stages=(StageConfig(steps=4, references=False), StageConfig(steps=8, references=True)),
                            validate_every=6, sample_every=0),
    sampling=SamplingConfig(steps=3, tau1=0.8, tau2=0.5),
    checkpoint=CheckpointConfig(every=2),
    log=LogConfig(every=1, tensorboard=False, grid=2),
)
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    flags = "--xla_llvm_disable_expensive_passes=true --xla_backend_optimization_level=0"  # one device, quickly compiled
    changes = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "SQUEEZE_JAX_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
    return os.environ | changes


def preset(folder: Path, source: str) -> Path:
    path = folder / "small.py"
    path.write_text(PRESET.replace("SOURCE", source))
    return path


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), *map(str, arguments)]


def final_state(workdir: Path):
    with ocp.CheckpointManager((workdir / "checkpoints").absolute()) as manager:
        step = manager.latest_step()
        items = ocp.args.Composite(state=ocp.args.StandardRestore(), data=ocp.args.JsonRestore())
        restored = manager.restore(step, args=items)
    return step, restored


@pytest.mark.telling
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # Orbax, about restoring without shardings
def test_killed_at_a_random_step_and_started_again_gives_the_same_bits(tmp_path, environment):
    config = preset(tmp_path, "critters=CrittersConfig(train=24, held_out=4)")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run = subprocess.run(command(config, "--workdir", whole), env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    shared = ("--data.features", whole / "features", "--workdir", killed)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command(config, *shared), env=environment, **quiet)
    wanted = int(np.random.default_rng().integers(3, 11))
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        lines = (killed / "metrics.jsonl").read_text().count("\n") if (killed / "metrics.jsonl").exists() else 0
        if lines >= wanted:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = subprocess.run(command(config, *shared), env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr[-2000:]
    (step, a), (other, b) = final_state(whole), final_state(killed)
    assert step == other == 12
    assert a["data"] == b["data"]
    leaves, others = (dict(flat(x["state"])) for x in (a, b))
    assert leaves.keys() == others.keys()
    for name in leaves:
        np.testing.assert_array_equal(leaves[name], others[name], err_msg=f"{name}, killed near step {wanted}")
    lines = map(json.loads, (killed / "metrics.jsonl").read_text().splitlines())
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == list(range(1, 13))


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_processes_extract_train_validate_sample_and_score_as_one_does(tmp_path, environment, count):
    config = preset(tmp_path, "critters=CrittersConfig(train=24, held_out=4)")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    several, one, score = tmp_path / "several", tmp_path / "one", ("--log.score", 4)
    share = ("--data.batch-per-chip", 4 // count, "--coordinator", address, "--num-processes", count)
    started = [
        subprocess.Popen(
            command(config, "--workdir", several, *score, *share, "--process-id", i),
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for i in range(count)
    ]  # fmt: skip
    said = [process.communicate(timeout=900)[0] for process in started]
    assert [process.returncode for process in started] == [0] * count, said
    assert "retrieval of 4 held-out pairs" in said[0]
    assert "right among 16 (chance 6 %): subject easy " in said[0]
    assert (several / "contact_sheet.png").is_file()
    assert not any("retrieval" in text for text in said[1:])
    alone = subprocess.run(
        command(config, "--workdir", one, *score), env=environment, capture_output=True, text=True, check=False
    )
    assert alone.returncode == 0, alone.stderr[-2000:]
    losses = [
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
        for run in (several, one)
    ]
    np.testing.assert_allclose(*losses, rtol=1e-3)
    pictures = [np.asarray(Image.open(run / "samples" / "000012.png"), int) for run in (several, one)]
    assert np.mean(np.abs(pictures[0] - pictures[1]) <= 1) > 0.99


def flat(tree, prefix=""):
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from flat(value, f"{prefix}/{key}")
    elif isinstance(tree, (list, tuple)):
        for key, value in enumerate(tree):
            yield from flat(value, f"{prefix}/{key}")
    elif tree is not None:
        yield prefix, np.asarray(tree)


@pytest.mark.telling
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_real_photographs_go_the_whole_way(tmp_path, environment, monkeypatch, capsys):
    data = pytest.importorskip("skimage.data")
    rows = []
    for i, (name, target) in enumerate([("astronaut", "chelsea"), ("coffee", "rocket"), ("chelsea", "coffee")]):
        Image.fromarray(getattr(data, name)()).save(tmp_path / f"{name}.jpg")
        Image.fromarray(getattr(data, target)()).save(tmp_path / f"{target}.jpg")
        rows.append({"prompt": f"picture {i}", "image_paths": [f"{name}.jpg"], "image_tgt_path": f"{target}.jpg"})
    rows[1]["image_paths"] = ["coffee.jpg", "astronaut.jpg"]
    manifest = tmp_path / "pairs.json"
    manifest.write_text(json.dumps(rows))
    workdir = tmp_path / "work"
    kept = f"manifest={str(manifest)!r}, codec='int8', keep='read'"
    arguments = (preset(tmp_path, kept), "--workdir", workdir, "--training.stages.1.steps", 2)
    run = subprocess.run(command(*arguments), env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert Image.open(workdir / "samples" / "000006.png").size == (64, 3 * 64)
    assert read_metadata(workdir / "features" / "train").codec == "int8"

    monkeypatch.setenv("SQUEEZE_JAX_CACHE", environment["SQUEEZE_JAX_CACHE"])
    # What training drew at its end is what the command draws from the saved checkpoint: the held-out row, seed 0.
    drawn = np.asarray(Image.open(workdir / "samples" / "000006.png"), int)[64:128]
    held_out = ["--prompt", "picture 2", "--reference", str(tmp_path / "chelsea.jpg"), "--out", str(tmp_path / "cli.png")]
    assert sample.main(["--checkpoint", str(workdir), *held_out]) == 0
    assert np.max(np.abs(drawn - np.asarray(Image.open(tmp_path / "cli.png"), int))) <= 1
    base = ["--checkpoint", str(workdir), "--prompt", "a cat", "--reference", str(tmp_path / "chelsea.jpg")]
    assert sample.main([*base, "--out", str(tmp_path / "two.png"), "--num-images", "2"]) == 0
    assert sample.main([*base, "--out", str(tmp_path / "one.png"), "--seed", "1"]) == 0
    assert sample.main([*base, "--out", str(tmp_path / "again.png"), "--seed", "1"]) == 0
    first, one, again = (Image.open(tmp_path / name) for name in ("two-1.png", "one.png", "again.png"))
    assert np.array_equal(one, again)
    assert np.max(np.abs(np.asarray(first, int) - np.asarray(one, int))) <= 1
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    assert one.text["prompt"] == "a cat"
    assert "chelsea" in one.text["references"]
    assert not list(tmp_path.rglob("*.part"))
    capsys.readouterr()
