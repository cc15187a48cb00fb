"""Every example runs as its first lines say, on few steps."""

import os
import re
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
    ran = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.strip()
    if name == "sample_many":
        assert (tmp_path / "many.png").stat().st_size > 500


@pytest.mark.telling
@pytest.mark.slow
def test_the_quickstart_runs_from_top_to_bottom(tmp_path, environment):
    """A cell that raises fails; what a cell's command has not written, a later cell misses."""
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # none are kept in the file
    sizes = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert re.fullmatch(r"STEPS = \d+ .*\nPAIRS = \d+ .*", sizes.source)
    sizes.source = "STEPS, PAIRS = 2, 32"
    resources = {"metadata": {"path": str(tmp_path)}}
    changes = {"TMPDIR": str(tmp_path), "IPYTHONDIR": str(tmp_path / "ipython"), "XLA_FLAGS": ""}
    run = client.NotebookClient(notebook, timeout=1800, resources=resources)
    run.execute(env=environment | changes)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 5
    text = "".join(output.get("text", "") for output in outputs)
    assert "step 4 of 25: MLLM\n" in text and "step 25 of 25: VAE\n" in text
    assert "squeeze_pipeline.py" in text
    (difference,) = re.findall(r"largest difference: ([\d.]+) of 255", text)
    assert float(difference) < 0.5
