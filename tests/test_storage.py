"""Object storage, simulated: no rename, no random writes, an object appears whole; the records are those of a disk."""

import os
import threading
import time
from pathlib import Path

import pytest
from etils import epath
from etils.epath import backend, gpath
from fake_encoders import FakeEncoders, some_examples
from tiny import tiny_config

from squeeze_jax import storage
from squeeze_jax.data import records as features
from squeeze_jax.data.record_writer import extract
from squeeze_jax.data.records import FeatureSource, read_metadata
from squeeze_jax.errors import InputError, OutputError
from squeeze_jax.sharding import make_mesh
from squeeze_jax.storage import (
    GrowingFiles,
    as_path,
    reachable,
    remove_parts,
    write_beside,
    write_whole,
)
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
        Path(self.local(dst)).parent.mkdir(parents=True, exist_ok=True)  # a bucket has no folders
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


def test_storage_that_does_not_answer_is_one_sentence_in_time(monkeypatch, tmp_path):
    released = threading.Event()

    class Silent(Bucket):
        def exists(self, path):
            released.wait(30)
            return False

    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", Silent(tmp_path))
    monkeypatch.setattr(storage, "PATIENCE", 0.3)
    asked = time.monotonic()
    for ask in (as_path, reachable, read_metadata, FeatureSource):
        with pytest.raises(
            InputError, match=r"gs://bucket/here: no answer within 0.3 s; see to the network.*disk"
        ):
            ask("gs://bucket/here")
    assert time.monotonic() - asked < 5
    released.set()


def test_a_shard_that_does_not_answer_is_one_sentence_in_time(bucket, monkeypatch):
    extract(some_examples(4), FakeEncoders(), "gs://b/records", **OPTIONS)
    released = threading.Event()

    class Silent:
        def __init__(self, path):
            released.wait(30)

    monkeypatch.setattr(features.array_record_module, "ArrayRecordReader", Silent)
    monkeypatch.setattr(storage, "PATIENCE", 0.5)
    with pytest.raises(InputError, match=r"gs://b/records/.*array_record-0.*no answer within"):
        FeatureSource("gs://b/records")
    released.set()


def test_a_late_disk_is_told_of_once_and_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "LATE", 0.05)
    said = []
    with storage.spoken_waiting("records", said.append):
        time.sleep(0.5)
    assert said == ["still waiting after 0.05 s: records; a slow disk or network?"]
    monkeypatch.setattr(storage, "LATE", 60.0)
    with storage.spoken_waiting("records", said.append):
        pass
    assert len(said) == 1
    assert not any(isinstance(thread, threading.Timer) and thread.is_alive() and
                   not thread.finished.is_set() for thread in threading.enumerate())  # fmt: skip


def test_a_disk_that_answers_late_is_no_error(tmp_path, monkeypatch):
    """Longer than object storage would be given."""
    extract(some_examples(4), FakeEncoders(), tmp_path, **OPTIONS)
    monkeypatch.setattr(storage, "PATIENCE", 0.05)
    read = features.array_record_module.ArrayRecordReader
    asked = []

    def late(*arguments, **options):
        asked.append(None)
        time.sleep(0.3)
        return read(*arguments, **options)

    monkeypatch.setattr(features.array_record_module, "ArrayRecordReader", late)
    source = FeatureSource(tmp_path)
    assert [source[i].prompt for i in range(4)] == [one.prompt for one in some_examples(4)]
    assert asked


def test_an_address_where_nobody_listens_is_one_sentence_in_time(monkeypatch):
    """Google's library tries again for most of a minute."""
    gcsfs = pytest.importorskip("gcsfs")
    clear = [backend._FileSystemSpecBackend._get_filesystem.cache_clear]
    clear.append(gcsfs.GCSFileSystem.clear_instance_cache)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setattr(storage, "PATIENCE", 1.5)
    for forget in clear:
        forget()
    with pytest.raises(InputError, match=r"gs://bucket/run: no answer within 1.5 s"):
        as_path("gs://bucket/run")
    for forget in clear:
        forget()


def test_files_of_a_run_appear_whole_in_a_bucket(bucket):
    """No rename, no append: each is made on the disk here and uploaded."""
    folder = as_path("gs://b/run")
    write_beside(folder / "config.json", lambda part: part.write_text("{}"))
    assert (folder / "config.json").read_text() == "{}"
    growing = GrowingFiles(folder)
    path = growing.fetch("metrics.jsonl")
    with path.open("a") as file:
        file.write("1\n")
    (growing.folder / "board").mkdir()
    (growing.folder / "board" / "events").write_bytes(b"12")
    growing.upload()
    assert (folder / "metrics.jsonl").read_text() == "1\n"
    assert (folder / "board" / "events").read_bytes() == b"12"
    count = len(bucket.uploads)
    growing.upload()
    assert len(bucket.uploads) == count, "nothing has changed"
    with path.open("a") as file:
        file.write("2\n")
    assert (folder / "metrics.jsonl").read_text() == "1\n", "as it was until it is uploaded"
    growing.close()
    assert (folder / "metrics.jsonl").read_text() == "1\n2\n"
    assert not growing.folder.exists()
    again = GrowingFiles(folder)
    assert again.fetch("metrics.jsonl").read_text() == "1\n2\n"
    again.close()


def test_on_a_disk_files_grow_where_they_are(tmp_path):
    growing = GrowingFiles(as_path(tmp_path))
    assert growing.fetch("metrics.jsonl") == tmp_path / "metrics.jsonl"
    growing.close()
    assert tmp_path.is_dir()


def test_writes_that_a_bucket_refuses_are_one_sentence(bucket, monkeypatch):
    growing = GrowingFiles(as_path("gs://b/run"))
    (growing.folder / "metrics.jsonl").write_text("1\n")

    def refuse(self, path, dst, overwrite):
        raise PermissionError("403: no storage.objects.create")

    monkeypatch.setattr(Bucket, "copy", refuse)
    with pytest.raises(OutputError, match=r"gs://b/run/metrics.jsonl: cannot be written \(403.*"):
        growing.close()
    assert not growing.folder.exists()
