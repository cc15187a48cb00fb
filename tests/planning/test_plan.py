"""`plan`: bad input is named; the compiler itself runs where it is installed (pytest -m slow)."""

import json
import os
import subprocess
import sys

import pytest

from squeeze_jax.commands import plan

PRESET = "configs/flux_stage2.py"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "v9:2x2"], "no chip 'v9'; choose one of v4, v5e, v5p, v6e"),
        (["--topology", "v5p:2x2x1", "--mesh", "fsdp:4"], "write data=1,fsdp=8,tensor=1"),
        (["--topology", "v5p:2x2x1", "--mesh", "model=4"], "--mesh has no axis model"),
    ],
)
def test_what_cannot_be_planned_is_named(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert plan.main([PRESET, *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_full_step_fits_one_host_of_v5p(tmp_path):
    pytest.importorskip("libtpu", reason="needs the `tpu` extra")
    out = tmp_path / "plan.json"
    command = [sys.executable, "-m", "squeeze_jax", "plan", PRESET, "--topology", "v5p:2x2x1", "--json", out]
    subprocess.run(command, check=True, timeout=600)
    report = json.loads(out.read_text())
    memory = report["hbm_per_chip"]
    assert report["fits"]
    assert memory["total"] == memory["arguments"] + memory["temporaries"] + memory["output"] - memory["aliased"]
    assert memory["total"] < 24 * 2**30
    assert report["largest_collective"] < 200e6
