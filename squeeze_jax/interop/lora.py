"""LoRA files, read and written in every common dialect.

Whatever the spelling, a file holds low-rank pairs: A [rank, in] and B [out, rank] of a linear
layer, whose delta is scale · B·A in the rows of that layer, scale = alpha / rank (alpha / √rank
where the file says rank-stabilised; an absent alpha means alpha = rank). A dialect says how layers
and the two matrices are spelled; which rows of which of our layers a name means follows from the
mapping tables that checkpoints are read with.
"""

import json
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from squeeze_jax.array_types import DType
from squeeze_jax.errors import InputError
from squeeze_jax.interop.formats import format_of
from squeeze_jax.interop.lora_dialects import (
    DIALECTS,
    REFUSED,
    TEXT_ENCODERS,
    DialectName,
    recognise,
    split_role,
)
from squeeze_jax.interop.lora_metadata import LoRASettings, alpha_of, peft_config
from squeeze_jax.interop.tensors import TensorFolder, write_json, write_tensors
from squeeze_jax.layers.lora import Adapter, LowRank, linears
from squeeze_jax.models.backbone import Backbone


@dataclass(frozen=True)
class LoRAReport:
    """What `load_lora` did."""

    dialect: DialectName
    modules: int
    """Layers touched, each block's counted."""
    skipped: tuple[str, ...]
    """Keys of text encoders, which this system does not have."""


class Pair(NamedTuple):
    """One low-rank delta in the order of our rows: scale · B·A."""

    a: np.ndarray
    """float32 [rank, in]."""
    b: np.ndarray
    """float32 [size, rank]."""
    scale: float
    """Strength: alpha / rank."""
    start: int
    """Of our layer's output rows, the first that it changes."""


# --- reading
# ----------------------------------------------------------------------------------------------------------


def load_lora(dit: Backbone, file: str | Path) -> LoRAReport:
    """Attaches a LoRA file (or a folder with one) to a transformer, as an adapter of every layer
    that it names.

    A transformer that carries adapters already keeps them: the deltas add up. Raises InputError,
    and changes nothing, where a key is unknown, a shape or a rank does not fit, a half of a pair is
    missing, metadata and tensors disagree, or the file holds something else than low-rank pairs.
    """
    dialect, pairs, skipped = read_pairs(file, dit)
    attach_pairs(dit, pairs)
    return LoRAReport(dialect, len(pairs), tuple(skipped))


def read_pairs(
    file: str | Path, dit: Backbone
) -> tuple[DialectName, dict[tuple[str, int | None], list[Pair]], list[str]]:
    """The dialect of a LoRA file, its pairs for each (path, layer) of ours, and the keys that were
    skipped, aloud. Raises InputError where a matrix lacks its partner or is there twice, or none is
    there."""
    tensors = TensorFolder(file)
    skipped = [key for key in tensors.names() if TEXT_ENCODERS.fullmatch(key)]
    if skipped:
        warnings.warn(
            f"{file}: {len(skipped)} keys for text encoders are skipped ({skipped[0]} …)",
            stacklevel=3,
        )
    keys = [key for key in tensors.names() if key not in set(skipped)]
    for key in keys:
        for pattern, what in REFUSED:
            if re.fullmatch(pattern, key):
                raise InputError(
                    f"{file}: {key} is {what}, which is not supported; merge it with the tool that made it"
                )
    if not keys:
        raise InputError(f"{file}: no LoRA of the transformer in it")
    dialect, names = recognise(keys, dit.config, file)
    grouped: dict[str, dict[str, str]] = {}
    spelled_as: dict[tuple[str, str], str] = {}
    for key in keys:
        module, role = split_role(key) or ("", "")
        other = spelled_as.setdefault((names[module][0], role), key)
        if other != key:
            raise InputError(
                f"{file}: {other} and {key} are the same matrix of one layer; delete one of the two pairs"
            )
        grouped.setdefault(module, {})[role] = key
    settings = LoRASettings.read(file, tensors)
    kernels = {path: linear.kernel.shape for path, linear in linears(dit)}
    pairs: dict[tuple[str, int | None], list[Pair]] = {}
    for module, roles in grouped.items():
        if lacking := [role for role in ("A", "B") if role not in roles]:
            raise InputError(
                f"{file}: {module} has no {lacking[0]} matrix beside {next(iter(roles.values()))}"
            )
        a, b = (_matrix(tensors.read(roles[role]), roles[role], file) for role in ("A", "B"))
        if not a.shape[0]:
            raise InputError(f"{file}: {module} has rank 0; delete the pair, it does nothing")
        alpha = (
            _alpha(tensors.read(roles["alpha"]), roles["alpha"], file) if "alpha" in roles else None
        )
        bare, target = names[module]
        fan_in, fan_out = kernels[target.path][-2:]
        size = fan_out - target.start if target.size == -1 else target.size
        if a.shape[1] != fan_in or b.shape != (size, a.shape[0]):
            raise InputError(
                f"{file}: {module} has A {a.shape} and B {b.shape}, this model wants A (r, {fan_in}) and B ({size}, r)"
                + (
                    "; a control LoRA widens img_in and is not supported"
                    if target.path == "img_in"
                    else ""
                )
            )
        if target.swapped:
            b = np.concatenate(np.split(b, 2)[::-1])
        scale = settings.scale(bare, a.shape[0], alpha)
        pairs.setdefault((target.path, target.layer), []).append(Pair(a, b, scale, target.start))
    return dialect, pairs, skipped


def attach_pairs(dit: Backbone, pairs: Mapping[tuple[str, int | None], list[Pair]]) -> None:
    """Adds pairs to the adapters of a transformer. In a stack, lower ranks and absent layers are
    filled with zeros."""
    modules = dict(linears(dit))
    for path in dict.fromkeys(path for path, _ in pairs):
        linear = modules[path]
        *depth, fan_in, _ = linear.kernel.shape
        layers = {layer: found for (where, layer), found in pairs.items() if where == path}
        parts: list[LowRank] = list(linear.adapter.parts) if linear.adapter is not None else []
        ranges = dict.fromkeys(
            (pair.start, len(pair.b)) for found in layers.values() for pair in found
        )
        for start, size in ranges:
            here = {
                layer: p
                for layer, found in layers.items()
                for p in found
                if (p.start, len(p.b)) == (start, size)
            }
            rank = max(len(pair.a) for pair in here.values())
            down, up = (
                np.zeros((*depth, fan_in, rank), np.float32),
                np.zeros((*depth, rank, size), np.float32),
            )
            scale = np.ones(tuple(depth), np.float32)
            for layer, pair in here.items():
                at = () if layer is None else (layer,)
                down[(*at, slice(None), slice(0, len(pair.a)))] = pair.a.T
                up[(*at, slice(0, len(pair.a)))] = pair.b.T
                scale[at] = pair.scale
            parts.append(LowRank(jnp.asarray(down), jnp.asarray(up), jnp.asarray(scale), start))
        linear.adapter = Adapter(parts)


def _matrix(tensor: np.ndarray, key: str, file: str | Path) -> np.ndarray:
    """A pair's matrix in float32; 1x1 convolutions are matrices, too."""
    if tensor.ndim < 2 or any(size != 1 for size in tensor.shape[2:]):
        raise InputError(f"{file}: {key} has shape {tensor.shape}; a matrix is wanted")
    return tensor.reshape(tensor.shape[:2]).astype(np.float32)


def _alpha(tensor: np.ndarray, key: str, file: str | Path) -> float:
    """An alpha, 0-d or with one element."""
    if tensor.size != 1:
        raise InputError(f"{file}: {key} has shape {tensor.shape}; a single number is wanted")
    alpha = float(tensor.astype(np.float64).item())
    if not math.isfinite(alpha):
        raise InputError(f"{file}: {key} is {alpha}; a finite number is wanted")
    return alpha


# --- writing
# ----------------------------------------------------------------------------------------------------------


def save_lora(
    file: str | Path,
    dit: Backbone,
    dialect: DialectName = "diffusers",
    dtype: DType = jnp.float32,
    *,
    header: bool = False,
) -> int:
    """Writes a transformer's adapters as a LoRA file; returns how many layers it holds.

    Rows that our layers fuse and the dialect does not are cut (each gets its own copy of A); rows
    that it fuses are joined (A stacked, B block-diagonal, alpha grown with the rank). A dialect
    without alpha gets the scale in B, or with `header` (`diffusers` alone) ranks and alphas in the
    file's metadata, as diffusers itself writes them, and B as it is. `peft` also writes
    `adapter_config.json` beside the file. Raises InputError where there is no adapter, or one on
    rows that the dialect has no name for.
    """
    if dialect not in DIALECTS:
        raise InputError(f"no LoRA dialect {dialect!r}; choose one of {', '.join(DIALECTS)}")
    if header and dialect != "diffusers":
        raise InputError(
            f"ranks and alphas in the metadata are diffusers' way, not that of {dialect}"
        )
    spelling = DIALECTS[dialect]
    adapted = {path: linear for path, linear in linears(dit) if linear.adapter is not None}
    if not adapted:
        raise InputError(
            "the transformer carries no adapter; attach one with add_lora or load_lora"
        )
    unnamed = {path: np.ones(linear.kernel.shape[-1], bool) for path, linear in adapted.items()}
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, target in format_of(dit.config).targets(spelling.naming, dit.config).items():
        if target.path not in adapted:
            continue
        linear = adapted[target.path]
        size = linear.kernel.shape[-1] - target.start if target.size == -1 else target.size
        unnamed[target.path][target.start : target.start + size] = False
        pairs = [_pair(part, target.layer) for part in linear.adapter.parts]
        pairs = [cut for pair in pairs if (cut := cut_rows(pair, target.start, size)) is not None]
        if not pairs:
            continue
        a, b, scale = _joined(pairs)
        if target.swapped:
            b = np.concatenate(np.split(b, 2)[::-1])
        key = spelling.prefixes[0] + name.replace(".", spelling.joined)
        if spelling.alpha:
            tensors[f"{key}.alpha"] = np.asarray(scale * len(a), np.float32)
        elif not header:
            b = b * np.float32(scale)
        ranks[name], alphas[name] = len(a), alpha_of(scale, len(a)) if header else float(len(a))
        tensors[f"{key}.{spelling.down}"] = np.ascontiguousarray(a.astype(np.dtype(dtype)))
        tensors[f"{key}.{spelling.up}"] = np.ascontiguousarray(b.astype(np.dtype(dtype)))
    for path, linear in adapted.items():
        if any(
            unnamed[path][part.start : part.start + part.size].any()
            for part in linear.adapter.parts
        ):
            raise InputError(
                f"{file}: the dialect {dialect} has no name for all adapted rows of {path}; choose another"
            )
    peft = peft_config(ranks, alphas)
    metadata = {f"transformer.{name}": value for name, value in peft.items()}
    text = json.dumps(metadata, sort_keys=True)
    write_tensors(Path(file), tensors, {"lora_adapter_metadata": text} if header else None)
    if dialect == "peft":
        write_json(Path(file).with_name("adapter_config.json"), peft)
    return len(ranks)


def _pair(part: LowRank, layer: int | None) -> Pair:
    """A part's pair in one layer, without the ranks that only fill a stack up."""
    at = () if layer is None else (layer,)
    a = np.asarray(jax.device_get(part.down[...]), np.float32)[at].T
    b = np.asarray(jax.device_get(part.up[...]), np.float32)[at].T
    used = np.flatnonzero(a.any(axis=1) | b.any(axis=0))
    rank = int(used[-1]) + 1 if used.size else 0
    return Pair(a[:rank], b[:, :rank], float(np.asarray(part.scale[...])[at]), part.start)


def cut_rows(pair: Pair, start: int, size: int) -> Pair | None:
    """The pair in a window of rows: its rows outside are dropped, rows that it has not are zero."""
    low, high = max(pair.start, start), min(pair.start + len(pair.b), start + size)
    if low >= high or not len(pair.a):
        return None
    b = np.zeros((size, len(pair.a)), np.float32)
    b[low - start : high - start] = pair.b[low - pair.start : high - pair.start]
    return pair._replace(b=b, start=start)


def _joined(pairs: list[Pair]) -> tuple[np.ndarray, np.ndarray, float]:
    """Pairs on the same rows as one: A, B and the common scale (1, with each one's own in B,
    where they differ)."""
    scales = {pair.scale for pair in pairs}
    common = scales.pop() if len(scales) == 1 else 1.0
    b = [pair.b if pair.scale == common else pair.b * np.float32(pair.scale) for pair in pairs]
    return np.concatenate([pair.a for pair in pairs]), np.concatenate(b, axis=1), common
