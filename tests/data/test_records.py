"""The record's codec and what opening a folder refuses."""

import json
import pickle
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from etils import epath
from fake_encoders import FakeEncoders, some_examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from squeeze_jax.data.codec import CODECS
from squeeze_jax.data.record_format import (
    FeatureRecord,
    decode,
    encode,
    record_features,
    record_shape,
    serialise,
)
from squeeze_jax.data.record_writer import extract
from squeeze_jax.data.records import METADATA_FILE, FeatureSource, read_metadata, write_shard
from squeeze_jax.errors import InputError


def some_record(prompt="a cat", text=5, image=4, references=((4, 4), (2, 6)), width=8):
    random = np.random.default_rng(0)

    def states(tokens):
        return random.normal(size=(3, tokens, width)).astype(ml_dtypes.bfloat16)

    return FeatureRecord(
        prompt=prompt,
        text=states(text),
        text_positions=np.arange(image, image + text, dtype=np.int32),
        image=states(image),
        image_positions=np.arange(image, dtype=np.int32),
        target=random.normal(size=(4, 4, 16)).astype(np.float32),
        references=tuple(random.normal(size=(*size, 16)).astype(np.float32) for size in references),
    )


def assert_same(one, other):
    assert one.prompt == other.prompt
    for name in ("text", "text_positions", "image", "image_positions", "target"):
        a, b = getattr(one, name), getattr(other, name)
        assert a.dtype == b.dtype, name
        np.testing.assert_array_equal(a, b, err_msg=name)
    assert len(one.references) == len(other.references)
    for a, b in zip(one.references, other.references, strict=True):
        np.testing.assert_array_equal(a, b)


SIDE = st.integers(1, 4).map(lambda n: 2 * n)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.text(max_size=20),
    st.integers(1, 6),
    st.integers(0, 6),
    st.lists(st.tuples(SIDE, SIDE), max_size=3),
    st.sampled_from(sorted(CODECS)),
    st.sampled_from([8, 600]),
    st.sampled_from([None, (2,), (0, 2)]),
)
def test_a_record_survives_tfds(prompt, text, image, references, name, width, rows):
    codec, record = CODECS[name], some_record(prompt, text, image, references, width)
    features = record_features(record_shape(record), codec)
    back = decode(
        features.deserialize_example_np(serialise(features, encode(record, codec))), 7, codec, rows
    )
    assert back.number == 7
    there_and_back = (codec.decode(codec.encode(states)) for states in (record.text, record.image))
    expected = record._replace(**dict(zip(("text", "image"), there_and_back)))
    kept = slice(None) if rows is None else list(rows)
    assert_same(expected._replace(text=expected.text[kept], image=expected.image[kept]), back)
    if name == "bf16" and rows is None:
        assert_same(record, back)


def test_bf16_bits_survive_with_infinities_and_nan():
    bits = np.arange(2**16, dtype=np.uint16).reshape(1, -1, 8)
    record = some_record()._replace(text=bits.view(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(encode(record, CODECS["bf16"])["text"], bits)


def test_float32_states_are_rounded_once():
    states = np.random.default_rng(0).normal(size=(3, 5, 8)).astype(np.float32)
    found = encode(some_record()._replace(text=states), CODECS["bf16"])["text"]
    np.testing.assert_array_equal(found, states.astype(ml_dtypes.bfloat16).view(np.uint16))


def test_records_of_other_shapes_are_refused(tmp_path):
    other = some_record()._replace(target=np.zeros((6, 4, 16), np.float32))
    with pytest.raises(ValueError, match="must share one shape"):
        write_shard(epath.Path(tmp_path), 0, 1, [some_record(), other])


def extract_ten(folder):
    options = {"target_size": (64, 64), "reference_long_side": 64, "examples_per_shard": 4}
    extract(some_examples(10), FakeEncoders(), folder, **options)


@pytest.fixture
def folder(tmp_path):
    extract_ten(tmp_path)
    return tmp_path


def shard(folder, number):
    return folder / f"squeeze-train.array_record-0000{number}-of-00003"


def test_plain_tfds_reads_the_folder(folder):
    source = tfds.builder_from_directory(folder).as_data_source(split="train")
    assert len(source) == 10
    assert source[3]["prompt"] == b"number 3"
    assert source[3]["reference_sizes"].tolist() == [
        list(r.shape[:2]) for r in FeatureSource(folder)[3].references
    ]


def test_the_metadata_tells_the_largest_sizes(folder):
    metadata = read_metadata(folder)
    assert metadata.shards == (4, 4, 2)
    assert metadata.summary.records == 10
    assert metadata.summary.shape.target == (8, 8, 16)
    assert metadata.summary.max_text == len("number 2!!")
    assert metadata.summary.max_image == 12
    assert metadata.summary.max_references == 3
    assert metadata.settings["encoders"] == {"mllm": "fake", "system_text": None}


def test_a_source_reads_any_record_also_from_a_copy(folder):
    source = FeatureSource(folder)
    assert len(source) == 10
    source[0]
    for index, record in [(9, source[9]), (4, pickle.loads(pickle.dumps(source))[4])]:
        assert record.number == index
        assert record.prompt == some_examples(10)[index].prompt


@pytest.mark.parametrize("keep", [0, 10, 100, 0.5, 0.99])
def test_a_truncated_shard_is_named(folder, keep):
    path = shard(folder, 1)
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(len(content) * keep)])
    with pytest.raises(
        InputError, match=r"00001-of-00003: the shard is damaged .*same extract command"
    ):
        FeatureSource(folder)


def test_a_missing_or_foreign_shard_is_named(folder):
    content = shard(folder, 2).read_bytes()
    shard(folder, 2).unlink()
    with pytest.raises(InputError, match="00002-of-00003: the shard is missing"):
        FeatureSource(folder)
    shard(folder, 2).write_bytes(content)
    shard(folder, 0).write_bytes(content)
    with pytest.raises(InputError, match="00000-of-00003: 2 records instead of 4"):
        FeatureSource(folder)


def test_a_flipped_byte_inside_a_record_is_reported_on_reading(folder):
    source = FeatureSource(folder)
    content = bytearray(shard(folder, 0).read_bytes())
    content[300] ^= 255
    shard(folder, 0).write_bytes(content)
    with pytest.raises(
        InputError,
        match=r"-00000-of-00003: record . cannot be read .*delete this file and run the same",
    ):
        [source[i] for i in range(4)]
    shard(folder, 0).unlink()
    extract_ten(folder)
    assert len([FeatureSource(folder)[i] for i in range(10)]) == 10


def test_each_record_can_be_read_alone(tmp_path):
    """A group of several would be read and unpacked whole for each of them."""
    extract(
        some_examples(3), FakeEncoders(), tmp_path, target_size=(64, 64), reference_long_side=64
    )
    shards = sorted(tmp_path.glob("*.array_record-?????-of-?????"))
    assert shards
    for shard in shards:
        reader = array_record_module.ArrayRecordReader(str(shard))
        assert "group_size:1," in reader.writer_options_string()
        reader.close()


def test_unfinished_folders_say_what_to_do(folder, tmp_path_factory):
    with pytest.raises(InputError, match="run extract first"):
        read_metadata(tmp_path_factory.mktemp("empty"))
    with pytest.raises(InputError, match="run extract first"):
        read_metadata(folder / "nowhere")
    (folder / METADATA_FILE).unlink()
    with pytest.raises(InputError, match="unfinished, run the same extract command again"):
        read_metadata(folder)


def test_other_codecs_and_broken_metadata_are_refused(folder):
    path = folder / METADATA_FILE
    value = json.loads(path.read_text())
    path.write_text(json.dumps(value | {"codec": 99}))
    with pytest.raises(InputError, match=r"codec 99, this version reads \[1, 2\]"):
        read_metadata(folder)
    for broken in ("{", "[]", "{}", json.dumps(value | {"summary": {"shape": 3}})):
        path.write_text(broken)
        with pytest.raises(InputError, match=r"squeeze\.json: not a description"):
            read_metadata(folder)


OLD = json.dumps(
    {
        "summary": {
            "records": 10,
            "shape": {"layers": 3, "width": 8, "target": [8, 8, 16]},
            "max_text": 10, "max_image": 12, "max_references": 3, "max_reference_tokens": 36,
        },
        "shards": [4, 4, 2],
        "settings": {},
        "codec": 1,
    }
)  # fmt: skip


def spoil(folder, name, change):
    path = folder / name
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value["summary"].update(max_text="many"),
        lambda value: value["summary"].update(max_text=10**9),
        lambda value: value["summary"].update(records=2**40),
        lambda value: value["summary"]["sizes"].pop(),
        lambda value: value["summary"]["sizes"][0].__setitem__(2, -1),
        lambda value: value["summary"]["shape"].update(width=0.5),
        lambda value: value.update(shards=[1]),
        lambda value: value.update(layers=[0]),
        lambda value: value.update(settings=3),
    ],
)
def test_a_description_that_cannot_be_is_refused_and_made_anew(folder, change):
    spoil(folder, METADATA_FILE, change)
    with pytest.raises(InputError, match="not a description of feature records"):
        FeatureSource(folder)


def test_files_that_only_tfds_reads_are_named(folder):
    for name in ("features.json", "dataset_info.json"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:50])
        with pytest.raises(InputError, match=r"features.json cannot be read .*same extract"):
            FeatureSource(folder)[0]
        (folder / name).write_bytes(whole)
    assert FeatureSource(folder)[0].prompt
    path = folder / METADATA_FILE
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError, match=r"cannot be read \(Is a directory"):
        FeatureSource(folder)


def test_a_record_whose_parts_do_not_fit_is_named(folder):
    """Whole by its checksums: somebody else's."""
    source = FeatureSource(folder)
    records = [source[i] for i in range(len(source))]
    counts = source.metadata.shards
    records[0] = records[0]._replace(text_positions=records[0].text_positions[:-1])
    shard = epath.Path(folder)
    summary = (folder / f"squeeze-train.array_record-00000-of-{len(counts):05d}.json").read_text()
    write_shard(shard, 0, len(counts), records[: counts[0]])
    (folder / f"squeeze-train.array_record-00000-of-{len(counts):05d}.json").write_text(summary)
    with pytest.raises(InputError, match=r"record 0 cannot be read \(hidden states of shape"):
        FeatureSource(folder)[0]


def test_folders_from_before_there_was_a_choice_are_read(folder):
    records = [FeatureSource(folder)[i] for i in range(10)]
    (folder / METADATA_FILE).write_text(OLD)
    metadata = read_metadata(folder)
    assert (metadata.codec, metadata.layers) == ("bf16", (0, 1, 2))
    for number, record in enumerate(records):
        assert_same(FeatureSource(folder)[number], record)


def test_reading_records_imports_neither_jax_nor_tensorflow(folder):
    code = (
        "import sys; from squeeze_jax.data.records import FeatureSource; import "
        "squeeze_jax.diffusion.latents\n"
        f"assert len(FeatureSource({str(folder)!r})[3].references) == 3\n"
        "print([name for name in ('jax', 'tensorflow', 'torch', 'flax') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
