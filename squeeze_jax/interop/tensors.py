"""Safetensors folders: one file, or shards with an index. Pickles are never read."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from squeeze_jax.errors import InputError
from squeeze_jax.finite import load_json
from squeeze_jax.interop.variants import choose_weights, say_ignored
from squeeze_jax.storage import AnyPath, is_remote, write_beside

FLOAT8 = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
DTYPES = {
    **FLOAT8, "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "BOOL": np.bool_,
    "I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64,
    "U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "U64": np.uint64,
}  # fmt: skip
"""Names in a file's header; what is not here (packed four-bit types, complex numbers) is refused."""
SCALES = (".scale_weight", ".weight_scale")
"""What stands in place of `.weight` in the name of a float8 tensor's scale."""


class TensorFolder:
    """The tensors of a checkpoint folder (or of one .safetensors file), read one at a time, whole
    or in part.

    Where there is an index file it is the authority: a shard that it names must exist and hold the
    tensors that it says, other shards are ignored. A float8 tensor with a scale beside it is read
    as their product, in bfloat16; the scales themselves are not listed.
    """

    def __init__(self, path: str | AnyPath, variant: str | None = None) -> None:
        """`variant`: which of a folder's variants is read (`fp16` for `….fp16.safetensors`);
        None: the standard names, or the only variant that there is."""
        if is_remote(path):
            raise InputError(
                f"{path}: weights files are read from a disk; copy them there (gcloud storage cp "
                "-r) or mount the bucket"
            )
        path = Path(path)
        self.files: dict[str, Path] = {}
        """Tensor name → file."""
        self.scales: dict[str, str] = {}
        """Float8 tensor → its scale."""
        self._opened: dict[Path, Any] = {}
        self._hidden: frozenset[str] = frozenset()
        if not path.is_dir() and not _is_file(path):
            raise InputError(
                f"{path}: no such folder; give the folder that holds config.json and .safetensors files"
            )
        chosen = choose_weights(path, variant) if path.is_dir() else path
        if chosen.name.endswith(".json"):  # an index of shards
            self._add_index(chosen.parent, chosen)
        else:
            if path.is_dir():
                _check_inside(path, chosen)
            self._add_all(chosen)
        if path.is_dir():
            say_ignored(path, chosen, set(self.files.values()))
        for name in self.files:
            if (kind := self._slice(name).get_dtype()) not in DTYPES:
                raise InputError(
                    f"{self.files[name]}: {name} is of type {kind}, which is not supported"
                )
        self._find_scales(path)

    def _add_index(self, folder: Path, index: Path) -> None:
        weight_map = read_json(index).get("weight_map")
        if (
            not weight_map
            or not isinstance(weight_map, dict)
            or not all(isinstance(s, str) for s in weight_map.values())
        ):
            raise InputError(
                f"{index}: not an index of shards (no weight_map of names to files); download it again"
            )
        for name, shard in weight_map.items():
            file = folder / shard
            if (
                shard in ("", ".", "..")
                or Path(shard).name != shard
                or "\\" in shard
                or "\0" in shard
            ):
                raise InputError(f"{index}: {name} points to {shard!r}, out of the folder")
            if not _is_file(file):
                raise InputError(f"{index}: the shard {shard[:80]} is missing; download it")
            self.files[name] = file
        for file in sorted(set(self.files.values())):
            _check_inside(folder, file)
            there = set(self._open(file).keys())
            absent = [
                name for name, where in self.files.items() if where == file and name not in there
            ]
            if absent:
                raise InputError(
                    f"{file}: lacks {absent[0]}, which {index.name} says it holds; download it again"
                )

    def _add_all(self, file: Path) -> None:
        self.files.update(dict.fromkeys(self._open(file).keys(), file))
        if not self.files:
            raise InputError(f"{file}: no tensor in it; download it again")

    def _find_scales(self, path: Path) -> None:
        """Where there are scales, every float8 tensor must have one; they and their like are no
        tensors of the model."""
        extras = {
            name for name in self.files if name.endswith((*SCALES, ".input_scale", ".scale_input"))
        }
        extras |= {
            name for name in self.files if name == "scaled_fp8" or name.endswith(".scaled_fp8")
        }
        for name in list(self.files) if extras else ():
            if name in extras or self._slice(name).get_dtype() not in FLOAT8:
                continue
            spellings = [name.removesuffix(".weight") + scale for scale in SCALES]
            found = [spelling for spelling in spellings if spelling in extras]
            if not found:
                raise InputError(
                    f"{path}: {name} is float8 and has no scale beside it; take the bfloat16 checkpoint"
                )
            rows, scale = self.shape(name)[:1], tuple(self._slice(found[0]).get_shape())
            if scale not in ((), (1,), rows, (*rows, 1)):
                raise InputError(
                    f"{path}: {found[0]} has shape {scale}; one scale, or one a row of {name}, is wanted"
                )
            self.scales[name] = found[0]
        if self.scales:
            self._hidden = frozenset(extras)

    def _open(self, file: Path) -> Any:
        if file not in self._opened:
            self._opened[file] = _open(file)
        return self._opened[file]

    def _slice(self, name: str) -> Any:
        return self._open(self.files[name]).get_slice(name)

    def names(self) -> list[str]:
        """What can be read."""
        return [name for name in self.files if name not in self._hidden]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, in the file's order of axes."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> np.dtype:
        """The type that `read` gives."""
        kind = self._slice(name).get_dtype()
        return np.dtype(ml_dtypes.bfloat16) if name in self.scales else np.dtype(DTYPES[kind])

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """One tensor [*shape(name)], or a part of it, with the dtype of the file (bfloat16 and
        float8 as ml_dtypes has them)."""
        if name in self.scales:
            scale = (
                self._open(self.files[self.scales[name]])
                .get_tensor(self.scales[name])
                .astype(np.float32)
            )
            scale = (
                scale.reshape(-1, *[1] * (len(self.shape(name)) - 1))
                if scale.size > 1
                else scale.reshape(())
            )
            scale = scale[index[:1]] if scale.ndim else scale
            return (self._read(name, index).astype(np.float32) * scale).astype(ml_dtypes.bfloat16)
        return self._read(name, index)

    def _read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        if (
            kind := self._slice(name).get_dtype()
        ) in FLOAT8:  # NumPy has no such type, and the library's reader asks it
            if 0 in self.shape(name):
                return np.zeros(self.shape(name), FLOAT8[kind])[index]
            header, start = _header(self.files[name])
            raw = np.memmap(
                self.files[name],
                np.uint8,
                "r",
                start + header[name]["data_offsets"][0],
                self.shape(name),
            )
            return np.array(raw[index]).view(FLOAT8[kind])
        try:
            return (
                self._slice(name)[index] if index else self._open(self.files[name]).get_tensor(name)
            )
        except SafetensorError as error:
            raise InputError(
                f"{self.files[name]}: {name} cannot be read ({error}); download it again"
            ) from None


def _check_inside(folder: Path, file: Path) -> None:
    """A link may lead to the folder itself or, as in a download cache, to the `blobs` beside its
    `snapshots`."""
    home = folder.resolve()
    blobs = [above.parent / "blobs" for above in home.parents if above.name == "snapshots"][:1]
    if file.resolve().parent not in (home, *blobs):
        raise InputError(
            f"{file}: a link out of the folder, to {file.resolve()}; put the file itself there"
        )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that no file can have
        return False


def _open(file: Path) -> Any:
    _header(file)
    try:
        return safe_open(file, framework="np")
    except SafetensorError as error:
        raise InputError(f"{file}: not a whole safetensors file ({error}); download it again") from None


OTHER_FORMATS = {
    b"PK\x03\x04": "a pickle (PyTorch)",
    b"\x80\x02": "a pickle (PyTorch)",
    b"GGUF": "a GGUF file",
}
"""First bytes of files that are taken for safetensors, and what they are."""


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """A file's header, and where its data begin. The library checks it again; this names what
    people meet."""
    try:
        with file.open("rb") as start:
            head = start.read(9)
            length = int.from_bytes(head[:8], "little")
            whole = length <= file.stat().st_size - 8
            # A header's length may begin with another format's bytes (640 is 80 02): what has
            # a whole header that opens a JSON object is no other format.
            if not (whole and head[8:] == b"{"):
                if head.startswith(b"version "):
                    raise InputError(
                        f"{file}: a download pointer (git-lfs) in place of the file; fetch it with git lfs pull"
                    )
                for beginning, kind in OTHER_FORMATS.items():
                    if head.startswith(beginning):
                        raise InputError(
                            f"{file}: {kind}, which is not read; take the safetensors file of the same weights"
                        )
            if len(head) < 8 or not whole:
                raise InputError(
                    f"{file}: not a whole safetensors file (its header does not end); download it again"
                )
            start.seek(8)
            header = json.loads(start.read(length), object_pairs_hook=_no_duplicates)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{file}: no such file") from None
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from None
    except (
        ValueError,
        RecursionError,
    ) as error:  # not JSON, not UTF-8, a name twice, a number of 5,000 digits
        raise InputError(
            f"{file}: not a whole safetensors file ({error}); download it again"
        ) from None
    if not isinstance(header, dict):
        raise InputError(
            f"{file}: not a whole safetensors file (its header is no table); download it again"
        )
    return header, 8 + length


class _TwiceError(ValueError):
    pass


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise _TwiceError("a name stands twice in its header")
    return dict(pairs)


def read_json(path: AnyPath) -> dict:
    """A JSON object from a file. Raises InputError with the file and the place of a mistake."""
    try:
        value = load_json(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: must hold a JSON object")
    return value


def write_tensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None
) -> None:
    """Writes a safetensors file beside its place and renames it; equal tensors make equal bytes.

    `metadata` (default: PyTorch's mark) should be one entry: the library writes several in an order
    of chance. Arrays are [...], of any shape.
    """

    def write(part: Path) -> None:
        try:
            save_file(dict(tensors), part, metadata=metadata or {"format": "pt"})
        except (
            SafetensorError
        ) as error:  # the library says in words what the disk said with a number
            if (said := re.search(r"\(os error (\d+)\)", str(error))) is None:
                raise
            raise OSError(int(said[1]), os.strerror(int(said[1])), str(path)) from None
        part.chmod(0o666 & ~_umask())  # the library makes files that only their owner can read

    write_beside(path, write)


def _umask() -> int:
    """The process's mask for new files."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: AnyPath, value: dict) -> None:
    """Writes a JSON file that appears whole (`write_beside`)."""
    write_beside(path, lambda part: part.write_text(json.dumps(value, indent=1) + "\n"))


def check_writable(path: Path, flag: str) -> None:
    """Raises InputError, naming the flag, where a file could not be made; folders on the way to
    it may still be missing. A path in a bucket would become a folder here."""
    if re.match(r"[a-z0-9]+:/", str(path)):
        raise InputError(
            f"{flag} {path}: written to a disk alone; give a place there and copy it afterwards"
        )
    there = next(folder for folder in path.absolute().parents if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise InputError(
            f"{flag} {path}: nothing can be written into {there}; choose another place"
        )
