"""A LoRA file as the trained leaves of a config: its adapters filled in place, layout and scale
as the config has them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from squeeze_jax.errors import InputError
from squeeze_jax.interop.lora import Pair, cut_rows, read_pairs
from squeeze_jax.layers.lora import LowRank, linears
from squeeze_jax.models.backbone import Backbone

Leaves = dict[str, np.ndarray]


def adapter_leaves(
    dit: Backbone,
    file: str | Path,
    alpha_over_rank: float,
    fresh: np.random.Generator | None = None,
    init_gain: float = 1.0,
) -> Leaves:
    """Reads `down` and `up` of every adapter that the file names, by dotted path.

    dit: a transformer with a config's adapters, of which only shapes are looked at. Ranks and
    layers that the file lacks are zero; with `fresh` (to train on) their `down` is drawn from it,
    since of two zero matrices neither ever learns, with the deviation that `LoRAConfig.init_gain`
    gives a new adapter's. A scale that differs from the config's goes into `up`. Raises InputError
    where a layer has no adapter, where the rank is larger, where the file changes rows that the
    config's adapters leave alone, or where its q, k and v have down-projections of their own and
    the config shares one (lora.qkv).
    """
    _, pairs, _ = read_pairs(file, dit)
    modules, leaves = dict(linears(dit)), {}
    for path in dict.fromkeys(path for path, _ in pairs):
        adapter = modules[path].adapter
        if adapter is None:
            raise InputError(
                f"{file}: adapts {path}, where this config has no adapter; widen lora.target"
            )
        ours = {layer: found for (where, layer), found in pairs.items() if where == path}
        if any(_changes_others(pair, adapter.parts) for found in ours.values() for pair in found):
            raise InputError(
                f"{file}: adapts rows of {path} that this config leaves alone (its adapter covers q, k "
                "and v); load it with load_lora to sample, or merge it into the base"
            )
        for number, part in enumerate(adapter.parts):
            name = f"dit.{path}.adapter.parts.{number}"
            leaves |= {
                f"{name}.down": _down(part, fresh, init_gain),
                f"{name}.up": np.zeros(part.up.shape, np.float32),
            }
            down, up = leaves[f"{name}.down"], leaves[f"{name}.up"]
            rank = part.down.shape[-1]
            for layer, found in ours.items():
                inside = [cut_rows(pair, part.start, part.size) for pair in found]
                inside = [pair for pair in inside if pair is not None]
                if not inside:
                    continue
                changing = [pair for pair in inside if pair.b.any()] or inside
                if len(changing[0].a) > rank:  # q, k and v may be three blocks of one pair
                    changing = [_without_unused_ranks(pair) for pair in changing]
                at, a = () if layer is None else (layer,), changing[0].a
                if any(not np.array_equal(pair.a, a) for pair in changing):
                    raise InputError(
                        f"{file}: q, k and v of {path} have down-projections of their own; "
                        "set lora.qkv to separate"
                    )
                if len(a) > rank:
                    raise InputError(
                        f"{file}: {path} has rank {len(a)}, the config's lora.rank is {rank}; raise it"
                    )
                down[(*at, slice(None), slice(len(a)))] = a.T
                for pair in changing:
                    ratio = np.float32(pair.scale) / np.float32(alpha_over_rank)
                    up[(*at, slice(len(a)))] += pair.b.T * ratio
    return leaves


def _down(part: LowRank, fresh: np.random.Generator | None, init_gain: float) -> np.ndarray:
    """The down-projection of ranks and layers that a file lacks."""
    if fresh is None:
        return np.zeros(part.down.shape, np.float32)
    deviation = np.float32(init_gain * part.down.shape[-2] ** -0.5)
    return fresh.standard_normal(part.down.shape, np.float32) * deviation


def _without_unused_ranks(pair: Pair) -> Pair:
    used = pair.b.any(axis=0)
    return pair._replace(a=pair.a[used], b=pair.b[:, used])


def _changes_others(pair: Pair, parts: Sequence[LowRank]) -> bool:
    """Whether a pair changes rows that no part of an adapter covers."""
    rows = pair.start + np.flatnonzero(pair.b.any(axis=1))
    covered = [(part.start <= rows) & (rows < part.start + part.size) for part in parts]
    return not np.logical_or.reduce(covered).all()
