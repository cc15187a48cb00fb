"""Scores a picture set by DINO and CLIP: everything between the files and the report."""

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from squeeze_jax.errors import InputError
from squeeze_jax.evaluation import similarity
from squeeze_jax.evaluation.dreambench import FIXED, fixed_picture, real_pictures
from squeeze_jax.evaluation.features import picture_features, text_features
from squeeze_jax.evaluation.judges import Judge
from squeeze_jax.evaluation.picture_set import PictureSet, Prompt, check_references, name_group
from squeeze_jax.evaluation.similarity import Copying, Drawn, Estimate, PromptScores, Subject


class Results(NamedTuple):
    """Scores of a picture set."""

    pictures: PictureSet
    paths: list[list[Path]]
    """Files of each prompt."""
    system: list[PromptScores]
    copied: list[PromptScores]
    """Of the reference itself, in the place of every picture."""
    real: list[PromptScores]
    """Of real pictures among themselves; prompts about subjects with one picture are not there."""
    copying: dict[str, Copying]
    choices: dict[str, str]
    """Everything that a score depends on, in words."""


def score_pictures(
    folder: Path, pictures: PictureSet, dino: Judge, clip: Judge, cache: Path
) -> Results:
    """Scores all pictures of a set; features are kept in `cache`, so that a second call goes on.

    Raises InputError where a picture or a reference is missing or cannot be read.
    """
    paths = pictures.pictures(folder)
    check_references(pictures)
    drawn, real_paths = _index(pictures, paths)
    flat = [path for row in paths for path in row]
    judges = {"DINO": dino, "CLIP": clip}
    generated = {k: picture_features(judge, flat, cache, "drawn") for k, judge in judges.items()}
    real = (
        {k: picture_features(judge, real_paths, cache, "real") for k, judge in judges.items()}
        if real_paths
        else {k: features[:0] for k, features in generated.items()}
    )
    texts = text_features(clip, [prompt.text for prompt in pictures.prompts], cache)
    return Results(
        pictures,
        paths,
        similarity.score_prompts(drawn, generated, real, texts),
        similarity.copy_scores(drawn, real, texts),
        similarity.real_scores(drawn, real, texts),
        similarity.copying(drawn, generated["DINO"], real["DINO"]),
        _choices(pictures, dino, clip),
    )


def _index(pictures: PictureSet, paths: Sequence[Sequence[Path]]) -> tuple[list[Drawn], list[Path]]:
    """What belongs together, by number; real pictures are listed once."""
    numbers: dict[Path, int] = {}
    real_of: dict[str, list[Path]] = {}

    def number(path: Path) -> int:
        return numbers.setdefault(path, len(numbers))

    def subject(prompt: Prompt, place: int, name: str) -> Subject:
        if name not in real_of:
            if not (pictures.references / name).is_dir():
                raise InputError(f"{pictures.references / name}: no folder of this subject")
            real_of[name] = real_pictures(pictures.references / name)
        shown = pictures.reference_paths(prompt)
        fixed = shown[min(place, len(shown) - 1)]
        if name in FIXED:
            fixed = fixed_picture(pictures.references, name)
        return Subject(tuple(number(path) for path in real_of[name]), number(fixed))

    drawn, next_picture = [], 0
    for text, (prompt, files) in enumerate(zip(pictures.prompts, paths, strict=True)):
        shown = [number(path) for path in pictures.reference_paths(prompt)]
        if not shown:
            subjects = ()
        elif prompt.subjects:
            subjects = tuple(subject(prompt, i, name) for i, name in enumerate(prompt.subjects))
        else:
            subjects = tuple(Subject((reference,), reference) for reference in shown)
        own = tuple(range(next_picture, next_picture + len(files)))
        next_picture += len(files)
        reference = shown[0] if shown else None
        drawn.append(Drawn(name_group(prompt.subjects), text, own, reference, subjects))
    return drawn, list(numbers)


def _choices(pictures: PictureSet, dino: Judge, clip: Judge) -> dict[str, str]:
    others = sum(
        any(
            name in FIXED and Path(shown).stem != FIXED[name]
            for name, shown in zip(prompt.subjects, prompt.references)
        )
        for prompt in pictures.prompts
    )
    found = {
        "suite": pictures.suite,
        "prompts": f"{len(pictures.prompts)}, {pictures.images} pictures each",
        "subjects": str(len({p.subjects for p in pictures.prompts})),
        "references": str(pictures.references),
        "prompts shown another picture than Kosmos-G's table names": str(others),
        "pairing “all”": "mean cosine of a drawn picture and all real pictures of its subject, the "
        "reference among them",
        "pairing “fixed”": "cosine of a drawn picture and the one picture of its subject in "
        "Kosmos-G's table; of other subjects, the reference",
        "several subjects": "mean over the subjects",
        "CLIP-T": "cosine of picture and prompt, negative ones counted as 0",
        "means": "over a prompt's pictures, then its subject's prompts, then subjects",
        "intervals": "95 %, bootstrap percentiles of 10,000 resamples: of prompts for one subject, "
        "of subjects for all",
        "pictures": "whole, as files hold them: nothing is cut out or masked",
    }
    for name, judge in (("DINO", dino), ("CLIP", clip)):
        found |= {f"{name}: {key}": value for key, value in judge.choices.items()}
        found[f"{name}: digest of its files"] = judge.digest
    found |= {f"system: {key}": str(value) for key, value in pictures.system.items()}
    return found | {name: _version(name) for name in ("torch", "transformers", "pillow", "numpy")}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def to_json(results: Results, folder: Path) -> dict[str, Any]:
    """What scores.json holds."""

    def plain(means: Mapping[str, Estimate]) -> dict[str, Any]:
        return {name: value._asdict() for name, value in means.items()}

    def both(scores: Sequence[PromptScores]) -> dict[str, Any]:
        groups = similarity.group_means(scores)
        return {
            "overall": plain(similarity.overall_means(scores)) if scores else {},
            "groups": {group: plain(means) for group, means in groups.items()},
        }

    pictures = results.pictures
    return {
        "suite": pictures.suite,
        "pictures": str(folder),
        "system": dict(pictures.system),
        "scores": both(results.system),
        "reference copied unchanged": both(results.copied),
        "real pictures among themselves": both(results.real),
        "copying": {group: one._asdict() for group, one in results.copying.items()},
        "prompts": [
            {"name": prompt.name, "group": one.group, **one.scores}
            for prompt, one in zip(pictures.prompts, results.system, strict=True)
        ],
        "choices": results.choices,
        "python": platform.python_version(),
    }
