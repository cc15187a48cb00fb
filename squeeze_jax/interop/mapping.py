"""What a mapping table is, and how one is read forwards (import) and backwards (export).

A table is a list of `Entry`: it names every tensor of a checkpoint format once and every parameter of ours once
(a stacked parameter once a layer). There is one table a format, built from the model's config.
"""

from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from squeeze_jax.array_types import DType
from squeeze_jax.layers.lora import LoRAParam

Layout = Literal["same", "linear", "conv", "swap_halves"]


class Entry(NamedTuple):
    """`sources` of the file, joined along their first (output) axis, make `path` of ours.

    layout: `same` (vectors, embeddings), `linear` (weight [out, in] to kernel [in, out]), `conv` ([out, in, h, w] to
    [h, w, in, out]), `swap_halves` (a vector or linear weight whose two output halves stand in the other order).
    """

    sources: tuple[str, ...]
    path: str
    layout: Layout = "same"
    layer: int | None = None
    """Index on the leading depth axis of a stacked parameter."""
    sizes: tuple[int, ...] = ()
    """Output sizes of the sources; needed where there are several."""


class MappingError(ValueError):
    """A checkpoint and a model do not match; the message lists every difference, with the nearest names."""


def to_ours(tensors: list[np.ndarray], layout: Layout) -> np.ndarray:
    """The file's tensors as one array in our layout."""
    joined = tensors[0] if len(tensors) == 1 else np.concatenate(tensors, axis=0)
    match layout:
        case "same":
            return joined
        case "linear":
            return joined.T
        case "conv":
            return joined.transpose(2, 3, 1, 0)
        case "swap_halves":
            first, second = np.split(joined, 2, axis=0)
            return np.concatenate([second, first], axis=0).T  # .T leaves a vector as it is


def to_theirs(array: np.ndarray, entry: Entry) -> list[np.ndarray]:
    """The inverse of `to_ours`: one array for each of the entry's sources."""
    match entry.layout:
        case "same":
            joined = array
        case "linear":
            joined = array.T
        case "conv":
            joined = array.transpose(3, 2, 0, 1)
        case "swap_halves":
            first, second = np.split(array.T, 2, axis=0)
            joined = np.concatenate([second, first], axis=0)
    if len(entry.sources) == 1:
        return [joined]
    return np.split(joined, np.cumsum(entry.sizes)[:-1].tolist(), axis=0)


def parameters_by_path(module: nnx.Module) -> dict[str, nnx.Param]:
    """Every parameter of a module under its dotted path; adapters are not parameters of the base."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.All(nnx.Param, nnx.Not(LoRAParam))))
    return {".".join(map(str, path)): leaf for path, leaf in flat}


def load_entries(
    module: nnx.Module,
    table: Iterable[Entry],
    names: Iterable[str],
    read: Callable[[str], np.ndarray],
    dtype: DType | None = None,
) -> None:
    """Sets every parameter of `module` from a checkpoint.

    `names` are the names that the checkpoint has, `read` gives one tensor. `dtype` converts (default: the dtype that the
    parameter has). All missing, unexpected and misshapen names are raised together as `MappingError`; nothing is set
    unless everything fits.
    """
    parameters, table, present = parameters_by_path(module), list(table), set(names)
    wanted = {name for entry in table for name in entry.sources}
    problems = [f"missing: {name}{_nearest(name, present - wanted)}" for name in sorted(wanted - present)]
    problems += [f"unexpected: {name}{_nearest(name, wanted - present)}" for name in sorted(present - wanted)]
    problems += [f"no entry for our parameter {path}" for path in sorted(set(parameters) - {e.path for e in table})]
    loaded: dict[str, np.ndarray] = {}
    if not problems:
        for entry in table:
            parameter = parameters[entry.path]
            value = to_ours([read(name) for name in entry.sources], entry.layout)
            shape = parameter.shape if entry.layer is None else parameter.shape[1:]
            if value.shape != shape:
                problems.append(f"shape: {' + '.join(entry.sources)} gives {value.shape}, the model wants {shape}")
                continue
            wanted_dtype = np.dtype(dtype or parameter.dtype)
            if entry.layer is None:
                loaded[entry.path] = value.astype(wanted_dtype)
            else:
                into = loaded.setdefault(entry.path, np.empty(parameter.shape, wanted_dtype))
                into[entry.layer] = value
    if problems:
        shown = "\n  ".join(problems[:40]) + (f"\n  … and {len(problems) - 40} more" if len(problems) > 40 else "")
        raise MappingError(f"the checkpoint does not fit the model ({len(problems)} differences):\n  {shown}")
    for path, value in loaded.items():
        parameters[path].set_value(jnp.asarray(value))
    nnx.update(module, nnx.from_flat_state([(tuple(_key(k) for k in p.split(".")), v) for p, v in parameters.items()]))


def export_entries(module: nnx.Module, table: Iterable[Entry]) -> dict[str, np.ndarray]:
    """Every tensor of the format, from the module's parameters."""
    parameters: Mapping[str, np.ndarray] = {
        path: np.asarray(jax.device_get(leaf[...])) for path, leaf in parameters_by_path(module).items()
    }
    tensors = {}
    for entry in table:
        array = parameters[entry.path] if entry.layer is None else parameters[entry.path][entry.layer]
        for name, tensor in zip(entry.sources, to_theirs(array, entry), strict=True):
            tensors[name] = np.ascontiguousarray(tensor)
    return tensors


def _nearest(name: str, candidates: Iterable[str]) -> str:
    close = get_close_matches(name, list(candidates), n=1)
    return f" (nearest: {close[0]})" if close else ""


def _key(part: str) -> str | int:
    return int(part) if part.isdigit() else part
