"""`sample.py` as a user runs it: the same bytes again, what is said and stored, an interruption."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from squeeze_jax.commands import sample
from squeeze_jax.sampling import png_metadata as embedded
from squeeze_jax.sampling.pipeline import Pipeline

ROOT = Path(__file__).parents[2]
CRITTER = ROOT / "squeeze_jax" / "demo" / "references" / "critter-0.png"
ASKED = ["--prompt", "a critter on the beach", "--reference", str(CRITTER)]
# A shell's background job, which these tests may be, begins with SIGINT ignored.
CODE = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
    "from squeeze_jax.commands.sample import main; sys.exit(main(sys.argv[1:]))"
)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return {
        **os.environ,
        "SQUEEZE_JAX_CACHE": str(tmp_path_factory.mktemp("cache")),
        "PYTHONUNBUFFERED": "1",
    }


@pytest.mark.telling
@pytest.mark.slow
def test_the_same_bytes_whatever_the_global_random_state(tmp_path, environment):
    drawn = []
    for number in (1, 2):
        out = tmp_path / f"{number}.png"
        command = [
            sys.executable,
            "-c",
            CODE,
            *ASKED,
            "--steps",
            "6",
            "--seed",
            "3",
            "--out",
            str(out),
        ]
        seeded = {**environment, "PYTHONHASHSEED": str(number)}
        done = subprocess.run(
            command, env=seeded, cwd=ROOT, capture_output=True, text=True, check=True
        )
        drawn.append(out.read_bytes())
    assert drawn[0] == drawn[1]
    assert "stages: MLLM 2 steps, MLLM + VAE 2 steps, VAE 2 steps" in done.stdout
    assert any("VAE" in line and "6/6" in line for line in done.stdout.splitlines()), (
        "the bar has the stage and the step"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.png", "2.png"]


def test_many_images_are_drawn_some_at_a_time(tmp_path, environment, monkeypatch, capsys):
    """17: two runs of 9, whose last image comes twice and is kept once."""
    monkeypatch.setenv("SQUEEZE_JAX_CACHE", environment["SQUEEZE_JAX_CACHE"])
    wide = tmp_path / "given" / "wide.png"
    wide.parent.mkdir()
    with Image.open(CRITTER) as critter:
        height = critter.height
        critter.resize((2 * critter.width, height)).save(wide)
    seen, begin = [], Pipeline.begin

    def watched(self, ready, seeds):
        seen.append(list(seeds))
        return begin(self, ready, seeds)

    monkeypatch.setattr(Pipeline, "begin", watched)
    arguments = ["--steps", "2", "--cfg-scale", "1", "--num-images", "17", "--seed", str(2**32 - 1)]
    arguments += ["--tau1", "1.1", "--tau2", "0.1", "--parallel.fsdp", "1"]
    asked = ["--prompt", "two critters", "--reference", str(wide), "--reference", str(CRITTER)]
    out = tmp_path / "out"
    assert sample.main([*asked, *arguments, "--out", str(out / "o.png")]) == 0
    assert seen == [[2**32 - 1, *range(8)], [*range(8, 16), 15]]
    assert sorted(p.name for p in out.iterdir()) == sorted(f"o-{i}.png" for i in range(17))
    said = capsys.readouterr().out
    assert said.count("picture: ") == 17
    # How many references, which is the first, and their sizes (height x width).
    shown = [line for line in said.splitlines() if line.startswith("reference ")]
    assert shown == [
        f"reference 1: {wide} ({height}x{2 * height})",
        f"reference 2: {CRITTER} ({height}x{height})",
    ]
    assert embedded.read(out / "o-3.png").references == (
        embedded.Reference(str(wide), height, 2 * height),
        embedded.Reference(str(CRITTER), height, height),
    )
    assert (
        "stages: MLLM + VAE 2 steps\nwarning: no step has VAE: none of 2 begins at 0 ≤ t < 0.1;"
        in said
    )
    settings = embedded.read(out / "o-16.png").settings
    assert (settings.seed, settings.tau1, settings.tau2) == (15, 1.1, 0.1)
    with Image.open(out / "o-16.png") as image:
        assert json.loads(image.info["stages"]) == {"MLLM": 0, "MLLM + VAE": 2, "VAE": 0}
    assert len({path.read_bytes() for path in out.iterdir()}) == 17


def test_an_interruption_ends_in_a_word_and_without_files(tmp_path, environment):
    out = tmp_path / "out.png"
    command = [
        sys.executable,
        "-c",
        CODE,
        *ASKED,
        "--steps",
        "100",
        "--num-images",
        "16",
        "--out",
        str(out),
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, cwd=ROOT, text=True, **pipes) as run:
        assert run.stdout is not None
        while not run.stdout.readline().startswith("stages:"):
            assert run.poll() is None
        run.send_signal(signal.SIGINT)
        _, error = run.communicate(timeout=120)
    assert run.returncode == 130
    assert error.strip().endswith("interrupted") and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []
