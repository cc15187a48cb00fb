"""Which of a folder's safetensors files are its weights, where the hub leaves more than one set."""

import re
import warnings
from collections.abc import Collection
from pathlib import Path

from squeeze_jax.errors import InputError

STEMS = ("diffusion_pytorch_model", "model")
"""The standard names, of diffusers and of transformers."""
FILE = re.compile(rf"({'|'.join(STEMS)})(?:\.(?P<variant>[^.]+))?\.safetensors")
INDEX = re.compile(rf"({'|'.join(STEMS)})\.safetensors\.index(?:\.(?P<variant>[^.]+))?\.json")
OTHER_INDEX = re.compile(rf"({'|'.join(STEMS)})\.(?P<variant>[^.]+)\.safetensors\.index\.json")
"""How diffusers and transformers name whole files and indexes of shards; some repositories name the
variant before `.safetensors` in an index, too."""
SHARD = re.compile(r".*-\d{5}-of-\d{5}(\.[^.]+)?\.safetensors")
PICKLES = ("*.bin", "*.pt", "*.ckpt", "*.pth")


def choose_weights(folder: Path, variant: str | None = None) -> Path:
    """Returns the whole file, or the index of shards, that holds a folder's weights.

    A standard name wins over its variants (`….fp16.safetensors`, `….index.fp16.json`); where there
    is no standard name the only variant is taken, with a warning. Beside either, files of other
    names are ignored (`say_ignored`). A folder with one file, or one index, of any name has no
    choice to make. Raises InputError where there is nothing, or more than one set of equal right.
    """
    indexes = sorted(folder.glob("*.safetensors.index*.json"))
    files = sorted(path for path in folder.glob("*.safetensors") if not SHARD.fullmatch(path.name))
    sets: dict[str | None, list[Path]] = {}
    for path in [*indexes, *files]:
        for pattern in (INDEX, OTHER_INDEX, FILE):
            if found := pattern.fullmatch(path.name):
                sets.setdefault(found["variant"], []).append(path)
    if variant is not None:
        if variant not in sets:
            there = ", ".join(sorted(filter(None, sets))) or "none"
            raise InputError(f"{folder}: no variant {variant!r} in it; it has: {there}")
        return _only(folder, sets[variant])
    if None in sets:  # the standard name
        return _only(folder, sets[None])
    if len(sets) == 1:
        [(name, paths)] = sets.items()
        warnings.warn(
            f"{folder}: the variant {name} is read, since there is no other", stacklevel=2
        )
        return _only(folder, paths)
    if sets:
        raise InputError(
            f"{folder}: several variants ({', '.join(sorted(filter(None, sets)))}) and none without a "
            "name; choose one with --variant, or give the path of its file"
        )
    return _only_of_any_name(folder, indexes)


def is_standard(path: Path) -> bool:
    """Returns whether a path is a file or an index of a standard name, of any variant."""
    return path.is_file() and any(p.fullmatch(path.name) for p in (INDEX, OTHER_INDEX, FILE))


def _only(folder: Path, paths: list[Path]) -> Path:
    """One of the same variant: an index is more than a file, since it says what belongs together."""
    indexes = [path for path in paths if path.name.endswith(".json")]
    if len(some := indexes or paths) > 1:
        raise InputError(
            f"{folder}: {some[0].name} and {some[1].name} are both there; keep one of them"
        )
    return some[0]


def _only_of_any_name(folder: Path, indexes: list[Path]) -> Path:
    """The only index or file of a folder without a standard name (a single-file checkpoint)."""
    files = sorted(folder.glob("*.safetensors"))
    if len(indexes) == 1 or (not indexes and len(files) == 1):
        return (indexes or files)[0]
    if not files:
        pickles = [path for pattern in PICKLES for path in folder.glob(pattern)]
        hint = (
            f"; {pickles[0].name} is a pickle, which is never read: convert it" if pickles else ""
        )
        raise InputError(f"{folder}: no .safetensors file in it{hint}")
    if indexes:
        raise InputError(
            f"{folder}: {len(indexes)} indexes of shards ({indexes[0].name}, …); keep one of them"
        )
    raise InputError(
        f"{folder}: {len(files)} .safetensors files and no index that says which belong together; "
        "give the path of one"
    )


def say_ignored(folder: Path, chosen: Path, read: Collection[Path]) -> None:
    """Warns of a folder's files that are neither read nor another variant."""
    stray = [
        path.name
        for path in sorted(folder.glob("*.safetensors"))
        if path not in read and not is_standard(path) and not SHARD.fullmatch(path.name)
    ]
    if stray:
        warnings.warn(
            f"{folder}: {', '.join(stray)} is not read beside {chosen.name}", stacklevel=2
        )
