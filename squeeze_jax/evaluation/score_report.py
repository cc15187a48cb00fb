"""The report of a scored picture set."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from squeeze_jax.data.images import load_image
from squeeze_jax.evaluation import paper, similarity
from squeeze_jax.evaluation.dreambench import PROMPTS, SUBJECTS
from squeeze_jax.evaluation.picture_set import PictureSet, name_group
from squeeze_jax.evaluation.report import Cell, Picture, Plot, Report, Section, Table, draw_plot
from squeeze_jax.evaluation.score_pictures import Results
from squeeze_jax.evaluation.similarity import Estimate, group_means, overall_means

if TYPE_CHECKING:
    from matplotlib.axes import Axes  # pyright: ignore[reportMissingImports]

Item = TypeVar("Item")
COLUMNS = ("DINO-I all", "CLIP-I all", "DINO-I fixed", "CLIP-I fixed", "CLIP-T")
SHOWN = 4
"""Prompts of a subject whose first picture is shown."""
THUMBNAIL = 160
"""Longest side of a picture on the page, in pixels."""
SUSPECT = 0.80
"""DINO-I above which a system probably copies: real pictures of a subject have about 0.77."""


def make_report(results: Results) -> Report:
    """Scores beside the paper's, by subject, the check for copies, pictures, and every choice."""
    pictures = results.pictures
    name = pictures.system.get("checkpoint") or pictures.system.get("name") or "a system"
    return Report(
        f"{pictures.suite}: {name}",
        [
            Section("Scores", _scores(results)),
            Section("By subject", _by_subject(results)),
            Section("Copies", _copies(results)),
            Section("Pictures", [picture_table(pictures, results.paths)]),
            Section("Choices", [_choices(results)]),
        ],
    )


def _scores(results: Results) -> list[str | Table]:
    rows = [
        ("this system", results.system),
        ("its reference, copied unchanged", results.copied),
        ("real pictures among themselves", results.real),
    ]
    parts: list[str | Table] = [
        Table(
            ["", *COLUMNS],
            [[label, *_cells(overall_means(scores))] for label, scores in rows if scores],
            "Means with 95 % intervals. “all”: compared with all real pictures of the subject; "
            "“fixed”: with one.",
        )
    ]
    if results.pictures.suite == "dreambench":
        groups = {one.group for one in results.system}
        whole = len(groups) == SUBJECTS and len(results.system) == SUBJECTS * PROMPTS
        note = "" if whole else (
            f" These are {len(results.system)} prompts about {len(groups)} subjects, not the whole "
            f"set of {SUBJECTS * PROMPTS} about {SUBJECTS}: do not compare."
        )  # fmt: skip
        table = Table(
            ["method", "DINO-I", "CLIP-I", "CLIP-T"],
            paper.DREAMBENCH,
            f"What the paper reports; it does not say which pairing it took.{note}",
        )
        parts.append(table)
    return parts


def _by_subject(results: Results) -> list[Table | Plot]:
    groups = group_means(results.system)
    table = Table(["subject", *COLUMNS], [[name, *_cells(one)] for name, one in groups.items()])
    if not any("DINO-I all" in one for one in groups.values()):
        return [table]
    return [table, _plot(groups, group_means(results.real), group_means(results.copied))]


def _plot(
    system: Mapping[str, Mapping[str, Estimate]],
    real: Mapping[str, Mapping[str, Estimate]],
    copied: Mapping[str, Mapping[str, Estimate]],
) -> Plot:
    names = [name for name, means in system.items() if "DINO-I all" in means][::-1]

    def draw(axes: "Axes") -> None:
        means = [system[name]["DINO-I all"] for name in names]
        for i, one in enumerate(means):
            if one.low is not None and one.high is not None:
                axes.plot([one.low, one.high], [i, i], color="C0", linewidth=1.5)
        axes.plot([one.value for one in means], range(len(names)), "o", label="this system")
        for others, mark, label in (
            (real, "|", "real pictures among themselves"),
            (copied, "x", "the reference, copied"),
        ):
            there = [i for i, name in enumerate(names) if name in others]
            values = [others[names[i]]["DINO-I all"].value for i in there]
            axes.plot(values, there, mark, color="0.3", markersize=9, label=label)
        axes.set_yticks(range(len(names)), names)
        axes.set(xlabel="DINO-I, all real pictures", ylim=(-0.7, len(names) - 0.3))
        axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)

    return draw_plot(
        draw, "DINO-I of each subject, with 95 % intervals over prompts", 1.2 + 0.24 * len(names)
    )


def _copies(results: Results) -> list[str | Table]:
    if not results.copying:
        return ["No prompt has a reference."]
    rows = [[name, *one, _verdict(one)] for name, one in results.copying.items()]
    columns = ["subject", "to the reference", "real pictures", "closest real pair", "nearer than "
               "that", ""]  # fmt: skip
    return [
        "How near pictures are to the reference that was shown, by DINO, beside how near different "
        "real pictures of the subject are to each other. A system that draws the subject anew is "
        f"not nearer than those are; DINO-I above {SUSPECT:.2f} suspects copying.",
        Table(columns, rows),
    ]


def _verdict(one: similarity.Copying) -> str:
    if one.real is None:
        return "suspect" if one.to_reference > SUSPECT else ""
    return "suspect" if one.to_reference > one.real else ""


def report_pictures(pictures: PictureSet, folder: Path) -> Report:
    """A set that is drawn and not scored yet."""
    name = pictures.system.get("checkpoint") or pictures.system.get("name") or "a system"
    parts = ["None yet: docs/evaluation.md says how `score` makes them."]
    table = picture_table(pictures, pictures.pictures(folder))
    system = Table(["what", "value"], [[key, str(one)] for key, one in pictures.system.items()])
    sections = [Section("Scores", parts), Section("Pictures", [table]), Section("System", [system])]
    return Report(f"{pictures.suite}: {name}", sections)


def picture_table(pictures: PictureSet, paths: Sequence[Sequence[Path]]) -> Table:
    """A row a subject: the reference, then the first picture of some of its prompts. Of prompts
    about no subject, a row each with its own pictures. paths: those of each prompt."""
    rows: list[list[Cell]] = []
    numbers: dict[str, list[int]] = {}
    for i, prompt in enumerate(pictures.prompts):
        label = name_group(prompt.subjects) if prompt.subjects else prompt.name
        numbers.setdefault(label, []).append(i)
    for label, own in list(numbers.items())[:SUBJECTS]:
        reference = pictures.reference_paths(pictures.prompts[own[0]])[:1]
        files = [(paths[i][0], i) for i in spread(own, SHOWN)]
        if len(own) == 1:
            files = [(path, own[0]) for path in paths[own[0]][:SHOWN]]
        cells: list[Cell] = [thumbnail(path, "reference") for path in reference] or [None]
        cells += [thumbnail(path, pictures.prompts[i].text) for path, i in files]
        rows.append([label, *cells])
    width = max(len(row) for row in rows)
    columns = ["", "reference", *["picture"] * (width - 2)]
    return Table(columns, [[*row, *[None] * (width - len(row))] for row in rows])


def spread(items: Sequence[Item], most: int) -> list[Item]:
    """At most so many, evenly over the list."""
    step = max(1, len(items) // most)
    return list(items[::step][:most])


def thumbnail(path: Path, caption: str) -> Picture:
    """A picture file, small enough for a page."""
    image = load_image(path)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return Picture(image, caption, THUMBNAIL)


def _choices(results: Results) -> Table:
    return Table(["what", "value"], list(results.choices.items()))


def _cells(means: Mapping[str, Estimate]) -> list[Cell]:
    return [show(means.get(name)) for name in COLUMNS]


def show(one: Estimate | None) -> str | None:
    """`0.7482 (0.730–0.766)`."""
    if one is None:
        return None
    interval = "" if one.low is None else f" ({one.low:.3f}–{one.high:.3f})"
    return f"{one.value:.4f}{interval}"
