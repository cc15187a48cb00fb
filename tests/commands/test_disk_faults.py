"""Disks that fill up, become read-only or vanish while a command writes: one sentence, nothing
half-written under a final name, and the next start goes on.

| | full | read-only | vanished |
|---|---|---|---|
| checkpoint (`train`) | code 1, step 2 stays, goes on from it | the same | the same |
| `extract` | code 1, the first shard stays, goes on behind it | the same | the same |
| `export` | code 1, no folder, made anew | the same | the same |
| `evaluate` | code 1 or 2, the first picture stays, the other is drawn | the same | the same |
| `sample` | code 2, no picture, drawn anew | the same | the same |

A disk is a small tmpfs. Read-only and vanished ones are mounted over it: what is open stays open,
as on a network disk; new names meet the fault.
"""

import json
import os
import subprocess
from contextlib import suppress
from pathlib import Path

import jax
import pytest
from fake_encoders import LAYERS, WIDTH, FakeEncoders, some_examples
from PIL import Image
from tiny import tiny_config

from squeeze_jax.checkpoints.manager import Checkpoints, read_weights
from squeeze_jax.commands import evaluate, export, sample
from squeeze_jax.commands.run import guarded
from squeeze_jax.config import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    StageConfig,
    TrainingConfig,
)
from squeeze_jax.data import images
from squeeze_jax.data.record_writer import extract
from squeeze_jax.data.records import FeatureSource
from squeeze_jax.evaluation import generate
from squeeze_jax.export import card
from squeeze_jax.models.aggregator import AggregatorConfig
from squeeze_jax.training.loop import train

FAULTS = ("full", "read-only", "vanished")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.telling,
    pytest.mark.filterwarnings("ignore::UserWarning"),  # Orbax, about restoring without shardings
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
SIZE = 64 * 2**20


def mount(*arguments):
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, check=False)
    return done.returncode == 0


class Disk:
    """A folder on a disk of its own, with the faults."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.mounts = folder, 0

    def fail(self, fault: str) -> None:
        if fault == "full":
            # Without a buffer: what it still held would be refused once more, by closing.
            with (self.folder / "filler").open("wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(bytes(4096))
            return
        made = mount("--bind", self.folder, self.folder) if fault == "read-only" else True
        options = "remount,ro,bind" if fault == "read-only" else "ro"
        kind = () if fault == "read-only" else ("-t", "tmpfs")
        source = () if fault == "read-only" else ("none",)
        assert made and mount(*kind, "-o", options, *source, self.folder)
        self.mounts = 1

    def mend(self) -> None:
        for _ in range(self.mounts):
            subprocess.run(["umount", "-l", self.folder], check=True)
        self.mounts = 0
        (self.folder / "filler").unlink(missing_ok=True)

    def names(self) -> list[str]:
        # What could not be removed any more is removed by the next start.
        return sorted(
            path.relative_to(self.folder).as_posix()
            for path in self.folder.rglob("*")
            if path.is_file()
        )


@pytest.fixture(scope="module", autouse=True)
def _optax_promotes():
    """Optax itself computes 0.9 ** (an integer count), which strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or not mount("-t", "tmpfs", "-o", f"size={SIZE}", "none", folder):
        pytest.skip("no disks can be mounted here")
    made = Disk(folder)
    yield made
    made.mend()
    subprocess.run(["umount", "-l", folder], check=True)


def refused(capsys, disk, run, codes=(1,)):
    """The command ends with one sentence."""
    capsys.readouterr()
    code = run()
    said = capsys.readouterr().err
    disk.mend()
    assert code in codes, said
    assert said.startswith("error: ") and said.count("\n") == 1, said
    assert "Traceback" not in said
    return said


def failing(disk, fault, original, call=1):
    """`original`, before whose call number `call` the disk fails."""
    calls = []

    def wrapped(*arguments, **options):
        calls.append(None)
        if len(calls) == call:
            disk.fail(fault)
        return original(*arguments, **options)

    return wrapped


CONFIG = tiny_config(
    aggregator=AggregatorConfig(
        layers=tuple(range(LAYERS)), width=WIDTH, out_width=24, heads=2, mlp_width=24,
        refiner_blocks=1,
    ),
    data=DataConfig(height=32, width=32, reference_long_side=32, batch_per_chip=1),
    training=TrainingConfig(
        stages=(StageConfig(steps=4, references=True),), validate_every=2, sample_every=0
    ),
    checkpoint=CheckpointConfig(every=2),
    log=LogConfig(every=1),
)  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_checkpoint(fault, disk, tmp_path, capsys, monkeypatch):
    for split, count in (("train", 12), ("held_out", 8)):
        extract(some_examples(count), FakeEncoders(), tmp_path / split, target_size=(32, 32),
                reference_long_side=32)  # fmt: skip
    workdir, said = disk.folder / "run", []

    def run():
        return guarded(lambda: train(CONFIG, workdir, tmp_path, say=said.append) and None)

    with monkeypatch.context() as patched:
        save = Checkpoints.save

        def save_alone(self, *arguments):
            self.wait()
            failing_save(self, *arguments)

        failing_save = failing(disk, fault, save, 2)
        patched.setattr(Checkpoints, "save", save_alone)
        refused(capsys, disk, run)
    assert read_weights(workdir)[2] == 2
    assert run() == 0
    assert f"continuing {workdir} from step 2" in said
    assert read_weights(workdir)[2] == 4
    rows = [json.loads(row) for row in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]


@pytest.mark.parametrize("fault", FAULTS)
def test_extract(fault, disk, capsys, monkeypatch):
    out = disk.folder / "records"
    options = {"target_size": (32, 32), "reference_long_side": 32, "examples_per_shard": 4}

    class Encoders(FakeEncoders):
        hidden_states = failing(disk, fault, FakeEncoders.hidden_states, 2)

    def run():
        extract(some_examples(10), Encoders(), out, **options)

    refused(capsys, disk, lambda: guarded(run))
    whole = [name for name in disk.names() if ".array_record-" in name and "part" not in name]
    assert len(whole) == 2, "the first shard with its summary"
    encoders = FakeEncoders()
    extract(some_examples(10), encoders, out, **options)
    assert len(encoders.prompts) == 6, "the first shard was kept"
    assert not any(name.endswith(".part") for name in disk.names())
    source = FeatureSource(out)
    assert [source[i].prompt for i in range(10)] == [one.prompt for one in some_examples(10)]


@pytest.mark.parametrize("fault", FAULTS)
def test_export(fault, disk, capsys, monkeypatch):
    out = disk.folder / "exported"

    def run():
        return export.main(["demo", "--out", str(out), "--no-check"])

    with monkeypatch.context() as patched:
        patched.setattr(card, "write_card", failing(disk, fault, card.write_card))
        capsys.readouterr()
        assert run() == 1
        disk.mend()
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1, said
    assert not out.exists()
    assert run() == 0
    assert [path.name for path in disk.folder.iterdir()] == ["exported"]


@pytest.mark.parametrize("fault", FAULTS)
def test_evaluate(fault, disk, tmp_path, capsys, monkeypatch):
    rows = [{"prompt": f"critter {i}", "image_paths": []} for i in range(2)]
    (tmp_path / "prompts.json").write_text(json.dumps(rows))
    out = disk.folder / "set"

    def run():
        return evaluate.main(
            ["--suite", "prompts", str(tmp_path / "prompts.json"), "--steps", "1", "--at-once",
             "1", "--out", str(out), "--parallel.fsdp", "1"]
        )  # fmt: skip

    with monkeypatch.context() as patched:
        patched.setattr(generate, "save_png", failing(disk, fault, generate.save_png, 2))
        refused(capsys, disk, run, codes=(1, 2))
    kept = (out / "0000-0.png").read_bytes()
    assert not (out / "0001-0.png").exists()
    assert run() == 0
    assert (out / "0000-0.png").read_bytes() == kept
    with Image.open(out / "0001-0.png") as picture:
        picture.load()


@pytest.mark.parametrize("fault", FAULTS)
def test_sample(fault, disk, capsys, monkeypatch):
    def run():
        return sample.main(
            ["--prompt", "a critter", "--steps", "1", "--cfg-scale", "1", "--parallel.fsdp", "1",
             "--out", str(disk.folder / "a" / "b.png")]
        )  # fmt: skip

    with monkeypatch.context() as patched:
        patched.setattr(images, "save_png", failing(disk, fault, images.save_png))
        refused(capsys, disk, run, codes=(2,))
    assert disk.names() == []
    assert run() == 0
    assert disk.names() == ["a/b.png"]
