"""`score`: scores of pictures that are there, whoever drew them."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from squeeze_jax.commands.run import guarded


@dataclass(frozen=True)
class Score:
    """Scores a folder of pictures by DINO and CLIP, or tabulates what a judge model said of them.

    Started again, it goes on. docs/evaluation.md says how the folder is laid out.
    """

    pictures: Annotated[Path, tyro.conf.Positional]
    """Folder with pictures.json, as `evaluate` writes it."""
    out: Path | None = None
    """Folder for report.html and scores.json; default: the pictures' own."""
    dino: Path | None = None
    """Folder of facebook/dino-vits16."""
    clip: Path | None = None
    """Folder of openai/clip-vit-base-patch32."""
    references: Path | None = None
    """Where the references are, if not where pictures.json says: for DreamBench, its folder."""
    judged: Path | None = None
    """JSON lines that a judge model gave back for requests.jsonl."""
    scale: tuple[float, float] | None = None
    """Lowest and highest score that the judge may give; others are missing. Scores are also
    shown as a share of it."""


def main(arguments: list[str] | None = None) -> int:
    given = tyro.cli(
        Score, args=sys.argv[1:] if arguments is None else arguments, prog="squeeze_jax score"
    )
    return guarded(lambda: run(given))


def run(given: Score) -> None:
    from squeeze_jax.errors import InputError
    from squeeze_jax.evaluation.dreambench import open_dataset
    from squeeze_jax.evaluation.judged import score_replies
    from squeeze_jax.evaluation.picture_set import read_picture_set
    from squeeze_jax.evaluation.suites import load_judges, score_set
    from squeeze_jax.interop.tensors import check_writable

    out = given.out or given.pictures
    if given.scale is not None and given.judged is None:
        raise InputError("--scale is of a judge model's scores: give them too, with --judged FILE")
    check_writable(out / "report.html", "--out")
    pictures = read_picture_set(given.pictures, given.references)
    if given.references is not None and pictures.suite == "dreambench":
        pictures = read_picture_set(given.pictures, open_dataset(given.references))
    if given.judged is not None:
        if given.dino is not None or given.clip is not None:
            raise InputError("--judged stands alone; score by --dino and --clip in another call")
        score_replies(given.pictures, pictures, given.judged, out, given.scale)
        return
    judges = load_judges(given.dino, given.clip)
    if judges is None:
        raise InputError("nothing to score by: give --dino DIR --clip DIR, or --judged FILE")
    score_set(given.pictures, pictures, judges, out)
