"""Reports: one `report.html` that needs nothing else, `scores.json`, the tables on the terminal.

    report = Report("Two runs", [Section("Loss", ["Lower is better.", table, draw_lines(…)])])
    print_report(report)
    write_report(Path("out"), report, {"loss": 0.1})

The page holds text, tables and pictures alone: no script, and nothing is fetched.
"""

import base64
import html
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from rich.console import Console
from rich.table import Table as TerminalTable
from rich.text import Text

from squeeze_jax.errors import InputError, OutputError
from squeeze_jax.interop.tensors import write_beside

if TYPE_CHECKING:
    from matplotlib.axes import Axes  # pyright: ignore[reportMissingImports]

LOSSLESS_PIXELS = 128 * 128
"""Larger pictures are embedded as JPEG of quality 90, smaller ones as PNG."""

SHORT = 24
"""Letters of a text that is not broken into lines on the page."""


@dataclass(frozen=True)
class Picture:
    """A picture on the page, or in a cell of a table."""

    image: Image.Image
    caption: str = ""
    width: int | None = None
    """CSS pixels that it takes; None: its own width. It never grows past the page."""


@dataclass(frozen=True)
class Plot:
    """A drawn diagram (`draw_plot`, `draw_lines`)."""

    svg: bytes
    caption: str = ""


Cell = str | int | float | None | Picture
"""None is shown as a dash. Columns with pictures are left out on the terminal."""


@dataclass(frozen=True)
class Table:
    """Rows of as many cells as there are columns."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    digits: int = 4
    """Decimals of floats; format what needs others yourself."""
    best: Mapping[str, Callable[[Sequence[float]], float]] | None = None
    """Columns whose best number is set bold, each with `max` or `min`."""


Part = str | Table | Picture | Plot
"""A string is a paragraph of plain text."""


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Report:
    """A page."""

    title: str
    sections: Sequence[Section]


def write_report(folder: Path, report: Report, scores: Mapping[str, Any]) -> None:
    """Writes `folder`/scores.json and `folder`/report.html, each whole or not at all.

    scores: what JSON can hold; numbers that are not finite become null. Raises OutputError where
    the folder cannot be written.
    """
    text = json.dumps(_finite(scores), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    _write(folder, {"scores.json": text, "report.html": render_html(report)})


def write_page(folder: Path, report: Report) -> None:
    """Writes `folder`/report.html alone, of what has no scores. Raises as `write_report`."""
    _write(folder, {"report.html": render_html(report)})


def _write(folder: Path, files: Mapping[str, str]) -> None:
    try:
        for name, content in files.items():
            write_beside(
                folder / name, lambda part, text=content: part.write_text(text, encoding="utf-8")
            )
    except OSError as error:
        raise OutputError(f"{folder}: the report cannot be written ({error})") from None


def print_report(report: Report) -> None:
    """The tables of a report on the terminal, each below its section's title."""
    console = Console()
    if not console.is_terminal:  # into a file or a pipe: no cell is broken
        console = Console(width=200)
    for section in report.sections:
        tables = [_numbers_alone(part) for part in section.parts if isinstance(part, Table)]
        tables = [table for table in tables if len(table.columns) > 1]
        if tables:
            console.print(Text(section.title, "bold"))
        for table in tables:
            console.print(_terminal_table(table))


def require_matplotlib() -> None:
    """Raises InputError where diagrams cannot be drawn: call it before long work."""
    try:
        import matplotlib.figure  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(
            'reports draw their diagrams with matplotlib: pip install "squeeze-jax[evaluate]"'
        ) from None


def draw_plot(draw: Callable[["Axes"], object], caption: str = "", height: float = 3.2) -> Plot:
    """A diagram that `draw` puts on matplotlib's axes; 7.2 by `height` inches, as SVG.

    Raises InputError where matplotlib is not installed.
    """
    require_matplotlib()
    import matplotlib as mpl  # pyright: ignore[reportMissingImports]
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    # Letters as outlines look alike everywhere; the salt makes equal diagrams equal bytes.
    with mpl.rc_context({"svg.fonttype": "path", "svg.hashsalt": "squeeze_jax"}):
        figure = Figure(figsize=(7.2, height), layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        draw(axes)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return Plot(file.getvalue(), caption)


Numbers = Sequence[int | float]


def draw_lines(
    lines: Mapping[str, tuple[Numbers, Numbers]],
    x: str,
    y: str,
    caption: str = "",
    log_y: bool = False,
) -> Plot:
    """One line for each name, from its x and y values; `x` and `y` label the axes."""

    def draw(axes: "Axes") -> None:
        for name, (horizontal, vertical) in lines.items():
            axes.plot(horizontal, vertical, label=name, linewidth=1.2)
        axes.set(xlabel=x, ylabel=y, yscale="log" if log_y else "linear")
        if len(lines) > 1:
            axes.legend(frameon=False)

    return draw_plot(draw, caption)


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1200px; margin: 2em auto;
  padding: 0 1em; }
h1 { font-size: 1.6em; } h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #ccc; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums; }
caption, figcaption { color: #555; text-align: left; font-size: .9em; padding: .3em 0; }
th, td { padding: .25em .8em; text-align: left; vertical-align: top; }
th { border-bottom: 2px solid #888; } td { border-bottom: 1px solid #e4e4e4; }
td.number { text-align: right; } td.short { white-space: nowrap; }
figure { display: inline-block; margin: .3em 1em .3em 0; vertical-align: top; }
td figure { margin: 0; }
img { max-width: 100%; height: auto; }
"""
# A browser that obeys this fetches and runs nothing, whatever a caption says.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def render_html(report: Report) -> str:
    """The whole page."""
    title = html.escape(report.title)
    lines = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width">',
        f"<title>{title}</title><style>{STYLE}</style></head><body>",
        f"<h1>{title}</h1>",
    ]
    for section in report.sections:
        lines.append(f"<h2>{html.escape(section.title)}</h2>")
        lines += [_part_html(part) for part in section.parts]
    return "\n".join([*lines, "</body></html>\n"])


def _part_html(part: Part) -> str:
    if isinstance(part, str):
        return f"<p>{html.escape(part)}</p>"
    if isinstance(part, Picture):
        return _picture_html(part)
    if isinstance(part, Plot):
        return _figure("image/svg+xml", part.svg, part.caption, "")
    best = _best_cells(part)
    head = "".join(f"<th>{html.escape(column)}</th>" for column in part.columns)
    rows = "\n".join(
        "<tr>" + "".join(_cell_html(part, cell, (i, k) in best) for k, cell in enumerate(row))
        + "</tr>"
        for i, row in enumerate(part.rows)
    )  # fmt: skip
    caption = f"<caption>{html.escape(part.caption)}</caption>" if part.caption else ""
    return (
        f'<div class="wide"><table>{caption}<thead><tr>{head}</tr></thead>'
        f"<tbody>\n{rows}\n</tbody></table></div>"
    )


def _cell_html(table: Table, cell: Cell, bold: bool) -> str:
    if isinstance(cell, Picture):
        return f"<td>{_picture_html(cell)}</td>"
    text = html.escape(_cell_text(table, cell))
    kind = ' class="number"' if isinstance(cell, int | float) else ""
    kind = ' class="short"' if isinstance(cell, str) and len(cell) <= SHORT else kind
    return f"<td{kind}>{f'<b>{text}</b>' if bold else text}</td>"


def _picture_html(picture: Picture) -> str:
    image = picture.image.convert("RGB")
    lossless = image.width * image.height <= LOSSLESS_PIXELS
    file = io.BytesIO()
    if lossless:
        image.save(file, "PNG", optimize=True)
    else:
        image.save(file, "JPEG", quality=90)
    width = f' width="{picture.width or image.width}"'
    kind = "image/png" if lossless else "image/jpeg"
    return _figure(kind, file.getvalue(), picture.caption, width)


def _figure(kind: str, content: bytes, caption: str, attributes: str) -> str:
    data = base64.b64encode(content).decode("ascii")
    text = html.escape(caption)
    below = f"<figcaption>{text}</figcaption>" if caption else ""
    return f'<figure><img alt="{text}" src="data:{kind};base64,{data}"{attributes}>{below}</figure>'


def _cell_text(table: Table, cell: str | int | float | None) -> str:
    if cell is None or (isinstance(cell, float) and not math.isfinite(cell)):
        return "–"
    if isinstance(cell, float):
        return f"{cell:.{table.digits}f}"
    return f"{cell:,}" if isinstance(cell, int) else cell


def _best_cells(table: Table) -> set[tuple[int, int]]:
    """(row, column) of what is set bold."""
    cells: set[tuple[int, int]] = set()
    for name, choose in (table.best or {}).items():
        k = list(table.columns).index(name)
        numbers = {
            i: float(cell)
            for i, row in enumerate(table.rows)
            if isinstance(cell := row[k], int | float) and math.isfinite(cell)
        }
        if len(numbers) > 1:
            best = choose(list(numbers.values()))
            cells |= {(i, k) for i, number in numbers.items() if number == best}
    return cells


def _numbers_alone(table: Table) -> Table:
    """A table without the columns that hold pictures or nothing."""
    columns = [[row[k] for row in table.rows] for k in range(len(table.columns))]
    kept = [
        k for k, cells in enumerate(columns)
        if not any(isinstance(cell, Picture) for cell in cells)
        and (not cells or any(cell is not None for cell in cells))
    ]  # fmt: skip
    names = [table.columns[k] for k in kept]
    best = {name: choose for name, choose in (table.best or {}).items() if name in names}
    rows = [[row[k] for k in kept] for row in table.rows]
    return replace(table, columns=names, rows=rows, best=best)


def _terminal_table(table: Table) -> TerminalTable:
    drawn = TerminalTable(
        caption=Text(table.caption) if table.caption else None, caption_justify="left"
    )
    best = _best_cells(table)
    for k, column in enumerate(table.columns):
        numeric = any(isinstance(row[k], int | float) for row in table.rows)
        drawn.add_column(Text(column), justify="right" if numeric else "left")
    for i, row in enumerate(table.rows):
        drawn.add_row(
            *(
                Text(_cell_text(table, cell), "bold" if (i, k) in best else "")
                for k, cell in enumerate(row)
                if not isinstance(cell, Picture)
            )
        )
    return drawn


def _finite(value: Any) -> Any:
    """A JSON value without NaN and infinities."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
