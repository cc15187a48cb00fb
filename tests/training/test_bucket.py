"""A work folder in a bucket, on a server that speaks Google Cloud Storage's interface: killed after
any write nothing half-written is read, and the run goes on with the same bits."""

import dataclasses
import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from fake_encoders import LAYERS, WIDTH, FakeEncoders, some_examples
from tiny import tiny_config
from training_runs import ended, free_address

from squeeze_jax.checkpoints.manager import MARKER, Checkpoints, Saved, read_config, read_weights
from squeeze_jax.config import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    StageConfig,
    TrainingConfig,
)
from squeeze_jax.data.record_writer import extract
from squeeze_jax.data.records import FeatureSource
from squeeze_jax.errors import InputError
from squeeze_jax.models.aggregator import AggregatorConfig
from squeeze_jax.storage import as_path
from squeeze_jax.training.loop import train

pytest.importorskip("gcsfs")
pytest.importorskip("gcp_storage_emulator")

from object_store import BUCKET

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # Orbax, about restoring without shardings
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # google.auth, about this Python's age
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # sockets
]
CONFIG = tiny_config(
    aggregator=AggregatorConfig(
        layers=tuple(range(LAYERS)),
        width=WIDTH,
        out_width=24,
        heads=2,
        mlp_width=24,
        refiner_blocks=1,
    ),
    data=DataConfig(height=32, width=32, reference_long_side=32, batch_per_chip=1),
    training=TrainingConfig(
        stages=(StageConfig(steps=4, references=True),), validate_every=2, sample_every=0
    ),
    checkpoint=CheckpointConfig(every=2, keep=1),
    log=LogConfig(every=1, tensorboard=False),
)
"""Four steps, saved after the second and the fourth, of which the last is kept."""


@pytest.fixture(scope="module", autouse=True)
def _optax_promotes():
    """Optax itself computes 0.9 ** (an integer count), which strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def store():
    from object_store import serve

    with serve() as made:
        yield made


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    out = tmp_path_factory.mktemp("features")
    for split, count in (("train", 12), ("held_out", 8)):
        extract(
            some_examples(count),
            FakeEncoders(),
            out / split,
            target_size=(32, 32),
            reference_long_side=32,
        )
    return out


def metrics(workdir):
    """Rows of a run by step, without what depends on time."""
    rows = [json.loads(row) for row in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row.get("loss"), row.get("validation_loss")) for row in rows]


def assert_same_run(workdir, other):
    (_, found, step), (_, wanted, there) = read_weights(workdir), read_weights(other)
    assert step == there
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)
    assert read_config(workdir) == read_config(other)
    assert metrics(workdir) == metrics(other)


@pytest.fixture(scope="module")
def on_disk(features, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    train(CONFIG, workdir, features, say=lambda text: None)
    return workdir


@pytest.fixture(scope="module")
def run(store, features):
    """A run in the bucket, and all its writes in order."""
    before = len(store.writes)
    train(CONFIG, as_path("gs://bucket/run"), features, say=lambda text: None)
    return store.writes[before:]


@pytest.mark.telling
@pytest.mark.slow
def test_a_run_in_a_bucket_is_the_one_on_a_disk(run, store, on_disk):
    assert_same_run(as_path("gs://bucket/run"), on_disk)
    names = [name for name, content, _ in run if content is not None]
    assert not any(name.endswith(".part") for name in names)
    ended = len(names) - 1 - names[::-1].index(f"run/checkpoints/4/{MARKER}")
    assert all(not name.startswith("run/checkpoints/4/") for name in names[ended + 1 :])
    assert store.names(f"run/checkpoints/4/{MARKER}"), "the marker is written last"
    assert not store.names("run/checkpoints/2/"), "checkpoint.keep"


@pytest.mark.telling
@pytest.mark.slow
def test_another_run_begins_with_weights_from_a_bucket(run, features, on_disk, tmp_path):
    stages = (StageConfig(steps=1, references=True),)
    config = dataclasses.replace(
        CONFIG, training=dataclasses.replace(CONFIG.training, stages=stages)
    )
    for name, start in (("a", as_path("gs://bucket/run")), ("b", on_disk)):
        train(config, tmp_path / name, features, start_from=start, say=lambda text: None)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert read_config(tmp_path / "a").training.steps_before == 4


@pytest.mark.telling
@pytest.mark.slow
def test_after_any_write_the_newest_whole_checkpoint_is_what_is_read(store):
    """Of two checkpoints, of which the second removes the first. What a killed process leaves is
    what the bucket held after one of its writes."""
    folder = as_path("gs://bucket/two")
    states = {step: {"a": jnp.arange(8.0) + step, "b": jnp.full(3, step)} for step in (1, 2)}

    def save(step):
        with_rest = Saved(CONFIG, "base", float(step))
        checkpoints = Checkpoints(folder, keep=1)
        checkpoints.save(step, states[step], b'{"place": %d}' % step, with_rest)
        checkpoints.wait()
        checkpoints.close()

    before = len(store.writes)
    for step in states:
        save(step)
    writes, seen = store.writes[before:], []
    for count in range(len(writes) + 1):
        store.show(writes[:count])
        checkpoints = Checkpoints(folder, keep=1)
        step = checkpoints.latest()
        seen.append(step or 0)
        if step is not None:
            saved, place = checkpoints.about(step)
            assert saved.productive_seconds == step
            assert json.loads(place) == {"place": step}
            found = checkpoints.restore(step, states[step])
            for name, leaf in states[step].items():
                np.testing.assert_array_equal(found[name], leaf)
        checkpoints.close()
    assert seen == sorted(seen), "a newer one never goes again"
    assert set(seen) == {0, 1, 2}
    store.show(writes[: seen.index(2) - 1])  # killed before the marker: the step is saved again
    save(2)
    with_checkpoints = Checkpoints(folder, keep=1)
    assert with_checkpoints.latest() == 2
    np.testing.assert_array_equal(with_checkpoints.restore(2, states[2])["a"], states[2]["a"])
    with_checkpoints.close()


@pytest.mark.telling
@pytest.mark.slow
@pytest.mark.parametrize("content", [b"", b" "], ids=["empty", "one byte"])
def test_a_folder_that_lists_itself_keeps_its_checkpoints(store, content):
    """Consoles and mounts make an object for a folder: one that is not empty is listed as its own
    first entry."""
    folder, state = as_path("gs://bucket/listed"), {"a": jnp.arange(8.0)}
    store.show([])
    checkpoints = Checkpoints(folder, keep=1)
    checkpoints.save(1, state, b"{}", Saved(CONFIG, "base", 1.0))
    checkpoints.wait()
    checkpoints.close()
    about, mark = store.writes[-1][2], "listed/checkpoints/"
    store._create(BUCKET, mark, content, {**about, "name": mark, "size": str(len(content))})
    there = list((folder / "checkpoints").iterdir())
    assert len(there) == 2 and (folder / "checkpoints" in there) == bool(content)
    again = Checkpoints(folder, keep=1)
    assert store.names(f"listed/checkpoints/1/{MARKER}"), "nothing was removed"
    if not content:  # Orbax takes the other kind for a file
        assert again.latest() == 1
        np.testing.assert_array_equal(again.restore(1, state)["a"], state["a"])
    again.close()


def resume_after(count, run, store, features, on_disk):
    store.show(run[:count])
    workdir = as_path("gs://bucket/run")
    train(CONFIG, workdir, features, say=lambda text: None)
    assert_same_run(workdir, on_disk)


@pytest.mark.telling
@pytest.mark.slow
def test_killed_around_a_checkpoint_a_run_goes_on_with_the_same_bits(
    run, store, features, on_disk
):
    names = [name for name, _, _ in run]
    first = names.index(f"run/checkpoints/2/{MARKER}")
    for count in (first, first + 1):
        resume_after(count, run, store, features, on_disk)


@pytest.mark.slow
def test_killed_after_any_write_a_run_goes_on_with_the_same_bits(run, store, features, on_disk):
    for count in range(len(run) + 1):
        resume_after(count, run, store, features, on_disk)


@pytest.mark.telling
@pytest.mark.slow
def test_a_process_killed_while_it_saves_goes_on_when_it_is_started_again(
    store, start, records, tmp_path
):
    """SIGKILL, sent by the server itself once it has an object of the checkpoint of step 4."""
    code, said = ended(start(tmp_path))
    assert code == 0, said
    process = start("gs://bucket/killed")

    def kill(count):
        if store.writes[-1][0].startswith("killed/checkpoints/4/state/"):
            process.kill()

    store.watch = kill
    code, said = ended(process)
    store.watch = lambda count: None
    assert code == -signal.SIGKILL, said
    assert not store.names(f"killed/checkpoints/4/{MARKER}")
    code, said = ended(start("gs://bucket/killed"))
    assert code == 0, said
    assert "continuing gs://bucket/killed from step 2" in said
    workdir = as_path("gs://bucket/killed")
    (_, found, step), (_, wanted, _) = read_weights(workdir), read_weights(tmp_path)
    assert step == 8
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)
    assert [row[0] for row in metrics(workdir)] == [row[0] for row in metrics(tmp_path)]


@pytest.mark.slow
def test_two_processes_write_one_run_into_a_bucket(store, start, tmp_path):
    """The run that two processes write on a disk, bit for bit."""
    for place in ("gs://bucket/both", tmp_path):
        address = free_address()
        processes = [
            start(place, address=address, count=2, index=i, batch_per_chip=1, steps=2)
            for i in range(2)
        ]
        for process in processes:
            code, said = ended(process)
            assert code == 0, said
    workdir = as_path("gs://bucket/both")
    (_, found, step), (_, wanted, _) = read_weights(workdir), read_weights(tmp_path)
    assert step == 2
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)
    assert [row[0] for row in metrics(workdir)] == [row[0] for row in metrics(tmp_path)]


@pytest.mark.telling
@pytest.mark.slow
def test_a_damaged_checkpoint_is_set_aside_in_the_bucket(run, store, features, on_disk):
    names = [name for name, _, _ in run]
    last = names.index(f"run/checkpoints/4/{MARKER}")
    store.show(run[: last + 1])  # both checkpoints are there
    for name in store.names("run/checkpoints/4/state/"):
        (epath.Path("gs://bucket") / name).write_bytes(b"")
    said = []
    train(CONFIG, as_path("gs://bucket/run"), features, say=said.append)
    assert any("it now lies in gs://bucket/run/damaged/4" in line for line in said), said
    assert store.names("run/damaged/4/state/")
    assert_same_run(as_path("gs://bucket/run"), on_disk)


@pytest.mark.telling
@pytest.mark.slow
def test_a_bucket_out_of_reach_damages_nothing(run, store, features, monkeypatch):
    store.show(run)

    def fail(self, step, like):
        raise ValueError("UNAVAILABLE: Error reading gs://bucket/run: no route to host")

    monkeypatch.setattr(Checkpoints, "restore", fail)
    with pytest.raises(InputError, match=r"cannot be read now .*see to the bucket"):
        train(CONFIG, as_path("gs://bucket/run"), features, say=lambda text: None)
    assert store.names(f"run/checkpoints/4/{MARKER}")
    assert not store.names("run/damaged")


@pytest.mark.telling
@pytest.mark.slow
def test_records_are_read_from_the_bucket(features, store):
    for path in (features / "train").iterdir():
        (epath.Path("gs://bucket/features/train") / path.name).write_bytes(path.read_bytes())
    here, there = FeatureSource(features / "train"), FeatureSource("gs://bucket/features/train")
    assert len(here) == len(there) == 12
    for i in (0, 7):
        for a, b in zip(jax.tree.leaves(here[i]), jax.tree.leaves(there[i])):
            np.testing.assert_array_equal(a, b)


@pytest.mark.telling
@pytest.mark.slow
def test_weights_files_are_not_read_from_a_bucket(store):
    (epath.Path("gs://bucket/exported") / "lora.safetensors").write_bytes(b"\0" * 16)
    from squeeze_jax.checkpoints.trained import start_kind

    with pytest.raises(InputError, match="read from a disk; copy them there"):
        start_kind(as_path("gs://bucket/exported/lora.safetensors"))
