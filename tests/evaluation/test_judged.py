"""What a judge model is asked, and what it answers: read, averaged, or counted as missing."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from squeeze_jax.errors import InputError
from squeeze_jax.evaluation.judged import read_replies, score_replies, write_requests
from squeeze_jax.evaluation.picture_set import PictureSet, Prompt, begin_picture_set

PROMPTS = (Prompt("0000", "a cat", ("cat.png",), (), {"task": "t"}), Prompt("0001", "rain", ()))


@pytest.fixture
def folder(tmp_path):
    pictures = PictureSet("prompts", tmp_path / "references", 2, {"checkpoint": "a"}, PROMPTS)
    begin_picture_set(tmp_path, pictures)
    (tmp_path / "references").mkdir()
    for path in ("references/cat.png", "0000-0.png", "0000-1.png", "0001-0.png", "0001-1.png"):
        Image.new("RGB", (32, 32), "red").save(tmp_path / path)
    return tmp_path, pictures


def test_a_request_a_picture(folder):
    place, pictures = folder
    lines = [json.loads(line) for line in write_requests(place, pictures).read_text().splitlines()]
    assert [line["id"] for line in lines] == ["0000-0", "0000-1", "0001-0", "0001-1"]
    assert lines[0] == {
        "id": "0000-0",
        "prompt": "a cat",
        "references": [str(place / "references" / "cat.png")],
        "picture": str(place / "0000-0.png"),
        "rubric": "<rubric>",
        "extra": {"task": "t"},
    }
    assert lines[2]["references"] == []


def test_shards_that_end_or_begin_at_once_do_not_disturb_each_other(folder, monkeypatch):
    """Between what one writes and its renaming another one does all of the same."""
    place, pictures = folder
    replace = Path.replace
    for name, write in (
        ("pictures.json", begin_picture_set), ("requests.jsonl", write_requests)
    ):  # fmt: skip
        (place / name).unlink(missing_ok=True)

        def later(part, target, write=write):
            monkeypatch.setattr(Path, "replace", replace)
            write(place, pictures)
            return replace(part, target)

        monkeypatch.setattr(Path, "replace", later)
        write(place, pictures)
        assert (place / name).is_file() and not list(place.glob("*.part"))


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ("3", 3.0), ('"Score: 3"', 3.0), ('"**4**."', 4.0), ("2.5", 2.5), ('"-1"', None),
        ('"3 of 4"', None), ('"3/4"', None), ('"none"', None), ("null", None), ("true", None),
        ("9", None), ("NaN", None), ('"v2"', None), ("[3]", None), ('"score_3: 1.5"', 1.5),
    ],
)  # fmt: skip
def test_a_score_is_a_number_or_text_with_one(tmp_path, said, read):
    path = tmp_path / "replies.jsonl"
    path.write_text(f'{{"id": "a", "scores": {{"s": {said}}}}}\n')
    found = read_replies(path, ["a"], (0.0, 4.0))
    assert found.scores["s"] == ({} if read is None else {"a": [read]})
    assert len(found.problems) == (read is None)


def test_what_cannot_be_read_is_missing_and_said(folder, capsys):
    place, pictures = folder
    replies = [
        '{"id": "0000-0", "scores": {"look": 4, "text": 2}}',
        '{"id": "0000-0", "scores": {"look": 2, "text": 2}}',
        '{"id": "0000-1", "scores": {"look": 1, "text": "2 or 3"}}',
        '{"id": "0001-0", "scores": {"look": 0, "text": 4}}',
        '{"id": "nobody", "scores": {"look": 4}}',
        "I am sorry, I cannot judge this.",
        '{"id": "0001-1"}',
    ]
    (place / "replies.jsonl").write_text("\n".join(replies))
    score_replies(place, pictures, place / "replies.jsonl", place / "out", (0.0, 4.0))
    shown = capsys.readouterr().out
    for said in ("line 3, 'text' of 0000-1: 2 numbers", "no picture has the id 'nobody'",
                 "line 6: not JSON", "line 7: no object", "'text': 2 of 4 pictures"):  # fmt: skip
        assert said in shown
    scores = json.loads((place / "out" / "scores.json").read_text())
    look, text = scores["scores"]["look"], scores["scores"]["text"]
    # Replies to a picture are averaged, then pictures of a prompt, then prompts.
    assert look["value"] == np.mean([np.mean([3, 1]), 0]) and look["missing"] == 1
    assert text["value"] == np.mean([2, 4]) and text["missing"] == 2
    page = (place / "out" / "report.html").read_text()
    product = look["value"] / 4 * text["value"] / 4
    geometric = np.mean([math.sqrt(3 * 2), math.sqrt(0 * 4)])
    assert f"{product:.4f}" in page and f"{geometric:.4f}" in page


def test_hostile_replies_are_missing_and_said(tmp_path):
    path = tmp_path / "replies.jsonl"
    replies = [
        '{"id": ["a"], "scores": {"s": 1}}',
        '{"id": {}, "scores": {"s": 1}}',
        f'{{"id": "a", "scores": {{"s": 1{"0" * 400}}}}}',
        '{"id": "a", "scores": {"s": 2}, "why": "lines\u2028and\u0085pages"}',
    ]
    path.write_text("\r\n".join(replies), encoding="utf-8", newline="")
    for scale in (None, (0.0, 4.0)):
        found = read_replies(path, ["a"], scale)
        assert found.scores == {"s": {"a": [2.0]}}
        assert [problem[:6] for problem in found.problems] == ["line 1", "line 2", "line 3"]


def test_nothing_readable_is_refused(folder):
    place, pictures = folder
    (place / "replies.jsonl").write_text("sorry\n")
    with pytest.raises(InputError, match="no reply can be read; line 1: not JSON"):
        score_replies(place, pictures, place / "replies.jsonl", place / "out")
    assert not (place / "out").exists()
