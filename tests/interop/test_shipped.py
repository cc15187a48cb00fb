"""What ships with the package: found by name, small, and safetensors alone."""

from pathlib import Path

import pytest

from squeeze_jax.interop.load import DEMO, SHIPPED, checkpoint_folder, encoder_folder

PACKAGE = DEMO.parent


def test_a_name_stands_for_a_shipped_folder_and_a_path_for_itself():
    assert checkpoint_folder(None) == checkpoint_folder("demo") == DEMO / "system"
    assert checkpoint_folder(Path("runs/demo")) == Path("runs/demo")
    for name, folder in SHIPPED.items():
        assert checkpoint_folder(name) == folder / "system"
        assert encoder_folder(name, "mllm") == folder / "mllm"


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_miniature_is_whole(name):
    for part in ("autoencoder", "mllm", "system"):
        assert (SHIPPED[name] / part / "config.json").is_file()
        assert list((SHIPPED[name] / part).glob("*.safetensors"))
    assert list((SHIPPED[name] / "references").glob("*.png"))


def test_weights_have_at_most_20_mb_in_all_and_are_no_pickles():
    files = [path for path in PACKAGE.rglob("*") if path.is_file()]
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert sum(path.stat().st_size for path in weights) <= 20e6
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pkl", ".pth", ".npz")]
