"""WebDataset, from shards that tarfile wrote."""

import json

import pytest
from public_sets import (
    colour,
    corner,
    sample_files,
    write_webdataset,
)
from source_checks import all_of, extracted, opened, records

from squeeze_jax.data.records import FeatureSource
from squeeze_jax.data.sources.contract import Options
from squeeze_jax.errors import InputError


def test_webdataset(tmp_path):
    shards = [
        [file for i in range(3) for file in sample_files(i, references=1 + i)],
        [*sample_files(3)[:2], ("0003.json", json.dumps({"prompt": "from json"}).encode())],
        [(f"deep/{name}", content) for name, content in sample_files(4)],
    ]
    write_webdataset(tmp_path, shards)
    found = opened("webdataset", tmp_path, Options())
    examples = all_of(found.rows)
    captions = ["a mug 0", "a mug 1", "a mug 2", "from json", "a mug 4"]
    assert [example.prompt for example in examples] == captions
    assert [len(example.references) for example in examples] == [1, 2, 3, 1, 1]
    for number, example in enumerate(examples):
        assert corner(example.target) == colour(number)
        wanted = [colour(number, 1 + i) for i in range(len(example.references))]
        assert [corner(reference) for reference in example.references] == wanted
    assert found.rows.most_references == 3
    assert found.rows[1].prompt == "a mug 1", "any order"
    for i in (1, 0):
        extracted(opened("webdataset", tmp_path).rows, tmp_path / "two", (i, 2))
    extracted(found.rows, tmp_path / "one")
    assert records(tmp_path / "one") == records(tmp_path / "two")


def test_hostile_webdataset(tmp_path):
    broken = [(name, b"cut" if "target" in name else content) for name, content in sample_files(6)]
    files = [
        *sample_files(0),
        *sample_files(1)[1:],  # no target
        *sample_files(2)[:1],  # no reference, no caption
        *sample_files(3, caption=" "),
        *sample_files(4)[:2],
        ("0004.json", b"{"),
        *sample_files(5),
        *sample_files(5),
        *broken,
        *sample_files(7),
    ]
    write_webdataset(tmp_path / "a", [files])
    with pytest.raises(InputError, match="5 of 9 examples cannot be used") as refused:
        opened("webdataset", tmp_path / "a", Options())
    for text in ("0001: it has no target", "0003: its .txt is empty", "0005: it is there twice"):
        assert f"000000.tar {text}" in str(refused.value)
    found = opened("webdataset", tmp_path / "a")
    assert found.report.dropped == {
        "no target": 1, "no reference": 1, "no caption": 2, "row twice": 1,
    }  # fmt: skip
    skipped = []
    extracted(found.rows, tmp_path / "out", skip=skipped.append)
    assert len(FeatureSource(tmp_path / "out")) == 3
    assert "0006: not a picture" in str(skipped[0])
    shard = tmp_path / "a" / "000000.tar"
    whole = shard.read_bytes()
    torn = whole.rstrip(b"\0")
    for content in (torn, whole[: len(whole) // 2], whole[:512], b"", b"x" * 2000):
        shard.write_bytes(content)
        with pytest.raises(InputError, match=r"000000\.tar: the archive is cut short or damaged"):
            opened("webdataset", tmp_path / "a")
    shard.rename(tmp_path / "a" / "0.tar.gz")
    with pytest.raises(InputError, match=r"gunzip 0\.tar\.gz"):
        opened("webdataset", tmp_path / "a")
