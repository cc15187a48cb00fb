"""A few of the mutations that `benchmarks/fuzz.py` makes by the thousand, and what it found."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from public_sets import sample_files, uno_row, write_uno, write_webdataset
from tiny import tiny_config

from squeeze_jax.data.images import save_png
from squeeze_jax.data.manifest import read_manifest
from squeeze_jax.data.sources import open_source
from squeeze_jax.data.sources.contract import Options
from squeeze_jax.errors import LONGEST, InputError
from squeeze_jax.sampling import png_metadata
from squeeze_jax.sampling.settings import Settings, resolve

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.filterwarnings("ignore")  # of libraries, about files that are spoilt
FEW = 25
"""Mutations of a target: some seconds for all."""


@pytest.fixture(scope="module")
def fuzz():
    """The script as a module; its neighbours are found while it is imported."""
    sys.path.append(str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("fuzz", BENCHMARKS / "fuzz.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(BENCHMARKS))


TARGETS = [
    "json_list", "json_lines", "image_folder", "subjects200k", "uno1m", "webdataset", "tokenizers",
    "settings", "records", "checkpoints",
]  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
def test_a_few_of_each(fuzz, target, monkeypatch):
    assert set(TARGETS) == set(fuzz.TARGETS)
    monkeypatch.setattr(fuzz, "SECONDS", 120.0)  # no timings in tests
    attempt = fuzz.make_attempt(target)
    outcomes = [fuzz.run_one(attempt, seed) for seed in range(FEW)]
    assert {outcome.ended for outcome in outcomes} == {"loaded", "refused"}, outcomes


def test_the_script_notices_what_it_looks_for(fuzz):
    """An error that is none of ours, a flood of words, a panic."""

    def fail(error):
        def attempt(rng, folder):
            raise error

        return fuzz.run_one(attempt, 0).ended

    flood = InputError("x")
    flood.args = ("y" * 3000,)
    assert fail(KeyError("a")) == "TRACEBACK KeyError"
    assert fail(BaseException()) == "TRACEBACK BaseException"
    assert fail(flood) == "FLOOD OF WORDS"
    assert fail(InputError("one sentence")) == "refused"


def test_messages_are_short_and_can_be_printed():
    said = str(InputError("a \ud800 \x1b[2J b\n" + "c" * 5000 + " the way out"))
    first, second = said.split("\n")
    assert first == r"a \ud800 \x1b[2J b"
    assert len(second) < LONGEST and second.endswith("the way out")


def test_warnings_of_a_list_are_short_and_can_be_printed(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "p.png")
    good = {"prompt": "a", "image_paths": [], "image_tgt_path": "p.png"}
    bad = [good | {"image_tgt_path": "\ud800"}, good | {"z" * 5000: 1}]
    (tmp_path / "list.json").write_text(json.dumps([good, *bad]))
    found = read_manifest(tmp_path / "list.json", need_targets=True, skip_bad=True)
    assert len(found.warnings) == 3
    assert max(len(line.encode()) for line in found.warnings) < LONGEST + 20


def test_folders_in_the_place_of_files_are_named(tmp_path):
    write_uno(tmp_path / "uno", {1: [uno_row(1, 0)]})
    write_webdataset(tmp_path / "web", [sample_files(0)])
    for kind, file in (("uno1m", "uno/labels/split1.json"), ("webdataset", "web/000000.tar")):
        path = tmp_path / file
        path.unlink()
        path.mkdir()
        folder = tmp_path / file.split("/")[0]
        with pytest.raises(InputError, match=f"{path.name}: (a folder|cannot be opened)"):
            open_source(f"{kind}:{folder}", Options())


def written(path, **changes):
    resolved = resolve(Settings(seed=7), tiny_config())
    references = [png_metadata.Reference("caf\udce9.png", 16, 16)]  # a name that is no UTF-8
    text = png_metadata.text_of("a cat", references, "demo", 3, resolved, 0, [])
    save_png(path, np.zeros((16, 16, 3), np.uint8), text | changes)
    return path


def test_settings_without_measure_end_soon(tmp_path):
    found = png_metadata.read(written(tmp_path / "a.png", num_images=2**63))
    assert found.settings.seeds == [7], "one image, its own"
    with pytest.raises(InputError, match="cannot be read"):
        png_metadata.read(written(tmp_path / "b.png", tau1=10**400))


def test_a_name_that_is_no_unicode_is_kept_inside_a_picture(tmp_path):
    found = png_metadata.read(written(tmp_path / "a.png"))
    assert found.references[0].path == r"caf\udce9.png"
