"""Low-rank adapters on the transformer's linear layers (LoRA, arXiv 2106.09685).

An adapter adds scale · (x·down)·up to chosen output channels of a `Linear`, scale = alpha / rank.
`up` starts at zero, so a fresh adapter has exactly no effect. In a stack of blocks the adapter is
stacked too. Adapters are parameters of their own kind (`LoRAParam`), by which filters tell them
from the base.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from squeeze_jax.array_types import Array, DType, Float
from squeeze_jax.layers.linear import FLOAT32, PRODUCT, Linear, multiply_rows
from squeeze_jax.layers.norm import scaled
from squeeze_jax.sharding import all_gather_fsdp

QKVLayout = Literal["shared", "separate"]

UNO = r"double_blocks\.(img|txt)_attn\.(qkv|proj)|single_blocks\.linear[12]"
"""UNO's placement (arXiv 2504.02160), whose rank 512 the paper shares.

Source: docs/decisions.md, "LoRA placement".
"""


class LoRAParam(nnx.Param):
    """A trained leaf of an adapter."""


class LoRAScale(nnx.Variable):
    """alpha / rank: one value for each layer of a stack, never trained."""


@dataclass(frozen=True)
class LoRAConfig:
    """Which linear layers carry an adapter; the defaults are the paper's rank with UNO's
    placement.
    """

    rank: int = 512
    alpha: float | None = None
    """The delta is scaled by alpha / rank; None means alpha = rank."""
    target: str = UNO
    """Regular expression that a layer's dotted path must match from start to end."""
    qkv: QKVLayout = "shared"
    """`shared`: one down-projection for q, k and v together; `separate`: one each, as PEFT files
    have them."""
    init_gain: float = 1.0
    """`down` starts normal with standard deviation init_gain · in^-1/2, `up` at zero (our decision:
    docs/decisions.md, "LoRA initialisation")."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank is {self.rank}; it must be at least 1")
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(
                f"lora.alpha is {self.alpha}; it must be larger than 0, or None for alpha = rank"
            )
        if not self.init_gain > 0:
            raise ValueError(f"lora.init_gain is {self.init_gain}; it must be larger than 0")
        if self.qkv not in get_args(QKVLayout):
            raise ValueError(
                f"lora.qkv is {self.qkv!r}; choose one of {', '.join(get_args(QKVLayout))}"
            )
        try:
            re.compile(self.target)
        except re.error as error:
            raise ValueError(
                f"lora.target {self.target!r} is not a regular expression: {error}"
            ) from None


class LowRank(nnx.Module):
    """scale · (x·down)·up for output channels start .. start + size. Leaves may have a leading
    depth axis.
    """

    def __init__(self, down: jax.Array, up: jax.Array, scale: jax.Array, start: int) -> None:
        self.down, self.up, self.scale = LoRAParam(down), LoRAParam(up), LoRAScale(scale)
        self.start = start

    @property
    def size(self) -> int:
        """Output channels."""
        return self.up.shape[-1]

    def __call__(
        self,
        inputs: Sequence[Array],
        ranges: Sequence[slice],
        precision: jax.lax.PrecisionLike = None,
    ) -> list[jax.Array]:
        """The delta [*B, _] of each of some ranges of the part's output channels, for `inputs`
        [*B, _] side by side. Both matrices are gathered once for all ranges."""
        dtype = inputs[0].dtype
        down, up = (leaf[...].astype(dtype) for leaf in (self.down, self.up))
        down, up = all_gather_fsdp(down, "nothing"), all_gather_fsdp(up, "out")
        narrow = multiply_rows(inputs, down, dtype, precision)
        narrow = checkpoint_name(narrow, PRODUCT)  # the gradient of `up` needs it
        return [
            scaled(jnp.matmul(narrow, up[:, channels], precision=precision), self.scale[...])
            for channels in ranges
        ]

    def matrix(self) -> Float[Array, "*depth C _"]:
        """The delta of the kernel, in float32."""
        down, up = self.down[...].astype(jnp.float32), self.up[...].astype(jnp.float32)
        delta = jnp.matmul(down, up, precision=FLOAT32)  # a merge keeps its rounding for ever
        return delta * self.scale[...].astype(jnp.float32)[..., None, None]


class Adapter(nnx.Module):
    """What a `Linear` carries: one low-rank delta for each range of output channels."""

    def __init__(self, parts: list[LowRank]) -> None:
        self.parts = nnx.List(parts)

    def add(
        self,
        pieces: Sequence[Array],
        inputs: Sequence[Array],
        precision: jax.lax.PrecisionLike = None,
    ) -> list[jax.Array]:
        """The base's output for the `inputs` [*B, _] side by side, in `pieces` [*B, _] along the
        channels, with the delta added; `precision` is the base's."""
        pieces, borders = list(pieces), [0, *accumulate(piece.shape[-1] for piece in pieces)]
        for part in self.parts:
            # Which of the layer's channels the part covers, in each piece that has some of them.
            covered = {
                i: (max(part.start, start), min(part.start + part.size, end))
                for i, (start, end) in enumerate(pairwise(borders))
                if part.start < end and start < part.start + part.size
            }
            ranges = [slice(a - part.start, b - part.start) for a, b in covered.values()]
            deltas = part(inputs, ranges, precision)
            for (i, (first, end)), delta in zip(covered.items(), deltas, strict=True):
                around = (first - borders[i], borders[i + 1] - end)
                if any(around):
                    delta = jnp.pad(delta, [(0, 0)] * (delta.ndim - 1) + [around])
                pieces[i] = pieces[i] + delta
        return pieces

    def matrix(self, out_features: int) -> Float[Array, "*depth C F"]:
        """The whole delta of the kernel, in float32."""
        total: jax.Array | float = 0.0
        for part in self.parts:
            matrix = part.matrix()
            after = out_features - part.start - part.size
            total = total + jnp.pad(matrix, [(0, 0)] * (matrix.ndim - 1) + [(part.start, after)])
        return jnp.asarray(total)


def linears(model: nnx.Module) -> Iterator[tuple[str, Linear]]:
    """Every linear layer of a model under its dotted path."""
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Linear):
            yield ".".join(map(str, path)), module


def add_lora(
    model: nnx.Module, config: LoRAConfig, *, rngs: nnx.Rngs, param_dtype: DType = jnp.float32
) -> list[str]:
    """Attaches fresh adapters to every linear layer that `config.target` matches; returns their
    paths.

    `down` is normal with standard deviation `config.init_gain` · in^-1/2, `up` is zero (our
    decision). Raises ValueError if nothing matches or a layer already carries an adapter.
    """
    pattern = re.compile(config.target)
    chosen = {
        path: linear
        for path, linear in sorted(linears(model), key=lambda item: item[0])
        if pattern.fullmatch(path)
    }
    if not chosen:
        raise ValueError(
            f"lora.target {config.target!r} matches no linear layer of the transformer"
        )
    if carrying := [path for path, linear in chosen.items() if linear.adapter is not None]:
        raise ValueError(
            f"{', '.join(carrying)} already carries an adapter; merge or remove it first"
        )
    alpha = config.rank if config.alpha is None else config.alpha
    for path, linear in chosen.items():
        *depth, fan_in, fan_out = linear.kernel.shape
        scale = jnp.full(tuple(depth), alpha / config.rank, jnp.float32)
        parts = []
        for start, size in qkv_ranges(path, fan_in, fan_out, config.qkv):
            noise = jax.random.normal(rngs.params(), (*depth, fan_in, config.rank), param_dtype)
            down = noise * (config.init_gain * fan_in**-0.5)
            parts.append(
                LowRank(down, jnp.zeros((*depth, config.rank, size), param_dtype), scale, start)
            )
        linear.adapter = Adapter(parts)
    return list(chosen)


def qkv_ranges(path: str, fan_in: int, fan_out: int, layout: QKVLayout) -> list[tuple[int, int]]:
    """(start, size) of the output channels that each low-rank part covers.

    In a single block's `linear1`, whose rows are q, k, v and the feed-forward's, only q, k and v
    are adapted (UNO).
    """
    if path.endswith("_attn.qkv") or path.endswith("single_blocks.linear1"):
        return [(0, 3 * fan_in)] if layout == "shared" else [(i * fan_in, fan_in) for i in range(3)]
    return [(0, fan_out)]


def remove_lora(model: nnx.Module) -> None:
    """Takes every adapter off; the base is untouched."""
    for _, linear in linears(model):
        linear.adapter = nnx.data(None)


def merge_lora(model: nnx.Module) -> dict[str, jax.Array]:
    """Adds every adapter's delta to its kernel, in float32 and rounded once, and takes the adapters
    off.

    Returns the kernels as they were, by path: `unmerge_lora` puts these back bit for bit
    (subtracting the delta again would drift in bfloat16). Raises ValueError for an int8 base, which
    cannot take a delta. Kernels are [in, out], or [blocks, in, out] of a stack.
    """
    before = {}
    for path, linear in linears(model):
        if linear.adapter is None:
            continue
        kernel = linear.kernel[...]
        if linear.kernel_scale is not None:
            raise ValueError(
                f"{path} is kept in int8; load the base in bfloat16 to merge adapters into it"
            )
        before[path] = kernel
        merged = kernel.astype(jnp.float32) + linear.adapter.matrix(kernel.shape[-1])
        linear.kernel.set_value(merged.astype(kernel.dtype))
        linear.adapter = nnx.data(None)
    return before


def unmerge_lora(model: nnx.Module, before: dict[str, jax.Array]) -> None:
    """Puts back the kernels ([in, out], or [blocks, in, out] of a stack) that `merge_lora`
    returned."""
    for path, linear in linears(model):
        if path in before:
            linear.kernel.set_value(before[path])
