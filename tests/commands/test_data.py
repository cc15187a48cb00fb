"""`data describe` and `extract` over made-up shards of each public format, with the miniature."""

import json
import random
from pathlib import Path

import pytest
from PIL import Image
from public_sets import (
    colour,
    picture,
    sample_files,
    subjects_row,
    uno_row,
    write_subjects,
    write_uno,
    write_webdataset,
)

from squeeze_jax.commands import data, extract
from squeeze_jax.data.records import FeatureSource, read_metadata

DEMO = str(Path(__file__).parents[2] / "configs" / "demo.py")


def make(kind, folder):
    """Four rows, the last of which no picture can be made of, and where there are scores, two
    that do not pass."""
    if kind == "subjects200k":
        rows = [subjects_row(i) for i in range(3)] + [subjects_row(3, image=b"cut")]
        rows += [subjects_row(4, (5, 4, 5)), subjects_row(5, None)]
        return f"subjects200k:{write_subjects(folder, [rows[:2], rows[2:]])}"
    if kind == "uno1m":
        rows = [uno_row(1, i) for i in range(2)], [uno_row(2, i) for i in range(2)]
        rows[1].extend([uno_row(2, 4, 3.0), uno_row(2, 5, 131184.67)])
        broken = [rows[1][1][side] for side in ("img_path1", "img_path2")]
        order = random.Random(1).shuffle
        return f"uno1m:{write_uno(folder, dict(enumerate(rows, 1)), order, broken)}"
    if kind == "webdataset":
        broken = [("0003.target.png", b"cut"), *sample_files(3)[1:]]
        shards = [[*sample_files(0), *sample_files(1)], [*sample_files(2), *broken]]
        return f"webdataset:{write_webdataset(folder, shards)}"
    folder.mkdir()
    rows = []
    for i in range(4):
        for other in (0, 1):
            content = picture(i, other) if i < 3 else b"cut"
            (folder / f"{i}_{other}.png").write_bytes(content)
        rows.append(
            {"prompt": f"a mug {i}", "image_paths": [f"{i}_1.png"], "image_tgt_path": f"{i}_0.png"}
        )
    if kind == "folder":
        keys = {
            "prompt": "text",
            "image_paths": "reference_file_names",
            "image_tgt_path": "file_name",
        }
        rows = [{keys[key]: value for key, value in row.items()} for row in rows]
    name = {"folder": "metadata.jsonl", "jsonl": "pairs.jsonl", "json": "pairs.json"}[kind]
    lines = json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows))
    (folder / name).write_text(lines)
    return f"folder:{folder}" if kind == "folder" else str(folder / name)


KINDS = ("json", "jsonl", "folder", "subjects200k", "uno1m", "webdataset")


@pytest.mark.parametrize("kind", KINDS)
def test_each_source_goes_to_records(tmp_path, kind, capsys):
    source, out = make(kind, tmp_path / "set"), tmp_path / "out"
    words = [source, "--out", str(out), "--config", DEMO]
    assert extract.main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "Traceback" not in said
    shard = ["--shard", "1/2", "--skip-bad"]
    assert extract.main([*words[:1], "--out", str(tmp_path / "two"), *words[3:], *shard]) == 0
    shard[1] = "0/2"
    assert extract.main([*words[:1], "--out", str(tmp_path / "two"), *words[3:], *shard]) == 0
    # The folder of the refused attempt, where it began at all, goes on.
    assert extract.main([*words, "--skip-bad"]) == 0
    pairs = kind in ("subjects200k", "uno1m")
    train, held_out = (FeatureSource(out / split) for split in ("train", "held_out"))
    counts = len(train), len(held_out)
    assert counts == ((4, 2) if pairs else (2, 1))
    for split in ("train", "held_out"):
        for path in sorted((out / split).iterdir()):
            assert path.read_bytes() == (tmp_path / "two" / split / path.name).read_bytes()
    assert extract.main([*words, "--skip-bad"]) == 0, "it is there already"


@pytest.mark.parametrize("kind", KINDS)
def test_each_source_is_described(tmp_path, kind, capsys):
    source = make(kind, tmp_path / "set")
    sheet, found = tmp_path / "sheet.png", tmp_path / "found.json"
    words = ["describe", source, "--json", str(found), "--sheet", str(sheet), "--config", DEMO]
    assert data.main(words) == 0
    value = json.loads(found.read_text())
    assert value["examples"] == value["kept"] + sum(value["dropped"].values())
    pairs = kind in ("subjects200k", "uno1m")
    assert (value["rows"], value["examples"]) == ((6, 12) if pairs else (4, 4))
    if pairs:
        least = "score below 5" if kind == "subjects200k" else "score below 3.5"
        assert value["dropped"] == {least: 2, "score unknown": 2}
    assert len(value["unreadable"]) == (2 if pairs else 1)
    assert value["sizes"] == {
        what: {"64x64": 6 if pairs else 3} for what in ("target", "reference")
    }
    assert value["captions"]["too_long"] == 0
    assert 5 < value["captions"]["tokens"]["median"] < 60
    assert value["disk"]["bf16 all"] > value["disk"]["int8 all"] >= value["disk"]["int8 read"] > 0
    with Image.open(sheet) as image:
        assert image.convert("RGB").getpixel((160 + 40, 40)) == colour(0, kind == "uno1m")
    capsys.readouterr()
    assert (
        data.main(["describe", source, "--sheet", str(sheet), "--limit", "2", "--json", str(found)])
        == 0
    )
    assert json.loads(found.read_text())["kept"] == 2


def test_the_disk_that_is_told_is_the_disk_that_is_taken(tmp_path):
    """Records before compression, beside the arrays that one holds."""
    source = make("webdataset", tmp_path / "set")
    words = ["--config", DEMO, "--limit", "3"]
    found = ["--json", str(tmp_path / "f.json"), "--sheet", str(tmp_path / "s.png")]
    assert data.main(["describe", source, *found, *words]) == 0
    assert extract.main([source, "--out", str(tmp_path / "out"), *words]) == 0
    read = FeatureSource(tmp_path / "out" / "train")
    taken = [
        record.text.nbytes + record.image.nbytes + record.target.nbytes
        + sum(reference.nbytes for reference in record.references)
        for record in (read[0], read[1])
    ]  # fmt: skip
    told = json.loads((tmp_path / "f.json").read_text())["disk"]["bf16 all"] / 3
    assert told == pytest.approx(sum(taken) / 2, rel=0.02)


@pytest.mark.parametrize("share", ["0/0", "2/2", "one"])
def test_an_impossible_share_is_refused_before_anything_is_read(tmp_path, share, capsys):
    source, out = make("webdataset", tmp_path / "set"), tmp_path / "out"
    words = [source, "--out", str(out), "--config", DEMO, "--shard", share, "--skip-bad"]
    assert extract.main(words) == 2
    assert "shard" in capsys.readouterr().err
    assert not out.exists()


def test_extract_takes_fields_of_the_preset(tmp_path, capsys):
    source = make("jsonl", tmp_path / "set")
    words = [source, "--out", str(tmp_path / "out"), "--config", DEMO, "--skip-bad"]
    assert extract.main([*words, "--data.codec", "int8", "--data.max-text-tokens", "90"]) == 0
    metadata = read_metadata(tmp_path / "out" / "train")
    assert (metadata.codec, metadata.settings["max_text_tokens"]) == ("int8", 90)
    assert extract.main([*words, "--data.codec", "int8", "--data.long-captions", "cut"]) == 2
    assert "holds an extraction with" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["describ", "a.json"]])
def test_data_names_its_command(words, capsys):
    assert data.main(words) == 2
    assert "data describe SOURCE" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["describe"], []])
def test_a_source_that_is_not_there_is_one_sentence(command, tmp_path, capsys):
    main = data.main if command else extract.main
    more = [] if command else ["--out", str(tmp_path / "out"), "--config", DEMO]
    assert main([*command, f"uno1m:{tmp_path / 'absent'}", *more]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_limit_of_nothing_is_not_everything(tmp_path, capsys):
    source = make("webdataset", tmp_path / "set")
    words = [source, "--out", str(tmp_path / "out"), "--config", DEMO, "--limit", "0"]
    assert extract.main(words) == 2
    assert "limit" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
