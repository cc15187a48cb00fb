"""Object storage, simulated: no rename, no random writes, an object appears whole; the records are those of a disk."""

import os
from pathlib import Path

import pytest
from etils import epath
from etils.epath import backend, gpath
from fake_encoders import FakeEncoders, some_examples
from tiny import tiny_config

from squeeze_jax.data import records as features
from squeeze_jax.data.record_writer import extract
from squeeze_jax.data.records import FeatureSource, read_metadata
from squeeze_jax.errors import InputError
from squeeze_jax.sharding import make_mesh
from squeeze_jax.storage import reachable, remove_parts, write_whole
from squeeze_jax.training.batches import make_batches

OPTIONS = {"target_size": (64, 64), "reference_long_side": 64, "examples_per_shard": 4}


class Bucket(backend._OsPathBackend):
    """`gs://x/y` as a local folder's `x/y`; whatever object storage cannot do is an error."""

    def __init__(self, folder: Path):
        self.folder, self.uploads = folder, []

    def local(self, path):
        text = os.fspath(path)
        return str(self.folder / text.removeprefix("gs://")) if text.startswith("gs://") else text

    def open(self, path, mode):
        assert mode.strip("bt") in ("r", "w"), "objects are read, or written whole"
        return super().open(self.local(path), mode)

    def exists(self, path):
        return super().exists(self.local(path))

    def isdir(self, path):
        return super().isdir(self.local(path))

    def listdir(self, path):
        return super().listdir(self.local(path))

    def makedirs(self, path, **options):
        return super().makedirs(self.local(path), **options)

    def remove(self, path):
        return super().remove(self.local(path))

    def stat(self, path):
        return super().stat(self.local(path))

    def copy(self, path, dst, overwrite):
        self.uploads.append(os.fspath(dst))
        return super().copy(self.local(path), self.local(dst), overwrite)

    def rename(self, path, dst):
        raise AssertionError("a rename in object storage is a copy, and not atomic")

    replace = rename


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """The library that reads ArrayRecord speaks to Google itself, so its paths are translated too."""
    made = Bucket(tmp_path / "bucket")
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", made)
    monkeypatch.setattr(gpath, "_GCS_BACKENDS", frozenset([made]))
    read = features.array_record_module.ArrayRecordReader
    monkeypatch.setattr(features.array_record_module, "ArrayRecordReader", lambda path: read(made.local(path)))
    return made


def contents(folder: Path):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_records_in_a_bucket_are_those_on_a_disk(bucket, tmp_path):
    done = [extract(some_examples(10), FakeEncoders(), "gs://b/records", shard=(i, 2), **OPTIONS) for i in (0, 1)]
    assert done[0] is None
    extract(some_examples(10), FakeEncoders(), tmp_path / "disk", **OPTIONS)
    assert contents(bucket.folder / "b" / "records") == contents(tmp_path / "disk")
    assert len(bucket.uploads) == len(set(bucket.uploads)), "each object is written once"
    order = [Path(path).name for path in bucket.uploads]
    for name in order:
        if ".array_record-" in name and not name.endswith(".json"):
            assert order.index(name) < order.index(f"{name}.json"), "a shard's summary says that it is whole"
    assert order[-1] == "squeeze.json"
    assert read_metadata("gs://b/records").summary.records == 10
    assert len(FeatureSource("gs://b/records")) == 10


def test_the_command_and_the_training_keep_a_buckets_name(bucket, monkeypatch, capsys):
    from squeeze_jax.commands import extract as command
    from squeeze_jax.data import extraction as of_commands

    asked = []
    monkeypatch.setattr(of_commands, "extract_features", lambda config, out, **how: asked.append(str(out)))
    monkeypatch.setattr(command, "setup", lambda: None)
    assert command.main(["pairs.json", "--out", "gs://b/records", "--config", "configs/demo.py"]) == 0
    assert asked == ["gs://b/records"], "a plain Path would make one slash of two"
    assert "records: gs://b/records" in capsys.readouterr().out
    mesh = make_mesh()
    with pytest.raises(InputError, match=r"gs://b/records/held_out: no held-out records"):
        make_batches("gs://b/records", None, tiny_config(), mesh, 8)


def test_a_shard_lost_on_its_way_is_made_again(bucket):
    extract(some_examples(10), FakeEncoders(), "gs://b/records", **OPTIONS)
    shard = bucket.folder / "b" / "records" / "squeeze-train.array_record-00001-of-00003"
    before = contents(shard.parent)
    shard.unlink()
    with pytest.raises(InputError, match=r"gs://b/records.*00001-of-00003: the shard is missing"):
        FeatureSource("gs://b/records")
    encoders = FakeEncoders()
    extract(some_examples(10), encoders, "gs://b/records", **OPTIONS)
    assert len(encoders.prompts) == 4
    assert contents(shard.parent) == before


def test_a_writer_that_fails_leaves_nothing_half_written(tmp_path):
    path = epath.Path(tmp_path / "file")

    def broken(part):
        part.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, broken)
    assert not list(tmp_path.iterdir())
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, broken)
    assert path.read_text() == "old"


def test_a_faster_twin_that_has_tidied_up_is_no_failure(tmp_path):
    """Two processes make the same file; one finishes, and removes what it takes for a killed writer's."""
    path = epath.Path(tmp_path / "file")

    def overtaken(part):
        part.write_text("same")
        write_whole(path, lambda other: other.write_text("same"))
        remove_parts(path.parent)

    write_whole(path, overtaken)
    assert path.read_text() == "same"
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_bucket_without_its_library_is_one_sentence(monkeypatch, tmp_path):
    class Missing(Bucket):
        def exists(self, path):
            raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", Missing(tmp_path))
    with pytest.raises(InputError, match=r"gs://bucket/records: Please install gcsfs.*pip install 'squeeze_jax\[gcs\]'"):
        reachable("gs://bucket/records")
    assert reachable(tmp_path) == epath.Path(tmp_path)
