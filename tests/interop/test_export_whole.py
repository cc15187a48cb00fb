"""An export is whole or not at all, and what cannot be exported is named."""

import dataclasses
import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext

import jax.numpy as jnp
import pytest
from exports import exporting, same_leaves
from small_dit import random_dit
from small_run import random_weights, small_config

from squeeze_jax.checkpoints.manager import (
    CHECKPOINTS,
    Checkpoints,
    Saved,
    write_config,
    write_weights,
)
from squeeze_jax.checkpoints.trained import load_trained
from squeeze_jax.commands import export, sample
from squeeze_jax.interop import tensors
from squeeze_jax.interop.load import save_dit

torch = pytest.importorskip("torch", reason="PyTorch is not installed: parity tests are skipped")
pytest.importorskip("diffusers")
pytest.importorskip("peft")
torch.set_num_threads(1)  # on matrices this small, threads wait for each other most of the time


def refused(capsys, code, arguments, *words):
    assert export.main([str(a) for a in arguments]) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Traceback" not in error
    for word in words:
        assert word in error, error


def test_what_cannot_be_exported_is_named(capsys, home, tmp_path):
    out = tmp_path / "out"
    config = small_config(home)
    (tmp_path / "unfinished" / CHECKPOINTS).mkdir(parents=True)
    write_config(tmp_path / "unfinished", config)
    refused(capsys, 2, [tmp_path / "unfinished", "--out", out], "no finished checkpoint yet")
    refused(capsys, 2, [home / "run", "--out", home / "base"], "base exists")
    refused(capsys, 2, ["demo", "--out", out, "--lora-format", "kohya"], "has no LoRA")
    refused(capsys, 2, [tmp_path / "absent", "--out", out], "absent", "config.json")
    random = dataclasses.replace(config, model=dataclasses.replace(config.model, dit_weights=None))
    write_weights(tmp_path / "random", *random_weights(random), jnp.float32)
    refused(capsys, 2, [tmp_path / "random", "--out", out], "--merge")
    cached = dataclasses.replace(config.model, dit=dataclasses.replace(config.model.dit, reference_attention="cached"))
    (tmp_path / "cached").mkdir()
    write_config(tmp_path / "cached", dataclasses.replace(config, model=cached))
    refused(capsys, 2, [tmp_path / "cached", "--out", out], "cached reference attention")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cached", "random", "unfinished"]


def test_another_base_is_refused(capsys, home, exported, tmp_path):
    folder = tmp_path / "exported"
    shutil.copytree(exported, folder)
    save_dit(tmp_path / "base", random_dit(seed=1), jnp.float32)
    text = (folder / "config.json").read_text().replace(str(home / "base"), str(tmp_path / "base"))
    (folder / "config.json").write_text(text)
    refused(capsys, 2, [folder, "--out", tmp_path / "out"], "trained on another base", "model.dit_weights")
    assert sample.main(["--prompt", "a", "--out", str(tmp_path / "x.png"), "--checkpoint", str(folder)]) == 2
    assert "another base" in capsys.readouterr().err
    assert not (tmp_path / "out.part").exists() and not (tmp_path / "out").exists()


def test_a_runs_checkpoint_exports_its_average_and_keeps_to_its_base(capsys, home, tmp_path):
    """Of a work folder: the newest step, the weights that sampling takes, and the base that the run wrote down."""
    config, average = random_weights(small_config(home))
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, ema=0.9))
    state = {"trained": {name: leaf + 1 for name, leaf in average.items()}, "average": average}
    for name, base in (("right", load_trained(home / "run").base), ("wrong", "0123456789abcdef")):
        checkpoints = Checkpoints(tmp_path / name, keep=1)
        checkpoints.save(7, state, b"{}", Saved(config, base, 1.0))
        checkpoints.wait()
        checkpoints.close()
        write_config(tmp_path / name, config)
    out = exporting(tmp_path / "right", tmp_path / "out", "--no-check")
    same_leaves(home / "run", out)
    assert json.loads((out / "export.json").read_text())["step"] == 7 and ", step 7" in (out / "README.md").read_text()
    refused(capsys, 2, [tmp_path / "wrong", "--out", tmp_path / "no"], "on another base (fingerprint 0123456789abcdef)")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "right", "wrong"]


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_leaves_nothing(tmp_path, number):
    code = (  # a shell's background job, which these tests may be, begins with SIGINT ignored
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from squeeze_jax.commands import export; sys.exit(export.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "demo", "--out", str(tmp_path / "out")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not (tmp_path / "out.part" / "export.json").exists():  # the certificate is next
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(number)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number and "Traceback" not in said
    assert not list(tmp_path.iterdir())


@contextmanager
def full_disk():
    """Files cannot grow beyond 4 KB: what the system then says comes up on the same ways as a full disk's."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(("problem", "code"), [("disk", 1), ("interrupted", 130)])
def test_an_interrupted_export_leaves_nothing(capsys, monkeypatch, home, tmp_path, problem, code):
    written = []

    def save(arrays, path, metadata=None):
        written.append(path)
        if len(written) == 2 and problem == "interrupted":
            raise KeyboardInterrupt
        with full_disk() if len(written) == 2 else nullcontext():
            write(arrays, path, metadata)

    monkeypatch.setattr(tensors, "save_file", save)
    assert export.main([str(home / "run"), "--out", str(tmp_path / "out"), "--no-check"]) == code
    assert len(written) == 2 and not list(tmp_path.iterdir())
    said = capsys.readouterr().err
    assert said == "interrupted\n" if code == 130 else said.startswith("error: ") and "(File too large)" in said, said
    assert len(said.splitlines()) == 1


write = tensors.save_file
