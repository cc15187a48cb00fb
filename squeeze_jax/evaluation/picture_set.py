"""A folder of pictures to score: which prompts, which references, which pictures, made how.

    pictures.json      the list below
    dog/07-0.png       picture 0 of the prompt named dog/07
    dog/07-1.png

`pictures.json`:

    {"format": 1, "suite": "dreambench", "references": "/data/dreambooth/dataset",
     "images_per_prompt": 2, "system": {"checkpoint": "runs/stage2", "seed": 0, …},
     "prompts": [{"name": "dog/07", "prompt": "a dog on the beach", "references": ["dog/02.jpg"],
                  "subjects": ["dog"]}, …]}

Pictures of other systems are scored alike: write the list (`evaluate --list-only` does), say in
`system` what drew them, and put PNG, JPEG or WebP files beside it.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from squeeze_jax.data.manifest import check_rows, read_text_file
from squeeze_jax.errors import InputError
from squeeze_jax.interop.tensors import read_json
from squeeze_jax.storage import write_whole

MANIFEST = "pictures.json"
FORMAT = 1
"""Version of pictures.json."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Prompt:
    """One row of a suite."""

    name: str
    """Of its pictures, without number and suffix: `dog/07`."""
    text: str
    references: tuple[str, ...]
    """What the system is shown: paths in the set's folder of references."""
    subjects: tuple[str, ...] = ()
    """Folders of real pictures, in the same place; none: the references are all there are."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further keys of the row, for whoever judges."""


@dataclass(frozen=True)
class PictureSet:
    """What is drawn, and by whom."""

    suite: str
    references: Path
    """Folder that the paths of references begin in."""
    images: int
    """Pictures a prompt."""
    system: Mapping[str, Any]
    """What drew them: checkpoint, settings, seed, digests."""
    prompts: tuple[Prompt, ...]

    def find(self, folder: Path, prompt: Prompt, i: int) -> Path | None:
        """The file of picture `i` of a prompt, if it is there."""
        paths = (folder / f"{prompt.name}-{i}{suffix}" for suffix in SUFFIXES)
        return next((path for path in paths if path.is_file()), None)

    def missing(self, folder: Path) -> list[str]:
        """Names of pictures that are not there yet."""
        return [
            f"{prompt.name}-{i}"
            for prompt in self.prompts
            for i in range(self.images)
            if self.find(folder, prompt, i) is None
        ]

    def pictures(self, folder: Path) -> list[list[Path]]:
        """The files of each prompt. Raises InputError where some are missing: the mean over those
        that happen to be there is nobody's score."""
        if absent := self.missing(folder):
            raise InputError(
                f"{folder}: {len(absent)} of {len(self.prompts) * self.images} pictures are "
                f"missing, the first is {absent[0]}; start `evaluate` again, it goes on, or draw "
                "them"
            )
        found = [[self.find(folder, p, i) for i in range(self.images)] for p in self.prompts]
        return [[path for path in row if path is not None] for row in found]

    def reference_paths(self, prompt: Prompt) -> list[Path]:
        """The files of a prompt's references."""
        return [self.references / name for name in prompt.references]

    def to_json(self) -> dict[str, Any]:
        """As pictures.json holds it."""
        return {
            "format": FORMAT,
            "suite": self.suite,
            "references": str(self.references),
            "images_per_prompt": self.images,
            "system": dict(self.system),
            "prompts": [
                {"name": p.name, "prompt": p.text, "references": list(p.references)}
                | ({"subjects": list(p.subjects)} if p.subjects else {})
                | ({"extra": dict(p.extra)} if p.extra else {})
                for p in self.prompts
            ],
        }


def begin_picture_set(folder: Path, wanted: PictureSet) -> None:
    """Writes the list, or checks that the one which is there is the same.

    Where the references lie may differ, from one machine to another. Raises InputError, naming what
    differs, where the folder's pictures were made otherwise.
    """
    path = folder / MANIFEST
    new = json.loads(json.dumps(wanted.to_json()))
    if not path.exists():  # shards may write it at once
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(new, indent=1) + "\n"
        write_whole(path, lambda part: part.write_text(text))
        return
    old = read_json(path)
    differing = [
        name for name in old | new if name != "references" and old.get(name) != new.get(name)
    ]
    if not differing:
        return
    said = ", ".join(differing)
    if differing == ["system"] and isinstance(old["system"], dict):
        before, now = old["system"], new["system"]
        said = ", ".join(
            f"{name} {before.get(name)!r} there and {now.get(name)!r} here"
            for name in before | now
            if before.get(name) != now.get(name)
        )
    raise InputError(
        f"{folder}: holds pictures of something else ({said}); choose another folder, or delete it"
    )


def read_picture_set(folder: Path, references: Path | None = None) -> PictureSet:
    """The list of a folder; `references` stands in for the folder that it names.

    Raises InputError, naming the prompt, for what is not as above.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(
            f"{path}: no such file; `evaluate --suite dreambench --list-only` writes one for "
            "pictures of another system"
        )
    value = read_json(path)
    if value.get("format") != FORMAT:
        raise InputError(f"{path}: format {value.get('format')!r} is not {FORMAT}")
    images, system, rows = (value.get(key) for key in ("images_per_prompt", "system", "prompts"))
    if not isinstance(images, int) or images < 1:
        raise InputError(f"{path}: images_per_prompt {images!r} must be a number from 1")
    if not isinstance(system, dict):
        raise InputError(f"{path}: system {system!r} must be an object that says what drew them")
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path}: prompts must be a list with at least one row")
    prompts = tuple(_prompt(path, number, row) for number, row in enumerate(rows))
    names = Counter(prompt.name for prompt in prompts)
    if twice := [name for name, count in names.items() if count > 1]:
        raise InputError(f"{path}: two prompts are called {twice[0]!r}; names must differ")
    base = references or Path(str(value.get("references")))
    return PictureSet(str(value.get("suite")), base, images, system, prompts)


def _prompt(path: Path, number: int, row: object) -> Prompt:
    if not isinstance(row, dict):
        raise InputError(f"{path}: prompt {number} is no object")
    name, text, extra = row.get("name"), row.get("prompt"), row.get("extra", {})
    lists = [row.get(key, []) for key in ("references", "subjects")]
    if not isinstance(text, str) or not isinstance(extra, dict):
        raise InputError(f'{path}: prompt {number}: "prompt" must be text, "extra" an object')
    for names in [[name], *lists]:
        if not isinstance(names, list) or not all(_is_inside(one) for one in names):
            raise InputError(
                f"{path}: prompt {number}: {names!r} must be paths that stay in the folder"
            )
    return Prompt(str(name), text, tuple(lists[0]), tuple(lists[1]), extra)


def _is_inside(name: object) -> bool:
    if not isinstance(name, str) or not name or "\0" in name or "\\" in name:
        return False
    pure = PurePosixPath(name)
    return not pure.is_absolute() and ".." not in pure.parts


def read_prompts(path: Path, dataset: Path | None = None) -> tuple[Prompt, ...]:
    """The rows of a JSON file in UNO's schema (a list of `prompt` and `image_paths`), named by
    their number from 0000.

    Paths are relative to the file. With a `dataset`, they lie there, and only their last two parts
    count: SUBJECT/PICTURE. Further keys are kept as `extra`; `image_tgt_path` is not looked at.
    Raises InputError that lists every row which cannot be used.
    """
    content = read_text_file(path, "give a JSON list of prompts in UNO's schema")
    try:
        values = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}); correct it there") from None
    if not isinstance(values, list) or not values:
        raise InputError(f"{path}: must be a JSON list with at least one row")
    folder = dataset or path.parent
    rows = check_rows(
        path, folder, enumerate([_bare(row, dataset is not None) for row in values], 1), content,
        need_targets=False, check_images=True, skip_bad=False,
    ).rows  # fmt: skip
    home, dropped = folder.resolve(), ("prompt", "image_paths", "image_tgt_path")
    return tuple(
        Prompt(
            f"{i:04d}",
            row.prompt,
            tuple(path.relative_to(home).as_posix() for path in row.references),
            extra={key: item for key, item in value.items() if key not in dropped},
        )
        for i, (row, value) in enumerate(zip(rows, values, strict=True))
    )


def _bare(row: object, tails: bool) -> object:
    """What of a row is validated; `tails`: the last two parts of its paths."""
    if not isinstance(row, dict):
        return row
    bare = {key: row[key] for key in ("prompt", "image_paths") if key in row}
    if tails and isinstance(paths := bare.get("image_paths"), list):
        bare["image_paths"] = [
            "/".join(PurePosixPath(one).parts[-2:]) if isinstance(one, str) else one
            for one in paths
        ]
    return bare


def check_references(pictures: PictureSet) -> None:
    """Raises InputError, naming the first, where references are not there."""
    for prompt in pictures.prompts:
        for path in pictures.reference_paths(prompt):
            if not path.is_file():
                raise InputError(f"{path}: no such picture, which prompt {prompt.name} refers to")


def name_group(subjects: Sequence[str]) -> str:
    """How a table calls prompts about these subjects."""
    return " + ".join(subjects) or "all prompts"
