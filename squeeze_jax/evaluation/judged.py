"""Pictures for a judge model: the request file that it is given, and what it says.

`requests.jsonl` has one picture a line, with absolute paths:

    {"id": "0007-0", "prompt": "…", "references": ["/…/cat.jpg"], "picture": "/…/0007-0.png",
     "rubric": "<rubric>", "extra": {…}}

`rubric` is a placeholder: the judge's own, with its model and temperature, are the user's to bring.
What comes back is one reply a line, several of a picture where the judge was asked again:

    {"id": "0007-0", "scores": {"concept": 3, "prompt": "Score: 4"}}

A score is a number, or text with exactly one number in it. What cannot be read is counted as
missing and said; it is never replaced by a guess.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from squeeze_jax.data.manifest import read_text_file
from squeeze_jax.errors import InputError
from squeeze_jax.evaluation.picture_set import PictureSet
from squeeze_jax.evaluation.report import (
    Cell,
    Report,
    Section,
    Table,
    print_report,
    write_report,
)
from squeeze_jax.evaluation.score_report import show, thumbnail
from squeeze_jax.evaluation.similarity import Estimate, estimate
from squeeze_jax.interop.tensors import read_json
from squeeze_jax.storage import write_whole

REQUESTS = "requests.jsonl"
RUBRIC = "<rubric>"
SHOWN = 4
"""Pictures shown of the best and of the worst."""


def write_requests(folder: Path, pictures: PictureSet) -> Path:
    """Writes requests.jsonl into a folder whose pictures are all there."""
    lines = [
        json.dumps(
            {
                "id": f"{prompt.name}-{i}",
                "prompt": prompt.text,
                "references": [str(p.absolute()) for p in pictures.reference_paths(prompt)],
                "picture": str(path.absolute()),
                "rubric": RUBRIC,
                "extra": dict(prompt.extra),
            },
            ensure_ascii=False,
        )
        for prompt, paths in zip(pictures.prompts, pictures.pictures(folder), strict=True)
        for i, path in enumerate(paths)
    ]
    out = folder / REQUESTS
    write_whole(out, lambda part: part.write_text("\n".join(lines) + "\n", encoding="utf-8"))
    return out


@dataclass
class Replies:
    """What a judge said, as far as it can be read."""

    scores: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """Name of the score → id → one number a reply."""
    count: int = 0
    problems: list[str] = field(default_factory=list)
    """One sentence for each score or line that cannot be read."""


def read_replies(
    path: Path, ids: Sequence[str], scale: tuple[float, float] | None = None
) -> Replies:
    """Reads replies to requests of these ids. Raises InputError for a file that is no text."""
    try:
        text = read_text_file(path, "give the judge's replies as JSON lines").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from None
    known, replies = set(ids), Replies()
    for number, line in enumerate(text.split("\n"), 1):  # JSON may hold other ends of lines
        if not line.strip():
            continue
        replies.count += 1
        try:
            identity, scores = _reply(line, known)
        except ValueError as error:
            replies.problems.append(f"line {number}: {error}")
            continue
        for name, value in scores.items():
            try:
                score = _number(value, scale)
            except (ValueError, OverflowError) as error:  # the second: of 400 digits
                replies.problems.append(f"line {number}, {name!r} of {identity}: {error}")
                replies.scores.setdefault(name, {})
            else:
                replies.scores.setdefault(name, {}).setdefault(identity, []).append(score)
    return replies


def _reply(line: str, known: set[str]) -> tuple[str, Mapping[str, Any]]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    if not isinstance(value, dict) or not isinstance(value.get("scores"), dict):
        raise ValueError('no object with "id" and "scores"')
    identity = value.get("id")
    if not isinstance(identity, str) or identity not in known:
        raise ValueError(f"no picture has the id {identity!r}")
    return identity, value["scores"]


def _number(value: object, scale: tuple[float, float] | None) -> float:
    if isinstance(value, str):
        found = re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?(?![\w.]*\w)", value)
        if len(found) != 1:
            raise ValueError(f"{len(found)} numbers in {value[:60]!r}, one is wanted")
        value = float(found[0])
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{str(value)[:60]!r} is no number")
    if scale is not None and not scale[0] <= value <= scale[1]:
        raise ValueError(f"{value:g} is not from {scale[0]:g} to {scale[1]:g}")
    return float(value)


def score_replies(
    folder: Path,
    pictures: PictureSet,
    judged: Path,
    out: Path,
    scale: tuple[float, float] | None = None,
) -> None:
    """Tabulates replies, prints what cannot be read, and writes report.html and scores.json. Raises
    InputError where no reply can be read, the scale is upside down, or `out` has other scores."""
    check_no_other_scores(out, judged=True)
    if scale is not None and not scale[0] < scale[1]:
        raise InputError(f"--scale {scale[0]:g} {scale[1]:g}: the lowest score comes first")
    paths = pictures.pictures(folder)
    rows = [[f"{prompt.name}-{i}" for i in range(pictures.images)] for prompt in pictures.prompts]
    ids = [one for row in rows for one in row]
    replies = read_replies(judged, ids, scale)
    if not any(replies.scores.values()):
        first = f"; {replies.problems[0]}" if replies.problems else ""
        raise InputError(f"{judged}: no reply can be read{first}")
    for problem in replies.problems[:5]:
        print(f"warning: {problem}")
    if len(replies.problems) > 5:
        print(f"warning: {len(replies.problems) - 5} more scores or lines cannot be read")
    means = {
        name: {one: float(np.mean(values)) for one, values in found.items()}
        for name, found in replies.scores.items()
    }
    rated = {name: _estimate(rows, found) for name, found in means.items()}
    for name, found in means.items():
        if absent := len(ids) - len(found):
            print(f"warning: {name!r}: {absent} of {len(ids)} pictures have no score: left out")
    report = Report(
        f"{pictures.suite}: what {judged.name} says",
        [
            Section("Scores", _tables(means, rated, replies, len(ids), scale)),
            Section("Best and worst", [_pictures(pictures, paths, ids, means)]),
            Section("What cannot be read", replies.problems or ["Nothing: every reply was read."]),
        ],
    )
    print_report(report)
    scores = {
        "suite": pictures.suite,
        "pictures": str(folder),
        "system": dict(pictures.system),
        "judged": str(judged),
        "scale": scale,
        "scores": {
            name: {**one._asdict(), "pictures": len(means[name]), "missing": len(ids) - len(
                means[name])} for name, one in rated.items() if one is not None
        },
        "replies": replies.count,
        "problems": replies.problems,
        "of each picture": {
            one: {name: found[one] for name, found in means.items() if one in found} for one in ids
        },
    }  # fmt: skip
    write_report(out, report, scores)
    print(f"report: {out / 'report.html'}")


def check_no_other_scores(folder: Path, *, judged: bool) -> None:
    """Raises InputError where `folder` has a report of the other kind, which would be lost: of a
    judge model's scores (`judged`), or any others."""
    scores = folder / "scores.json"
    if scores.exists() and ("judged" in read_json(scores)) != judged:
        kind = "that no judge model gave" if judged else "of a judge model"
        raise InputError(f"{scores} holds scores {kind}; give another folder with --out")


def _estimate(rows: Sequence[Sequence[str]], scores: Mapping[str, float]) -> Estimate | None:
    """Mean over the pictures that have a score; its interval resamples prompts."""
    of_prompts = [[scores[one] for one in row if one in scores] for row in rows]
    values = [float(np.mean(row)) for row in of_prompts if row]
    return estimate(values) if values else None


def _tables(
    means: Mapping[str, Mapping[str, float]],
    rated: Mapping[str, Estimate | None],
    replies: Replies,
    count: int,
    scale: tuple[float, float] | None,
) -> list[str | Table]:
    rows: list[list[Cell]] = []
    for name, one in rated.items():
        found = replies.scores[name]
        share = None
        if one is not None and scale is not None:
            share = (one.value - scale[0]) / (scale[1] - scale[0])
        rows.append(
            [name, show(one), share, len(found), count - len(found), sum(map(len, found.values()))]
        )
    columns = ["score", "mean (95 %)", "share of the scale", "pictures", "missing", "replies"]
    parts: list[str | Table] = [
        f"{replies.count} replies for {count} pictures. Several replies to one picture are "
        "averaged; intervals resample prompts. A picture without a score that can be read is "
        "missing and left out of the mean.",
        Table(columns, rows),
    ]
    if len(means) > 1 and all(rated.values()):
        common = set.intersection(*(set(found) for found in means.values()))
        roots = [
            math.prod(max(found[one], 0) for found in means.values()) ** (1 / len(means))
            for one in sorted(common)
        ]
        low, span = (scale[0], scale[1] - scale[0]) if scale else (0.0, 1.0)
        product = math.prod((one.value - low) / span for one in rated.values() if one)
        of_what = "means as shares of the scale" if scale else "means"
        together: list[list[Cell]] = [
            [f"product of the {of_what} (DreamBench++)", product],
            [f"mean over {len(common)} pictures of the scores' geometric mean (OmniContext)",
             float(np.mean(roots)) if roots else None],
        ]  # fmt: skip
        parts.append(Table(["all scores together", "value"], together))
    return parts


def _pictures(
    pictures: PictureSet,
    paths: Sequence[Sequence[Path]],
    ids: Sequence[str],
    means: Mapping[str, Mapping[str, float]],
) -> Table:
    """The pictures with the highest and the lowest sum of scores."""
    files = [path for row in paths for path in row]
    prompt_of = [prompt for prompt in pictures.prompts for _ in range(pictures.images)]
    rated = [k for k, one in enumerate(ids) if all(one in found for found in means.values())]
    rated.sort(key=lambda k: -sum(found[ids[k]] for found in means.values()))
    chosen = rated if len(rated) <= 2 * SHOWN else rated[:SHOWN] + rated[-SHOWN:]
    rows: list[list[Cell]] = []
    for k in chosen:
        shown = [thumbnail(path, "") for path in pictures.reference_paths(prompt_of[k])[:1]]
        own = [found[ids[k]] for found in means.values()]
        rows.append([
            ids[k], prompt_of[k].text, shown[0] if shown else None, thumbnail(files[k], ""), *own
        ])  # fmt: skip
    return Table(["id", "prompt", "reference", "picture", *means], rows, digits=2)
