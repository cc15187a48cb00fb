"""UNO-1M, from archives that tarfile wrote."""

import gzip
import json
import random
import tracemalloc

import pytest
from fake_encoders import FakeEncoders
from PIL import Image
from public_sets import (
    colour,
    corner,
    uno_row,
    unpack,
    write_uno,
)
from source_checks import SIZES, all_of, extracted, opened, records
from tiny import tiny_config

from squeeze_jax.data.online import make_online
from squeeze_jax.data.record_writer import RowError, extract
from squeeze_jax.data.records import FeatureSource
from squeeze_jax.data.sources import archive, split, uno1m
from squeeze_jax.data.sources.contract import Options, parts_of
from squeeze_jax.errors import InputError


@pytest.fixture
def uno(tmp_path):
    """Three splits of 5, 4 and 6 rows, pictures in another order than the labels."""
    splits = {s: [uno_row(s, i) for i in range(n)] for s, n in ((1, 5), (2, 4), (10, 6))}
    return write_uno(tmp_path / "uno", splits, random.Random(0).shuffle)


def test_either_picture_of_a_row_is_a_target(uno):
    found = opened("uno1m", uno)
    assert (found.report.rows, found.report.kept) == (15, 30)
    assert list(found.rows.parts) == [10, 8, 12]
    rows = [(s, i) for s, n in ((1, 5), (2, 4), (10, 6)) for i in range(n)]
    for number, example in enumerate(all_of(found.rows)):
        (number_of_split, row), side = rows[number // 2], number % 2
        assert example.prompt == ("scene {}", "other scene {}")[side].format(row)
        assert corner(example.target)[0] == colour(row)[0]
        assert found.rows.name(number) == f"split{number_of_split}.json row {row + 1}"


def test_streamed_and_unpacked_give_the_same_records(uno, tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "MOST_WAITING", 300)  # so that pictures wait in a file, too
    streamed = opened("uno1m", uno).rows
    extracted(streamed, tmp_path / "a")
    for number in (1, 2, 10):
        unpack(uno, number)
    unpacked = opened("uno1m", uno).rows
    assert unpacked.source == streamed.source
    extracted(unpacked, tmp_path / "b")
    assert records(tmp_path / "a") == records(tmp_path / "b")


def test_directions_show_the_right_picture(tmp_path):
    """Red to the eye: picture a of a row is red, b blue."""
    folder = write_uno(tmp_path, {1: [uno_row(1, i) for i in range(3)]})
    unpack(folder, 1)
    for i in range(3):
        for side, shade in (("a", "red"), ("b", "blue")):
            name = folder / "images" / "split1" / f"object{i}_{side}_64x64.png"
            Image.new("RGB", (64, 64), shade).save(name)
    for number, example in enumerate(all_of(opened("uno1m", folder).rows)):
        shades = [(255, 0, 0), (0, 0, 255)]
        assert corner(example.target) == shades[number % 2]
        assert corner(example.references[0]) == shades[1 - number % 2]


def test_processes_share_archives_and_nobody_reads_anothers(uno, tmp_path, monkeypatch):
    opened_archives = []

    class Spy(archive.ArchivePictures):
        def __init__(self, path, wanted):
            opened_archives.append(path.name)
            super().__init__(path, wanted)

    monkeypatch.setattr(uno1m, "ArchivePictures", Spy)
    extracted(opened("uno1m", uno).rows, tmp_path / "one")
    assert opened_archives == ["split1.tar.gz", "split2.tar.gz", "split10.tar.gz"]
    seen = []
    for i in (2, 0, 1):
        opened_archives.clear()
        extracted(opened("uno1m", uno).rows, tmp_path / "three", (i, 3))
        seen += opened_archives
    assert sorted(seen) == sorted(["split1.tar.gz", "split2.tar.gz", "split10.tar.gz"])
    assert records(tmp_path / "one") == records(tmp_path / "three")
    assert len(FeatureSource(tmp_path / "one")) == 30


@pytest.mark.parametrize("after", [0, 5, 11, 17])
def test_an_interrupted_stream_goes_on(uno, tmp_path, after):
    class Broken(FakeEncoders):
        def latents(self, images, canvas=None):
            if len(self.prompts) > after:
                raise KeyboardInterrupt
            return super().latents(images, canvas)

    rows = opened("uno1m", uno).rows
    options = SIZES | {"parts": parts_of(rows), "source": rows.source}
    with pytest.raises(KeyboardInterrupt):
        extract(rows, Broken(), tmp_path / "a", **options)
    rows = opened("uno1m", uno).rows
    second = FakeEncoders()
    extract(rows, second, tmp_path / "a", **options)
    assert len(second.prompts) <= 30 - after // 4 * 4 + 4
    extracted(rows, tmp_path / "b")
    assert records(tmp_path / "a") == records(tmp_path / "b")


def test_scores_of_uno1m(tmp_path):
    scores = [4.0, 3.5, 3.4, None, 131184.67, -1, "4.0", True, float("nan"), 0.0]
    rows = [uno_row(1, i, score) for i, score in enumerate(scores)]
    rows += [uno_row(1, 10, vlm_filter_cot=None), uno_row(1, 11, vlm_filter_cot={"score_part": {}})]
    write_uno(tmp_path, {1: rows})
    found = opened("uno1m", tmp_path, Options())
    assert [found.rows.prompt(i) for i in (0, 2)] == ["scene 0", "scene 1"]
    assert found.report.dropped == {"score below 3.5": 4, "score unknown": 16}
    assert opened("uno1m", tmp_path, Options(min_score=4.0)).report.kept == 2
    assert opened("uno1m", tmp_path, Options(min_score=0.0)).report.kept == 24


def test_hostile_labels(tmp_path):
    rows = [
        uno_row(1, 0),
        uno_row(1, 1, one=None),
        uno_row(1, 2, two=" "),
        uno_row(1, 3, img_path1="../../secret.png"),
        uno_row(1, 4, img_path2="/etc/passwd"),
        uno_row(1, 5, img_path1="split2/a.png"),
        uno_row(1, 6, img_path1=None),
        uno_row(1, 0),
        uno_row(1, 8, img_path2="split1/object8_a_64x64.png"),
        uno_row(1, 9, caption=None),
    ]
    write_uno(tmp_path, {1: rows})
    with pytest.raises(InputError, match="16 of 20 examples cannot be used") as refused:
        opened("uno1m", tmp_path, Options())
    for text in (
        "split1.json row 2: the caption of img_path1 is empty",
        "row 4: img_path1 is '../../secret.png'; it must name a picture of split1",
        "row 5: img_path2 is '/etc/passwd'",
        "row 8: a picture of it is in an earlier row",
        "row 9: both pictures are",
        "--skip-bad",
    ):
        assert text in str(refused.value)
    assert str(refused.value).count("\n") == 10, "one sentence a problem"
    report = opened("uno1m", tmp_path).report
    assert report.dropped == {"no caption": 4, "no path": 8, "row twice": 2, "one picture": 2}
    (tmp_path / "labels" / "split1.json").write_text('[{"img_path1": ')
    with pytest.raises(InputError, match=r"split1\.json: not JSON"):
        opened("uno1m", tmp_path)
    (tmp_path / "labels" / "split1.json").write_text("{}")
    with pytest.raises(InputError, match=r"split1\.json: not a list"):
        opened("uno1m", tmp_path)


@pytest.mark.parametrize("kept", [0.3, 0.9, 0.999])
def test_an_archive_that_was_cut_short_is_named(uno, tmp_path, kept):
    path = uno / "images" / "split2.tar.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    skipped = []
    with pytest.raises(InputError, match=r"split2\.tar\.gz: the archive is cut short") as refused:
        extracted(opened("uno1m", uno).rows, tmp_path / "a", skip=skipped.append)
    assert not isinstance(refused.value, RowError), "no row to skip"
    assert not skipped
    path.write_bytes(whole)  # downloaded again, it goes on
    extracted(opened("uno1m", uno).rows, tmp_path / "a")
    extracted(opened("uno1m", uno).rows, tmp_path / "b")
    assert records(tmp_path / "a") == records(tmp_path / "b")


@pytest.mark.parametrize("damage", ["its length lacks a byte", "no checksum", "wrong checksum"])
def test_the_end_of_an_archive_is_checked_behind_its_last_picture(tmp_path, monkeypatch, damage):
    """Of rows that do not pass, so nobody asks for what stands there."""
    monkeypatch.setattr(archive, "READ", 512)
    rows = [uno_row(1, i, 4.0 if i < 3 else 1.0) for i in range(150)]
    folder = write_uno(tmp_path / "uno", {1: rows})
    path = folder / "images" / "split1.tar.gz"
    extracted(opened("uno1m", folder).rows, tmp_path / "whole")
    content = bytearray(path.read_bytes())
    if damage == "wrong checksum":
        content[-6] ^= 1
    else:
        del content[-1 if damage == "its length lacks a byte" else -8 :]
    path.write_bytes(bytes(content))
    with pytest.raises(InputError, match=r"split1\.tar\.gz: the archive is cut short or damaged"):
        extracted(opened("uno1m", folder).rows, tmp_path / "out")


def test_what_is_no_archive_is_named(tmp_path):
    folder = write_uno(tmp_path / "uno", {1: [uno_row(1, 0), uno_row(1, 1)]})
    path = folder / "images" / "split1.tar.gz"
    for content in (b"version https://git-lfs", gzip.compress(b"no tar" * 500), b""):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"split1\.tar\.gz: the archive"):
            opened("uno1m", folder).rows[0]


@pytest.mark.parametrize("streamed", [True, False])
def test_pictures_that_are_missing_or_broken_are_rows_to_skip(tmp_path, streamed):
    rows = [uno_row(1, i) for i in range(6)]
    broken, lacking = rows[1]["img_path1"], rows[3]["img_path2"]
    folder = write_uno(tmp_path / "uno", {1: rows}, broken=[broken], leave_out=[lacking])
    if not streamed:
        unpack(folder, 1)
    found, skipped = opened("uno1m", folder).rows, []
    with pytest.raises(RowError, match=r"split1\.json row 2.*object1_a"):
        extracted(found, tmp_path / "strict")
    extracted(found, tmp_path / "out", skip=skipped.append)
    assert len(skipped) == 4
    assert all(
        name in str(error) for name, error in zip(["object1_a"] * 2 + ["object3_b"] * 2, skipped)
    )
    read = FeatureSource(tmp_path / "out")
    kept = [0, 0, 2, 2, 4, 4, 5, 5]
    assert [read[i].prompt.split()[-1] for i in range(len(read))] == list(map(str, kept))


def test_labels_without_pictures_are_told(uno):
    (uno / "images" / "split2.tar.gz").unlink()
    found = opened("uno1m", uno)
    assert found.report.kept == 22
    assert "no pictures for the labels of 1 of 3 splits (split2)" in found.report.warnings[-1]
    for path in (uno / "images").iterdir():
        path.unlink()
    with pytest.raises(InputError, match=r"neither images/split1\.tar\.gz nor a folder"):
        opened("uno1m", uno)


def test_validation_has_whole_pairs_and_the_rest_trains(uno):
    for held_out, wanted in ((1, 2), (2, 2), (3, 4), (50, 4)):
        parts = split(opened("uno1m", uno), held_out, "uno")
        assert len(parts["held_out"]) == wanted
        assert len(parts["train"]) == 30 - wanted
        both = [rows.prompt(i) for rows in reversed(parts.values()) for i in range(len(rows))]
        assert both == [example.prompt for example in all_of(opened("uno1m", uno).rows)]
        assert sum(parts["train"].parts) == len(parts["train"])
        assert parts["train"].source != parts["held_out"].source


def test_a_limit_takes_the_first_that_pass(uno):
    whole = [example.prompt for example in all_of(opened("uno1m", uno).rows)]
    found = opened("uno1m", uno, Options(limit=13))
    assert [example.prompt for example in all_of(found.rows)] == whole[:13]
    assert list(found.rows.parts) == [10, 3]
    assert found.rows.source != opened("uno1m", uno).rows.source


def test_validation_and_a_limit_keep_nothing_waiting_but_their_own(uno, monkeypatch):
    asked = []

    class Spy(archive.ArchivePictures):
        def __init__(self, path, wanted):
            asked.append((path.name, len(wanted)))
            super().__init__(path, wanted)

        def finish(self):
            asked.append("read to its end")
            super().finish()

    monkeypatch.setattr(uno1m, "ArchivePictures", Spy)
    all_of(split(opened("uno1m", uno), 2, "uno")["held_out"])
    all_of(opened("uno1m", uno, Options(limit=4)).rows)
    assert asked == [("split1.tar.gz", 2), ("split1.tar.gz", 4)]
    all_of(opened("uno1m", uno, Options(limit=10)).rows)
    assert asked[2:] == [("split1.tar.gz", 10), "read to its end"]


def test_training_on_line_needs_examples_in_any_order(uno):
    with pytest.raises(InputError, match="reads examples in any order"):
        make_online(opened("uno1m", uno).rows, tiny_config(), batch=2, seed=0)


def test_memory_does_not_grow_with_the_set(tmp_path):
    def peak(splits):
        folder = tmp_path / str(splits)
        rows = {s: [uno_row(s, i) for i in range(400)] for s in range(1, splits + 1)}
        write_uno(folder, {s: [] for s in rows})
        for s, own in rows.items():
            (folder / "labels" / f"split{s}.json").write_text(json.dumps(own))
        del rows
        tracemalloc.start()
        found = opened("uno1m", folder).rows
        assert sum(len(found.prompt(i)) > 0 for i in range(len(found))) == 800 * splits
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    assert peak(12) < 1.3 * peak(2)
