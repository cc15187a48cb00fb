"""Safetensors folders: one file, or shards with an index. Pickles are never read."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from squeeze_jax.errors import InputError


class TensorFolder:
    """The tensors of a checkpoint folder (or of one .safetensors file), read one at a time.

    Where there is an index file it is the authority: a shard that it names must exist and hold the tensors that it says,
    other shards are ignored.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        self.files: dict[str, Path] = {}
        """Tensor name → file."""
        if path.is_file():
            self._add_all(path)
            return
        if not path.is_dir():
            raise InputError(f"{path}: no such folder; give the folder that holds config.json and .safetensors files")
        indexes, singles = sorted(path.glob("*.safetensors.index.json")), sorted(path.glob("*.safetensors"))
        if len(indexes) == 1:
            self._add_index(path, indexes[0])
        elif len(singles) == 1:
            self._add_all(singles[0])
        elif not singles:
            pickles = [*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.ckpt"), *path.glob("*.pth")]
            hint = f"; {pickles[0].name} is a pickle, which is never read: convert it" if pickles else ""
            raise InputError(f"{path}: no .safetensors file in it{hint}")
        else:
            raise InputError(f"{path}: {len(singles)} .safetensors files and no index that says which belong together")

    def _add_index(self, folder: Path, index: Path) -> None:
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
        except (ValueError, KeyError) as error:
            raise InputError(f"{index}: not an index of shards ({error!r}); download it again") from None
        for name, shard in weight_map.items():
            file = folder / shard
            if file.parent.resolve() != folder.resolve() or os.sep in shard:
                raise InputError(f"{index}: {name} points to {shard!r}, out of the folder")
            if not file.is_file():
                raise InputError(f"{index}: the shard {shard} is missing; download it")
            self.files[name] = file
        for file in sorted(set(self.files.values())):
            there = set(_open(file).keys())
            absent = [name for name, where in self.files.items() if where == file and name not in there]
            if absent:
                raise InputError(f"{file}: lacks {absent[0]}, which {index.name} says it holds; download it again")

    def _add_all(self, file: Path) -> None:
        self.files.update(dict.fromkeys(_open(file).keys(), file))

    def names(self) -> list[str]:
        return list(self.files)

    def read(self, name: str) -> np.ndarray:
        """One tensor with the dtype of the file (bfloat16 as ml_dtypes has it)."""
        with _open(self.files[name]) as file:
            return file.get_tensor(name)


def _open(file: Path):
    try:
        return safe_open(file, framework="np")
    except FileNotFoundError:
        raise InputError(f"{file}: no such file") from None
    except SafetensorError as error:
        raise InputError(f"{file}: not a whole safetensors file ({error}); download it again") from None


def read_json(path: Path) -> dict:
    """A JSON object from a file; InputError names the file and the place of a mistake."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: must hold a JSON object")
    return value


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file beside its place and renames it."""
    def write(part: Path) -> None:
        save_file(dict(tensors), part, metadata={"format": "pt", **(metadata or {})})
        part.chmod(0o666 & ~_umask())  # the library makes files that only their owner can read

    write_beside(path, write)


def _umask() -> int:
    """The process's mask for new files."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, value: dict) -> None:
    """Writes a JSON file beside its place and renames it."""
    write_beside(path, lambda part: part.write_text(json.dumps(value, indent=1) + "\n"))


def write_beside(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` make `path`.part, then renames it: a reader sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
