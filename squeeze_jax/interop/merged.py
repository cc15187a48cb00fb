"""A transformer with its adapters merged in, written as diffusers' folder in shards, one block
in memory at a time."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from squeeze_jax.array_types import DType, PyTree
from squeeze_jax.errors import InputError
from squeeze_jax.interop.formats import format_of
from squeeze_jax.interop.load import WEIGHTS
from squeeze_jax.interop.mapping import Entry, parameters_by_path, to_theirs
from squeeze_jax.interop.tensors import write_json, write_tensors
from squeeze_jax.layers.lora import Adapter, linears
from squeeze_jax.models.backbone import Backbone

SHARD_BYTES = 5_000_000_000
"""Most bytes of one file (our decision)."""


def save_merged(folder: Path, dit: Backbone, dtype: DType, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes config.json and the weights, base + adapters (added in float32, rounded once to
    `dtype`).

    The adapters' matrices are rounded to `dtype` first: a LoRA file of that type and the merged
    weights mean the same. Raises InputError for an int8 base, which cannot take a delta.
    """
    family = format_of(dit.config)
    parameters, modules = parameters_by_path(dit), dict(linears(dit))
    if coarse := [path for path, linear in modules.items() if linear.kernel_scale is not None]:
        raise InputError(
            f"{coarse[0]} is kept in int8, which cannot be merged into; set model.frozen_dtype bfloat16"
        )
    shards: list[list[Entry]] = [[]]
    filled = total = 0
    for entry in family.entries["diffusers"](dit.config):
        shape = parameters[entry.path].shape[entry.layer is not None :]
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if filled and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled, total = filled + size, total + size
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = (
            WEIGHTS
            if len(shards) == 1
            else WEIGHTS.replace(".", f"-{number:05}-of-{len(shards):05}.", 1)
        )
        tensors: dict[str, np.ndarray] = {}
        for entry in shard:
            array = _layer(parameters[entry.path], entry.layer).astype(np.float32)
            linear = modules.get(entry.path.removesuffix(".kernel"))
            if linear is not None and linear.adapter is not None and entry.path.endswith(".kernel"):
                array = array + _delta(
                    linear.adapter, entry.layer, array.shape[-1], np.dtype(dtype)
                )
            for name, tensor in zip(entry.sources, to_theirs(array, entry), strict=True):
                tensors[name] = np.ascontiguousarray(tensor.astype(np.dtype(dtype)))
        write_tensors(folder / file, tensors)
        weight_map |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / f"{WEIGHTS}.index.json", index)
    write_json(folder / "config.json", family.config_to_json(dit.config))


def _layer(leaf: PyTree, layer: int | None) -> np.ndarray:
    return np.asarray(jax.device_get(leaf[...] if layer is None else leaf[...][layer]))


def _delta(adapter: Adapter, layer: int | None, out_features: int, dtype: np.dtype) -> np.ndarray:
    """An adapter's delta of one layer's kernel [in, out], in float32, with matrices of `dtype`."""
    total: Any = 0.0
    for part in adapter.parts:
        down, up = (
            _layer(leaf, layer).astype(dtype).astype(np.float32) for leaf in (part.down, part.up)
        )
        scale = _layer(part.scale, layer).astype(np.float32)
        total = total + np.pad(
            down @ up * scale, ((0, 0), (part.start, out_features - part.start - part.size))
        )
    return total
