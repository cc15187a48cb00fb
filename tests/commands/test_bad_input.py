"""Bad input ends in one sentence that names the thing and the way out, exit code 2, and nothing
half-written."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from squeeze_jax.checkpoints.manager import check_leaves, read_weights
from squeeze_jax.commands import extract, sample, train
from squeeze_jax.data import extraction
from squeeze_jax.errors import InputError
from squeeze_jax.evaluation import grids
from squeeze_jax.folder_lock import hold
from squeeze_jax.interop.tensors import TensorFolder

ROOT = Path(__file__).parents[2]
DEMO = str(ROOT / "configs" / "demo.py")


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "cat.png"
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(path)
    return path


def refused(capsys, main, arguments, *words):
    """The command ends with code 2 and one line on stderr that has all the words."""
    assert main([str(a) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Traceback" not in error
    for word in words:
        assert word in error, error
    return error


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--prompt", " "], ["--prompt", "empty"]),
        (["--size", "250x130"], ["250x130", "256x128"]),
        (["--size", "0"], ["0"]),
        (["--tau1", "0.5", "--tau2", "0.9"], ["0.9", "0.5"]),
        (["--tau2", "0.9"], ["tau2 0.9 is larger than tau1 0.83"]),
        (["--tau1", "1.5"], ["tau1 is 1.5; it must be from 0 to 1.1"]),
        (["--steps", "101"], ["--steps is 101", "100"]),
        (["--first-block-threshold", "0.1", "--cache-interval", "2"], ["two caches"]),
        (["--max-order", "3"], ["max_order 3"]),
        (["--num-images", "0"], ["--num-images"]),
        (["--out", "picture.jpg"], [".png"]),
        (["--reference", "absent.png"], ["absent.png"]),
        (["--checkpoint", "absent"], ["absent"]),
    ],
)
def test_sample_refuses(capsys, tmp_path, picture, changes, words):
    arguments = [
        "--prompt",
        "a cat",
        "--out",
        tmp_path / "out.png",
        "--reference",
        picture,
        *changes,
    ]
    refused(capsys, sample.main, arguments, *words)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cat.png"]


def test_sample_refuses_a_place_that_it_cannot_write_to_before_it_draws(capsys, tmp_path, picture):
    refused(
        capsys,
        sample.main,
        ["--prompt", "a", "--out", picture / "out.png"],
        "nothing can be written into",
        "cat.png",
    )


def test_a_truncated_jpeg_is_named(capsys, tmp_path):
    whole = tmp_path / "whole.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(whole)
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(whole.read_bytes()[:700])
    refused(
        capsys,
        sample.main,
        ["--prompt", "a", "--out", tmp_path / "o.png", "--reference", cut],
        "cut.jpg",
    )


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a", "image_paths": ["cat.png"]}, ["image_tgt_path"]),
        (
            {"promt": "a", "image_paths": ["cat.png"], "image_tgt_path": "cat.png"},
            ["promt", "prompt"],
        ),
        ({"prompt": "", "image_paths": ["cat.png"], "image_tgt_path": "cat.png"}, ["empty"]),
        (
            {"prompt": "a", "image_paths": ["../cat.png"], "image_tgt_path": "cat.png"},
            ["../cat.png"],
        ),
        ({"prompt": "a", "image_paths": ["dog.png"], "image_tgt_path": "cat.png"}, ["dog.png"]),
    ],
)
def test_extract_refuses_a_bad_manifest_before_anything_runs(capsys, tmp_path, picture, row, words):
    manifest = tmp_path / "pairs.json"
    manifest.write_text(json.dumps([row]))
    out = tmp_path / "features"
    refused(capsys, extract.main, [manifest, "--out", out, "--config", DEMO], *words)
    assert not out.exists()


def test_train_refuses_an_unknown_preset_and_an_impossible_config(capsys, tmp_path):
    refused(capsys, train.main, [ROOT / "configs" / "demoo.py"], "demoo.py", "demo.py")
    with pytest.raises(SystemExit) as stop:
        train.main([DEMO, "--workdir", str(tmp_path / "w"), "--data.height", "60"])
    assert stop.value.code == 2
    assert "data.height 60" in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("arguments", [["--num-processes", "two"], ["--workdir"]])
def test_train_names_the_flag_whose_value_is_wrong(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        train.main([str(DEMO), *arguments])
    assert stop.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_help_is_of_the_command_and_behind_a_preset_of_its_fields(capsys):
    for arguments, wanted, other in (
        (["--help"], "--coordinator", "--optimizer."),
        ([str(DEMO), "--help"], "--optimizer.", "--coordinator"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            train.main(arguments)
        assert not stop.value.code
        shown = capsys.readouterr().out
        assert wanted in shown
        assert other not in shown.replace("`--optimizer.learning-rate", "").replace(
            "`--coordinator`", ""
        )


def test_an_unknown_override_is_named_with_the_nearest(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main([DEMO, "--optimizer.learning-rat", "1"])
    assert stop.value.code == 2
    assert "learning-rate" in capsys.readouterr().err


def test_weights_of_another_size_are_refused():
    a, b = {"x": np.zeros((2, 3)), "y": np.zeros(1)}, {"x": np.zeros((2, 4)), "z": np.zeros(1)}
    with pytest.raises(InputError, match=r"y is missing.*z is not of this config.*\(2, 4\)"):
        check_leaves(a, b, Path("folder"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--workdir", "s3://bucket/run"], "mount this one"),
        (["--coordinator", "localhost:1"], "give all three"),
        (
            ["--coordinator", "localhost:1", "--num-processes", "2", "--process-id", "2"],
            "must be from 0 to 1",
        ),
    ],
)
def test_train_refuses_what_it_cannot_be_started_with(
    capsys, monkeypatch, tmp_path, arguments, words
):
    monkeypatch.chdir(tmp_path)
    refused(capsys, train.main, [DEMO, *arguments], words)
    assert not list(tmp_path.iterdir())


def test_train_refuses_a_folder_that_another_run_is_at_work_in(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(extraction, "extract_features", lambda *a, **b: None)
    monkeypatch.setattr(grids, "grid_sampler", lambda *a: pytest.fail("the run was begun"))
    with hold(tmp_path / "run.lock", "a run"):
        words = ["a run is at work in it already", "this very process"]
        refused(capsys, train.main, [DEMO, "--workdir", tmp_path], *words)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(InputError, match=r"config\.json"):
        read_weights(tmp_path)


def test_pickles_and_broken_indexes_are_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(InputError, match="pickle"):
        TensorFolder(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with pytest.raises(InputError, match=r"model-1\.safetensors is missing"):
        TensorFolder(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(InputError, match="out of the folder"):
        TensorFolder(tmp_path)
    index.unlink()
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(InputError, match="git lfs pull"):
        TensorFolder(tmp_path)
