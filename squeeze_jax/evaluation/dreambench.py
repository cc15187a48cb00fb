"""DreamBench (DreamBooth's set): its subjects, its prompts, and the picture that is shown of each.

    DIR/dataset/SUBJECT/00.jpg …      as published; DIR may also be `dataset` itself
    DIR/dataset/prompts_and_classes.txt

Prompts come from that file, or from a JSON file in UNO's schema.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from squeeze_jax.data.manifest import read_text_file
from squeeze_jax.errors import InputError
from squeeze_jax.evaluation.picture_set import SUFFIXES, Prompt, read_prompts

SUBJECTS, PROMPTS = 30, 25
"""Of the whole set: 750 prompts, of which the paper draws 4 pictures each."""
PROMPTS_FILE = "prompts_and_classes.txt"
LIVE = ("cat", "dog")
"""Classes that take the published file's second list of prompts; the first is for objects."""
FIXED = {
    "backpack": "02", "backpack_dog": "02", "bear_plushie": "03", "berry_bowl": "02", "can": "01",
    "candle": "02", "cat": "04", "cat2": "02", "clock": "03", "colorful_sneaker": "01",
    "dog": "02", "dog2": "02", "dog3": "05", "dog5": "00", "dog6": "02", "dog7": "01",
    "dog8": "04", "duck_toy": "01", "fancy_boot": "02", "grey_sloth_plushie": "04",
    "monster_toy": "04", "pink_sunglasses": "04", "poop_emoji": "00", "rc_car": "03",
    "red_cartoon": "00", "robot_toy": "00", "shiny_sneaker": "01", "teapot": "04", "vase": "02",
    "wolf_plushie": "04",
}  # fmt: skip
"""Kosmos-G's table: the number of the one picture of a subject that is shown, and compared with."""


def open_dataset(folder: Path) -> Path:
    """The folder that holds the subjects' folders. Raises InputError where there is none."""
    for place in (folder / "dataset", folder):
        if place.is_dir() and any(real_pictures(path) for path in _folders(place)):
            return place
    raise InputError(
        f"{folder}: no dataset/SUBJECT/00.jpg in it; give the folder of DreamBench as it is "
        "published"
    )


def real_pictures(folder: Path) -> list[Path]:
    """A subject's pictures, in the order of their names."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def fixed_picture(dataset: Path, subject: str) -> Path:
    """The subject's picture in Kosmos-G's table; of a subject that is not there, the first. Raises
    InputError where a picture of the table is missing."""
    pictures = real_pictures(dataset / subject)
    wanted = [path for path in pictures if path.stem == FIXED.get(subject)]
    if subject in FIXED and not wanted:
        raise InputError(
            f"{dataset / subject}: no picture {FIXED[subject]}, which is the one to show; download "
            "the set again"
        )
    return (wanted or pictures)[0]


def dreambench_prompts(dataset: Path, source: Path | None) -> tuple[Prompt, ...]:
    """All prompts, subject by subject: `source` is a JSON file in UNO's schema or of the published
    form; none: the published file in the data set's folder.

    Raises InputError for what cannot be used.
    """
    if source is not None and source.suffix == ".json":
        return _of_uno(dataset, source)
    source = dataset / PROMPTS_FILE if source is None else source
    classes, lists = _published(source)
    found = [path.name for path in _folders(dataset)]
    if unknown := [name for name in found if name not in classes]:
        raise InputError(f"{source}: says no class of {dataset / unknown[0]}")
    return tuple(
        Prompt(
            f"{subject}/{number:02d}",
            text.format(classes[subject]),
            (f"{subject}/{fixed_picture(dataset, subject).name}",),
            (subject,),
        )
        for subject in found
        for number, text in enumerate(lists[classes[subject] in LIVE])
    )


def _folders(dataset: Path) -> list[Path]:
    return sorted(p for p in dataset.iterdir() if p.is_dir() and not p.name.startswith("."))


def _published(path: Path) -> tuple[Mapping[str, str], tuple[list[str], list[str]]]:
    """Class of each subject; texts with {} for the class, for objects and for the living.

    The file lists `subject,class` and then two Python lists of `'a {0} {1} …'.format(…)`: a rare
    token, which is left out, and the class.
    """
    text = read_text_file(path, "give DreamBench's prompts, as published or as UNO's JSON").decode(
        "utf-8", "replace"
    )
    classes = dict(re.findall(r"^(\w+),([\w ]+?)\s*$", text, re.MULTILINE))
    classes.pop("subject_name", None)
    lists = [
        [line.replace("{0} ", "").replace("{1}", "{}") for line in re.findall(r"'([^'\n]+)'", part)]
        for part in text.split("prompt_list")[1:]
    ]
    if not classes or len(lists) != 2 or not all(lists):
        raise InputError(
            f"{path}: not DreamBench's {PROMPTS_FILE} (a table of classes, two lists of prompts)"
        )
    if bad := [line for part in lists for line in part if line.count("{}") != 1]:
        raise InputError(f"{path}: the prompt {bad[0]!r} does not name the class once")
    return classes, (lists[0], lists[1])


def _of_uno(dataset: Path, source: Path) -> tuple[Prompt, ...]:
    """UNO's rows, whose paths end in SUBJECT/PICTURE wherever they begin."""
    counts: dict[str, int] = {}
    prompts = []
    for row in read_prompts(source, dataset):
        subjects = tuple(Path(name).parent.name for name in row.references)
        group = "+".join(subjects)
        number = counts[group] = counts.get(group, -1) + 1
        prompts.append(
            Prompt(f"{group}/{number:02d}", row.text, row.references, subjects, row.extra)
        )
    return tuple(prompts)
