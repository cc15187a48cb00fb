"""A LoRA file as the trained leaves of a config: its adapters filled in place, layout and scale as the config has them."""

from pathlib import Path

import numpy as np

from squeeze_jax.errors import InputError
from squeeze_jax.interop.lora import Pair, read_pairs
from squeeze_jax.layers.lora import LowRank, linears
from squeeze_jax.models.dit import DiT

Leaves = dict[str, np.ndarray]


def adapter_leaves(
    dit: DiT,
    file: str | Path,
    alpha_over_rank: float,
    fresh: np.random.Generator | None = None,
    init_gain: float = 1.0,
) -> Leaves:
    """`down` and `up` of every adapter that the file names, by dotted path; adapters that it does not name are left out.

    dit: a transformer with a config's adapters, of which only shapes are looked at. Ranks and layers that the file lacks
    are zero; with `fresh` (to train on) their `down` is drawn from it, since of two zero matrices neither ever learns, with
    the deviation that `LoRAConfig.init_gain` gives a new adapter's.
    A scale that differs from the config's goes into `up`. Raises InputError where a layer has no adapter, where the rank is
    larger, or where the file's q, k and v have down-projections of their own and the config shares one (lora.qkv).
    """
    _, pairs, _ = read_pairs(file, dit)
    modules, leaves = dict(linears(dit)), {}
    for path in dict.fromkeys(path for path, _ in pairs):
        linear = modules[path]
        if linear.adapter is None:
            raise InputError(f"{file}: adapts {path}, where this config has no adapter; widen lora.target")
        unused = sum(len(found) for (where, _), found in pairs.items() if where == path)
        for number, part in enumerate(linear.adapter.parts):
            *depth, fan_in, rank = part.down.shape
            down, up = np.zeros((*depth, fan_in, rank), np.float32), np.zeros((*depth, rank, part.size), np.float32)
            if fresh is not None:
                deviation = np.float32(init_gain * fan_in**-0.5)
                down = fresh.standard_normal(down.shape, np.float32) * deviation
            for (where, layer), found in pairs.items():
                inside = [pair for pair in found if _inside(pair, part)]
                if where != path or not inside:
                    continue
                at = () if layer is None else (layer,)
                a = inside[0].a
                if any(not np.array_equal(pair.a, a) for pair in inside):
                    raise InputError(
                        f"{file}: q, k and v of {path} have down-projections of their own; set lora.qkv to separate"
                    )
                if len(a) > rank:
                    raise InputError(f"{file}: {path} has rank {len(a)}, the config's lora.rank is {rank}; raise it")
                down[(*at, slice(None), slice(len(a)))] = a.T
                for pair in inside:
                    ratio = np.float32(pair.scale) / np.float32(alpha_over_rank)
                    rows = slice(pair.start - part.start, pair.start - part.start + len(pair.b))
                    up[(*at, slice(len(a)), rows)] = pair.b.T * ratio
                unused -= len(inside)
            name = f"dit.{path}.adapter.parts.{number}"
            leaves |= {f"{name}.down": down, f"{name}.up": up}
        if unused:
            raise InputError(f"{file}: adapts rows of {path} across those of this config; set lora.qkv to shared")
    return leaves


def _inside(pair: Pair, part: LowRank) -> bool:
    return part.start <= pair.start and pair.start + len(pair.b) <= part.start + part.size
