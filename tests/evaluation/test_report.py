"""Reports: read back with the standard library's parsers and Pillow."""

import base64
import io
import json
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from squeeze_jax.errors import InputError, OutputError
from squeeze_jax.evaluation.report import (
    Picture,
    Report,
    Section,
    Table,
    draw_lines,
    print_report,
    render_html,
    write_report,
)

RED = Image.fromarray(np.full((8, 12, 3), (250, 10, 20), np.uint8))
HOSTILE = '<script>alert("x")</script> & <img src="http://example.com/x.png">'


class Page(HTMLParser):
    """Elements and texts of a page."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        if data.strip():
            self.texts.append(data.strip())

    def pictures(self):
        for tag, attrs in self.elements:
            if tag == "img":
                kind, content = attrs["src"].split(";base64,")
                yield kind, base64.b64decode(content)


def test_a_page_shows_what_it_was_given_and_fetches_nothing():
    large = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 300, 3), np.uint8))
    table = Table(["name", "score", "picture"], [[HOSTILE, 0.5, Picture(RED)], ["b", None, "x"]])
    page = Page(render_html(Report(HOSTILE, [Section("S", ["text", table, Picture(large)])])))
    assert not [tag for tag, _ in page.elements if tag in ("script", "link", "iframe")]
    addresses = [v for _, attrs in page.elements for k, v in attrs.items() if k in ("src", "href")]
    assert addresses and all(address.startswith("data:") for address in addresses)
    assert page.texts.count(HOSTILE) == 3  # title, heading, cell
    assert {"text", "0.5000", "–"} <= set(page.texts)
    (small, png), (big, jpeg) = page.pictures()
    assert (small, big) == ("data:image/png", "data:image/jpeg")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png))), np.asarray(RED))
    assert Image.open(io.BytesIO(jpeg)).size == (300, 300)


def test_the_best_number_of_a_column_is_bold():
    table = Table(
        ["a", "b"], [[1, 0.5], [3, 0.25], [None, float("nan")]], best={"a": max, "b": min}
    )
    text = render_html(Report("t", [Section("s", [table])]))
    assert "<b>3</b>" in text and "<b>0.2500</b>" in text and text.count("<b>") == 2


def test_files_are_whole_and_numbers_that_are_none_become_null(tmp_path):
    write_report(tmp_path / "new", Report("t", []), {"a": float("nan"), "b": [1.5, float("inf")]})
    folder = tmp_path / "new"
    assert json.loads((folder / "scores.json").read_text()) == {"a": None, "b": [1.5, None]}
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "scores.json"]


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        write_report(tmp_path / "file", Report("t", []), {})


def test_the_terminal_shows_the_tables_in_whole_lines(capsys):
    row = ["[bold]not markup[/bold] :smile:", 0.12345, "x" * 60, "y" * 60]
    table = Table(["name", "score", "c", "d"], [row], digits=2)
    print_report(Report("t", [Section("Scores", ["paragraph", table])]))
    shown = capsys.readouterr().out
    assert "Scores" in shown and "paragraph" not in shown
    line = next(line for line in shown.splitlines() if "not markup" in line)
    assert row[0] in line and "0.12 " in line and "y" * 60 in line


def test_lines_are_drawn_as_svg_the_same_each_time():
    pytest.importorskip("matplotlib")
    lines = {"one": ([0, 1, 2], [3.0, 2.0, 1.0]), "two": ([0, 1], [1.0, 2.0])}
    plot = draw_lines(lines, "step", "loss", "Loss", log_y=True)
    assert plot == draw_lines(lines, "step", "loss", "Loss", log_y=True)
    assert b"<svg" in plot.svg and b"<script" not in plot.svg
    ((kind, content),) = Page(render_html(Report("t", [Section("s", [plot])]))).pictures()
    assert kind == "data:image/svg+xml" and content == plot.svg


def test_without_matplotlib_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"squeeze-jax\[evaluate\]"):
        draw_lines({"a": ([0], [1])}, "x", "y")
