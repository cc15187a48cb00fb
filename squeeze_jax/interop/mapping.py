"""What a mapping table is, and how one is read forwards (import) and backwards (export).

A table is a list of `Entry`: it names every tensor of a checkpoint format once and every parameter
of ours once (a stacked parameter once a layer). There is one table a format, built from the model's
config.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from functools import partial
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding

from squeeze_jax.array_types import DType
from squeeze_jax.layers.lora import LoRAParam

Layout = Literal["same", "linear", "pointwise", "conv", "swap_halves"]
Index = tuple[slice, ...]
Shape = tuple[int, ...]


class Entry(NamedTuple):
    """`sources` of the file, joined along their first (output) axis, make `path` of ours.

    layout: `same` (vectors, embeddings), `linear` (weight [out, in] to kernel [in, out]),
    `pointwise` (the same, written as a convolution [out, in, 1, 1]), `conv` ([out, in, h, w] to [h,
    w, in, out]), `swap_halves` (a vector or linear weight whose two output halves stand in the
    other order).
    """

    sources: tuple[str, ...]
    path: str
    layout: Layout = "same"
    layer: int | None = None
    """Index on the leading depth axis of a stacked parameter."""
    sizes: tuple[int, ...] = ()
    """Output sizes of the sources; needed where there are several."""
    part: tuple[int, int] | None = None
    """(i, n): of the one source, whose output rows are n equal parts, only part i is meant."""


class MappingError(ValueError):
    """A checkpoint and a model do not match; the message lists every difference, with the
    nearest names."""


def to_ours(tensors: list[np.ndarray], layout: Layout) -> np.ndarray:
    """The file's tensors ([out, in], [out, in, h, w], [C], stacked or not) as one array in our
    layout ([in, out], [h, w, in, out], [C])."""
    joined = tensors[0] if len(tensors) == 1 else np.concatenate(tensors, axis=0)
    match layout:
        case "same":
            return joined
        case "linear":
            return joined.T
        case "pointwise":
            return joined.reshape(joined.shape[:2]).T
        case "conv":
            return joined.transpose(2, 3, 1, 0)
        case "swap_halves":
            first, second = np.split(joined, 2, axis=0)
            return np.concatenate([second, first], axis=0).T  # .T leaves a vector as it is


def to_theirs(array: np.ndarray, entry: Entry) -> list[np.ndarray]:
    """The inverse of `to_ours`, from [in, out] and so on: one array for each of the entry's
    sources."""
    match entry.layout:
        case "same":
            joined = array
        case "linear":
            joined = array.T
        case "pointwise":
            joined = array.T[:, :, None, None]
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


@runtime_checkable
class Tensors(Protocol):
    """A checkpoint: `TensorFolder`, or arrays in memory (`ArrayTensors`)."""

    def names(self) -> list[str]:
        """Of all tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, in the file's order of axes."""
        ...

    def dtype(self, name: str) -> np.dtype:
        """That in which `read` returns a tensor."""
        ...

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """The tensor [*shape(name)], or the part of it that slices of its first axes choose."""
        ...


class ArrayTensors:
    """A checkpoint in memory."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.arrays = arrays

    def names(self) -> list[str]:
        return list(self.arrays)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.arrays[name].shape

    def dtype(self, name: str) -> np.dtype:
        return self.arrays[name].dtype

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        return self.arrays[name][index]


class Renamed:
    """A checkpoint under other names."""

    def __init__(self, tensors: Tensors, names: Mapping[str, str]) -> None:
        self.tensors, self.of = tensors, names
        """`names`: the name to go by → the name in `tensors`."""

    def names(self) -> list[str]:
        return list(self.of)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors.shape(self.of[name])

    def dtype(self, name: str) -> np.dtype:
        return self.tensors.dtype(self.of[name])

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        return self.tensors.read(self.of[name], index)


def without_prefix(tensors: Tensors, prefixes: Iterable[str]) -> Tensors:
    """The checkpoint without the first of the prefixes that some of its names have; names without
    it are left out.

    A whole system in one file (transformer, autoencoder, text encoders) is told apart by prefixes.
    """
    names = tensors.names()
    for prefix in prefixes:
        found = {name.removeprefix(prefix): name for name in names if name.startswith(prefix)}
        if found:
            return Renamed(tensors, found)
    return tensors


def load_entries(
    module: nnx.Module,
    table: Iterable[Entry],
    checkpoint: Tensors | Mapping[str, np.ndarray],
    dtype: DType | None = None,
    place: Callable[[str, tuple[int, ...]], Sharding] | None = None,
) -> None:
    """Sets every parameter of `module` from a checkpoint.

    `dtype` converts (default: the dtype that the parameter has). `place(path, shape)` says how a
    parameter lies on the devices (default: on this process's first one): only what this process's
    devices hold is read, one tensor at a time. A mapping's arrays are
    [*their published shape]. Raises MappingError, with all missing, unexpected and misshapen
    names together, before anything is read.
    """
    tensors = ArrayTensors(checkpoint) if isinstance(checkpoint, Mapping) else checkpoint
    parameters, table = parameters_by_path(module), list(table)
    if problems := differences(module, table, tensors):
        shown = "\n  ".join(problems[:40]) + (
            f"\n  … and {len(problems) - 40} more" if len(problems) > 40 else ""
        )
        raise MappingError(
            f"the checkpoint does not fit the model ({len(problems)} differences):\n  {shown}"
        )
    by_path: dict[str, list[Entry]] = {}
    for entry in table:
        by_path.setdefault(entry.path, []).append(entry)
    for path, entries in by_path.items():
        shape, kept = parameters[path].shape, np.dtype(dtype or parameters[path].dtype)
        read = partial(_piece, tensors, entries, shape, kept)
        if place is None:
            value = jax.device_put(read(None), jax.local_devices()[0])
        else:
            value = jax.make_array_from_callback(shape, place(path, shape), read)
        parameters[path].set_value(value)
    nnx.update(
        module,
        nnx.from_flat_state(
            [(tuple(_key(k) for k in p.split(".")), v) for p, v in parameters.items()]
        ),
    )


def differences(module: nnx.Module, table: Iterable[Entry], tensors: Tensors) -> list[str]:
    """What keeps a checkpoint from being a model's: missing and unexpected names, then shapes
    and types. Reads nothing."""
    parameters, table, present = parameters_by_path(module), list(table), set(tensors.names())
    wanted = {name for entry in table for name in entry.sources}
    missing, unexpected = sorted(wanted - present), sorted(present - wanted)
    problems = [f"missing: {name}{_nearest(name, unexpected)}" for name in missing[:SUGGESTIONS]]
    problems += [f"missing: {name}" for name in missing[SUGGESTIONS:]]
    problems += [
        f"unexpected: {name}{_nearest(name, missing)}" for name in unexpected[:SUGGESTIONS]
    ]
    problems += [f"unexpected: {name}" for name in unexpected[SUGGESTIONS:]]
    problems += [
        f"no entry for our parameter {path}"
        for path in sorted(set(parameters) - {e.path for e in table})
    ]
    whole = [
        entry for entry in table if entry.path in parameters and present.issuperset(entry.sources)
    ]
    problems += [
        problem
        for entry in whole
        if (problem := _misshapen(entry, parameters[entry.path], tensors))
    ]
    kinds = {name: tensors.dtype(name) for name in sorted(wanted & present)}
    problems += [
        f"dtype: {name} is {kind}, a floating-point type is wanted"
        for name, kind in kinds.items()
        if not jnp.issubdtype(kind, jnp.floating)
    ]
    return problems


SUGGESTIONS = 20
"""Names for which the nearest other one is looked up: it costs a comparison with all of them."""


def _misshapen(entry: Entry, parameter: nnx.Param, tensors: Tensors) -> str | None:
    """What is wrong with the shapes of an entry's tensors."""
    shapes = [tensors.shape(name) for name in entry.sources]
    if (entry.sizes or entry.part is not None) and not all(shapes):
        return f"shape: {' + '.join(entry.sources)} must have rows, but is a single number"
    first, rest = sum(shape[0] if shape else 1 for shape in shapes), shapes[0][1:]
    if entry.part is not None:
        first = first // entry.part[1] if first % entry.part[1] == 0 else -1
    wanted = tuple(parameter.shape if entry.layer is None else parameter.shape[1:])
    match entry.layout:
        case "same":
            found = (first, *rest) if shapes[0] else ()
        case "linear" | "swap_halves":
            found = (*rest, first)
        case "pointwise":
            found = (*rest[:1], first) if set(rest[1:]) <= {1} else (*rest, first)
        case "conv":
            found = (*rest[1:], *rest[:1], first)
    uneven = any(shape[1:] != rest for shape in shapes)
    uneven |= bool(entry.sizes) and tuple(shape[0] for shape in shapes) != entry.sizes
    if found == wanted and not uneven:
        return None
    return f"shape: {' + '.join(entry.sources)} gives {found}, the model wants {wanted}"


def _piece(
    tensors: Tensors, entries: list[Entry], shape: Shape, dtype: np.dtype, index: Index | None
) -> np.ndarray:
    """The part of a parameter that one device holds."""
    bounds = [
        part.indices(size)[:2]
        for part, size in zip(index or (slice(None),) * len(shape), shape, strict=True)
    ]
    out = _aligned(tuple(high - low for low, high in bounds), dtype)
    for entry in entries:
        if entry.layer is None:
            _fill(out, tensors, entry, bounds)
        elif bounds[0][0] <= entry.layer < bounds[0][1]:
            _fill(out[entry.layer - bounds[0][0]], tensors, entry, bounds[1:])
    return out


def _fill(into: np.ndarray, tensors: Tensors, entry: Entry, bounds: list[tuple[int, int]]) -> None:
    """Reads an entry's tensors, as far as they lie within `bounds`, into an array of that size."""
    if not bounds:  # a single number
        into[...] = tensors.read(entry.sources[0])
        return
    if entry.layout in ("pointwise", "conv", "swap_halves"):  # small, and not a range of rows
        whole = to_ours([tensors.read(name) for name in entry.sources], entry.layout)
        into[...] = whole[tuple(slice(*bound) for bound in bounds)]
        return
    transposed = entry.layout == "linear"
    (low, high), *others = [*bounds[-1:], *bounds[:-1]] if transposed else bounds
    start = skipped = 0
    for name in entry.sources:
        rows = tensors.shape(name)[0]
        if entry.part is not None:
            rows //= entry.part[1]
            skipped = entry.part[0] * rows
        first, last = max(low - start, 0), min(high - start, rows)
        if first < last:
            at = slice(skipped + first, skipped + last)
            part = tensors.read(name, (at, *(slice(*bound) for bound in others)))
            where = slice(start + first - low, start + last - low)
            if transposed:
                into[..., where] = part.T
            else:
                into[where] = part
        start += rows


def _aligned(shape: Shape, dtype: np.dtype) -> np.ndarray:
    """An uninitialised array at an address that the processor's backend takes over without a copy."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    offset = -raw.ctypes.data % 64
    return raw[offset : offset + size].view(dtype).reshape(shape)


def export_entries(module: nnx.Module, table: Iterable[Entry]) -> dict[str, np.ndarray]:
    """Every tensor of the format, [*its published shape], from the module's parameters."""
    parameters: Mapping[str, np.ndarray] = {
        path: np.asarray(jax.device_get(leaf[...]))
        for path, leaf in parameters_by_path(module).items()
    }
    tensors: dict[str, np.ndarray] = {}
    for entry in table:
        array = (
            parameters[entry.path] if entry.layer is None else parameters[entry.path][entry.layer]
        )
        for name, tensor in zip(entry.sources, to_theirs(array, entry), strict=True):
            if entry.part is None:
                tensors[name] = np.asarray(
                    tensor, order="C"
                )  # `ascontiguousarray` gives a number an axis
                continue
            i, n = entry.part
            whole = tensors.setdefault(
                name, np.empty((n * len(tensor), *tensor.shape[1:]), tensor.dtype)
            )
            whole[i * len(tensor) : (i + 1) * len(tensor)] = tensor
    return tensors


def _nearest(name: str, candidates: Iterable[str]) -> str:
    close = get_close_matches(name, list(candidates), n=1)
    return f" (nearest: {close[0]})" if close else ""


def _key(part: str) -> str | int:
    return int(part) if part.isdigit() else part
