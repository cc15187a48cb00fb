"""How a source is written; lists, lines and image folders."""

import json
from pathlib import Path

import pytest
from public_sets import (
    colour,
    corner,
    picture,
)
from source_checks import SKIP, all_of, opened

from squeeze_jax.data.sources import open_source, parse_source
from squeeze_jax.data.sources.contract import Options
from squeeze_jax.errors import InputError


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
        all_of(open_source(str(pictures / f"pairs.{end}"), Options()).rows)
        for end in ("jsonl", "json")
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
    for text in (
        'row 2: "prompt" is empty',
        "row 3: image_paths[0]",
        "row 5: is not JSON",
        "row 6: is not UTF-8",
    ):
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
    for text in (
        "row 2: has no reference_file_name",
        "row 3: image_paths[0]",
        "row 4: has no caption",
        'row 6: "file_name" is missing',
        "cut.png: ",
    ):
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
