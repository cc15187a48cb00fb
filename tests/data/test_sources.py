"""Sources of examples, each read from shards that other libraries wrote."""

import gzip
import json
import random
import tracemalloc
from pathlib import Path

import pytest
from fake_encoders import FakeEncoders
from PIL import Image
from public_sets import (
    colour,
    composite,
    corner,
    picture,
    sample_files,
    subjects_row,
    uno_row,
    unpack,
    write_subjects,
    write_uno,
    write_webdataset,
)

from squeeze_jax.data.record_writer import RowError, extract
from squeeze_jax.data.records import FeatureSource
from squeeze_jax.data.sources import archive, open_source, parse_source, split, uno1m
from squeeze_jax.data.sources.contract import Options, parts_of
from squeeze_jax.errors import InputError

SIZES = {"target_size": (64, 64), "reference_long_side": 64, "examples_per_shard": 4, "batch": 3}
SKIP = Options(skip_bad=True)


def opened(kind, folder, options=SKIP):
    return open_source(f"{kind}:{folder}", options)


def all_of(rows):
    return [rows[index] for index in range(len(rows))]


def records(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def extracted(rows, out, shard=(0, 1), skip=None):
    encoders = FakeEncoders()
    extract(
        rows, encoders, out, parts=parts_of(rows), source=rows.source, shard=shard, skip=skip, **SIZES
    )
    return encoders


# --- how a source is written -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "module", "path"),
    [
        ("a/pairs.json", "json_list", "a/pairs.json"),
        ("pairs.JSONL", "json_lines", "pairs.JSONL"),
        ("folder:a:b", "image_folder", "a:b"),
        ("uno1m:/data", "uno1m", "/data"),
        ("pairs.txt", "json_list", "pairs.txt"),
    ],
)
def test_a_source_says_its_kind(text, module, path):
    assert parse_source(text) == (module, Path(path))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("uno:DIR", "did you mean uno1m:DIR"),
        ("coco:DIR", "write one of FILE.json"),
        ("uno1m:", "the folder is missing"),
        (".", "a folder; say of what kind"),
        ("webdataset:absent", "no *.tar in it"),
        ("subjects200k:absent", "no *.parquet"),
        ("uno1m:absent", "no labels/split1.json"),
        ("folder:absent", "no metadata.jsonl or metadata.csv"),
        ("absent.jsonl", "no such file"),
    ],
)
def test_what_is_no_source_is_one_sentence(text, words):
    with pytest.raises(InputError) as refused:
        open_source(text, Options())
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


# --- Subjects200K ------------------------------------------------------------------------------


def test_each_side_of_a_composite_is_a_target_with_the_other_as_reference(tmp_path):
    rows = [subjects_row(i) for i in range(7)]
    write_subjects(tmp_path, [rows[:4], rows[4:]], row_group=3)
    found = opened("subjects200k", tmp_path)
    assert (found.report.rows, found.report.kept) == (7, 14)
    assert list(found.rows.parts) == [6, 2, 6]
    for number, example in enumerate(all_of(found.rows)):
        row, side = divmod(number, 2)
        assert example.prompt == f"{('left', 'right')[side]} {row}"
        assert corner(example.target) == colour(row, side)
        assert [corner(reference) for reference in example.references] == [colour(row, 1 - side)]
        assert example.target.size == example.references[0].size == (64, 64)
        # Not a pixel of the margin is left: the whole side has one colour.
        assert len(example.target.getcolors()) == len(example.references[0].getcolors()) == 1


@pytest.mark.parametrize(("side", "margin"), [(64, 8), (128, 16), (96, 0), (1024, 16)])
def test_the_composite_is_cut_by_its_own_size(tmp_path, side, margin):
    rows = [subjects_row(3, image=composite(3, side, margin))]
    write_subjects(tmp_path, [rows])
    example = opened("subjects200k", tmp_path).rows[0]
    assert example.target.size == (side, side)
    assert example.target.getcolors() == [(side * side, colour(3, 0))]
    assert example.references[0].getcolors() == [(side * side, colour(3, 1))]


def test_scores_of_subjects200k(tmp_path):
    scores = [(5, 5, 5), (5, 4, 5), None, (5, None, 5), (5, 5, 99), (3, 3, 3), (5, 5, -1)]
    write_subjects(tmp_path, [[subjects_row(i, score) for i, score in enumerate(scores)]])
    found = opened("subjects200k", tmp_path)
    assert found.report.kept == 2
    assert found.report.dropped == {"score below 5": 4, "score unknown": 8}
    found = opened("subjects200k", tmp_path, Options(min_score=3.0))
    assert found.report.dropped == {"score unknown": 8}
    assert opened("subjects200k", tmp_path, Options(min_score=0.0)).report.kept == 14


def test_hostile_parquet(tmp_path):
    rows = [
        subjects_row(0),
        subjects_row(1, left=None),
        subjects_row(2, right="  "),
        subjects_row(3, image=b""),
        subjects_row(4, image=b"no picture"),
        subjects_row(5, image=picture(5, size=(64, 64))),
        subjects_row(6, image=picture(6, size=(400, 64))),
        subjects_row(7),
    ]
    write_subjects(tmp_path / "a", [rows])
    with pytest.raises(InputError, match=r"2 of 16 examples cannot be used(.|\n)*row 2: descr"):
        opened("subjects200k", tmp_path / "a", Options())
    found = opened("subjects200k", tmp_path / "a")
    assert found.report.dropped == {"no caption": 2}
    skipped = []
    extracted(found.rows, tmp_path / "out", skip=skipped.append)
    assert len(FeatureSource(tmp_path / "out")) == 14 - len(skipped) == 6
    for text in ("row 4: its image has no bytes", "row 5: not a picture", "row 6: 64x64 pixels are"):
        assert sum(text in str(error) for error in skipped) == 2
    # Of the second row group nothing is left; the others are read around it.
    read = FeatureSource(tmp_path / "out")
    assert read.metadata.shards == (4, 0, 0, 2)
    assert [read[i].prompt for i in range(6)] == [
        "left 0", "right 0", "right 1", "left 2", "left 7", "right 7",
    ]  # fmt: skip
    with pytest.raises(RowError, match="row 4"):
        extracted(found.rows, tmp_path / "other")
    only = opened("subjects200k", write_subjects(tmp_path / "c", [rows[3:5]])).rows
    with pytest.raises(InputError, match="none of the rows could be used"):
        extracted(only, tmp_path / "none", skip=skipped.append)

    write_subjects(tmp_path / "b", [[subjects_row(0)]], without=["description"])
    with pytest.raises(InputError, match="column description is missing, it has image"):
        opened("subjects200k", tmp_path / "b")
    shard = next((tmp_path / "a" / "data").iterdir())
    shard.write_bytes(shard.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"00001\.parquet: not a whole parquet file"):
        opened("subjects200k", tmp_path / "a")


# --- UNO-1M ------------------------------------------------------------------------------------


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
        def latents(self, images):
            if len(self.prompts) > after:
                raise KeyboardInterrupt
            return super().latents(images)

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


@pytest.mark.parametrize("cut", [1, 8], ids=["its length lacks a byte", "no checksum"])
def test_a_missing_checksum_is_noticed_though_all_pictures_are_there(tmp_path, cut):
    folder = write_uno(tmp_path / "uno", {1: [uno_row(1, i) for i in range(3)]})
    path = folder / "images" / "split1.tar.gz"
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(InputError, match="cut short"):
        extracted(opened("uno1m", folder).rows, tmp_path / "out")


def test_a_wrong_checksum_is_noticed(tmp_path):
    folder = write_uno(tmp_path / "uno", {1: [uno_row(1, i) for i in range(3)]})
    path = folder / "images" / "split1.tar.gz"
    content = bytearray(path.read_bytes())
    content[-6] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(InputError, match="CRC"):
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
    assert all(name in str(error) for name, error in zip(["object1_a"] * 2 + ["object3_b"] * 2, skipped))
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


# --- WebDataset --------------------------------------------------------------------------------


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


# --- lists -------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.png").write_bytes(picture(ord(name)))
    return tmp_path


ROW = {"prompt": "a", "image_paths": ["a.png"], "image_tgt_path": "b.png"}


def test_lines_are_rows_of_a_list(pictures):
    lines = ["\ufeff" + json.dumps(ROW), "", json.dumps(ROW | {"prompt": "b"}), ""]
    (pictures / "pairs.jsonl").write_text("\n".join(lines))
    (pictures / "pairs.json").write_text(json.dumps([ROW, ROW | {"prompt": "b"}]))
    by_lines, by_list = (
        all_of(open_source(str(pictures / f"pairs.{end}"), Options()).rows) for end in ("jsonl", "json")
    )
    assert [example.prompt for example in by_lines] == ["a", "b"]
    for one, other in zip(by_lines, by_list, strict=True):
        assert corner(one.target) == corner(other.target)


def test_hostile_lines_are_all_listed(pictures):
    rows = [ROW, ROW | {"prompt": ""}, ROW | {"image_paths": ["../a.png"]}, {"promt": "a"}]
    lines = [*map(json.dumps, rows), "{", '{"prompt": "\udcff"}']
    (pictures / "p.jsonl").write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=r"5 of 6 rows cannot be used") as refused:
        open_source(str(pictures / "p.jsonl"), Options())
    for text in ('row 2: "prompt" is empty', "row 3: image_paths[0]", "row 5: is not JSON", "row 6: is not UTF-8"):
        assert text in str(refused.value)
    found = open_source(str(pictures / "p.jsonl"), SKIP)
    assert (len(found.rows), found.report.dropped) == (1, {"cannot be used": 5})
    (pictures / "p.jsonl").write_text("\n\n")
    with pytest.raises(InputError, match="it has no lines"):
        open_source(str(pictures / "p.jsonl"), Options())


def test_image_folders(pictures):
    rows = [
        {"file_name": "b.png", "reference_file_name": "a.png", "text": "one", "licence": 3},
        {"file_name": "c.png", "reference_file_names": ["a.png", "b.png"], "caption": "two"},
    ]
    (pictures / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    examples = all_of(opened("folder", pictures, Options(check_images=True)).rows)
    assert [(e.prompt, len(e.references)) for e in examples] == [("one", 1), ("two", 2)]
    assert corner(examples[1].references[1]) == corner(examples[0].target) == colour(ord("b"))
    (pictures / "metadata.csv").write_text(
        "file_name,reference1_file_name,reference2_file_name,prompt\n"
        'b.png,a.png,,"one, with a comma"\nc.png,a.png,b.png,two\n'
    )
    with pytest.raises(InputError, match="both a metadata"):
        opened("folder", pictures)
    (pictures / "metadata.jsonl").unlink()
    examples = all_of(opened("folder", pictures, Options()).rows)
    wanted = [("one, with a comma", 1), ("two", 2)]
    assert [(e.prompt, len(e.references)) for e in examples] == wanted


def test_hostile_image_folders(pictures):
    (pictures / "cut.png").write_bytes(picture(1)[:60])
    rows = [
        {"file_name": "b.png", "reference_file_name": "a.png", "text": "fine"},
        {"file_name": "b.png", "text": "no pair"},
        {"file_name": "b.png", "reference_file_name": "../a.png", "text": "out"},
        {"file_name": "b.png", "reference_file_name": "a.png"},
        {"file_name": "b.png", "reference_file_name": "a.png", "text": None},
        {"reference_file_name": "a.png", "text": "no target"},
        {"file_name": "cut.png", "reference_file_name": "a.png", "text": "cut"},
    ]
    (pictures / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match="6 of 7 rows cannot be used") as refused:
        opened("folder", pictures, Options(check_images=True))
    for text in ("row 2: has no reference_file_name", "row 3: image_paths[0]", "row 4: has no caption",
                 'row 6: "file_name" is missing', "cut.png: "):  # fmt: skip
        assert text in str(refused.value)
    (pictures / "metadata.jsonl").unlink()
    (pictures / "metadata.csv").write_text("file_name,text\nb.png,x,y,z\n")
    with pytest.raises(InputError, match="row 1: has more cells"):
        opened("folder", pictures, Options())


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_scores_are_asked_only_of_sets_that_have_them(pictures, kind):
    path = pictures / f"pairs.{kind}"
    path.write_text(json.dumps([ROW] if kind == "json" else ROW))
    with pytest.raises(InputError, match="has no scores"):
        open_source(str(path), Options(min_score=3.0))
