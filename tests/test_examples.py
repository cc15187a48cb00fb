"""Every example runs as its first lines say, on few steps."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
FLAGS = {
    "functional_training": ("--steps", "2", "--examples", "32"),
    "own_aggregator": (),
    "own_solver": (),
    "population_of_loras": ("--members", "2", "--steps", "2"),
    "sample_many": ("--count", "2", "--steps", "3", "--out", "many.png"),
}


def test_every_example_is_run_here():
    assert set(FLAGS) == {path.stem for path in EXAMPLES.glob("*.py")}


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    changes = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(EXAMPLES.parent)}
    return os.environ | changes | {"SQUEEZE_JAX_CACHE": str(tmp_path_factory.mktemp("cache"))}


@pytest.mark.telling
@pytest.mark.slow
@pytest.mark.parametrize("name", FLAGS)
def test_an_example_runs(name, tmp_path, environment):
    command = [sys.executable, EXAMPLES / f"{name}.py", *FLAGS[name]]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.strip()
    if name == "sample_many":
        assert (tmp_path / "many.png").stat().st_size > 500
