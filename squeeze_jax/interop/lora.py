"""FLUX.1 LoRA files, read and written in every common dialect.

Whatever the spelling, a file holds low-rank pairs: A [rank, in] and B [out, rank] of a linear layer, whose delta is
scale · B·A in the rows of that layer, scale = alpha / rank (alpha / √rank where the file says rank-stabilised; an absent
alpha means alpha = rank). A dialect says how layers and the two matrices are spelled; which rows of which of our layers
a name means follows from the mapping tables that checkpoints are read with.
"""

import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open

from squeeze_jax.array_types import DType
from squeeze_jax.errors import InputError
from squeeze_jax.interop.flux import diffusers_entries, original_entries
from squeeze_jax.interop.mapping import Entry
from squeeze_jax.interop.tensors import TensorFolder, read_json, write_json, write_tensors
from squeeze_jax.layers.lora import Adapter, LowRank, linears
from squeeze_jax.models.dit import DiT, DiTConfig

DialectName = Literal["diffusers", "peft", "kohya", "kohya_diffusers", "comfyui", "xlabs"]


class Target(NamedTuple):
    """Rows start .. start + size of one of our linear layers (size -1: to the end)."""

    path: str
    layer: int | None
    """Index on the depth axis of a stacked layer."""
    start: int
    size: int
    swapped: bool = False
    """The file has the two output halves in the other order."""


class Dialect(NamedTuple):
    """How a dialect spells a layer and the two matrices."""

    prefixes: tuple[str, ...]
    """Before the layer's name; the first is written, all are read."""
    targets: Callable[[DiTConfig], dict[str, Target]]
    joined: str
    """Between the parts of the layer's name."""
    down: str
    up: str
    alpha: bool
    """An `.alpha` tensor beside every pair; without one the scale is multiplied into B on writing."""


def _targets(table: Iterable[Entry]) -> dict[str, Target]:
    """Every linear layer that a checkpoint format names, from its mapping table."""
    found = {}
    for entry in table:
        if not entry.path.endswith(".kernel"):
            continue
        start = 0
        for name, size in zip(entry.sources, entry.sizes or (-1,), strict=True):
            swapped = entry.layout == "swap_halves"
            found[name.removesuffix(".weight")] = Target(
                entry.path.removesuffix(".kernel"), entry.layer, start, size, swapped
            )
            start += size
    return found


def _diffusers_targets(config: DiTConfig) -> dict[str, Target]:
    return _targets(diffusers_entries(config))


def _original_targets(config: DiTConfig) -> dict[str, Target]:
    return _targets(original_entries(config))


def _xlabs_targets(config: DiTConfig) -> dict[str, Target]:
    """Attention alone: stream 1 is the image's, 2 the text's; a single block's qkv leaves the feed-forward's rows out."""
    found = {}
    for i in range(config.num_double_blocks):
        for number, stream in ((1, "img"), (2, "txt")):
            for name in ("qkv", "proj"):
                path = f"double_blocks.{stream}_attn.{name}"
                found[f"double_blocks.{i}.processor.{name}_lora{number}"] = Target(path, i, 0, -1)
    for i in range(config.num_single_blocks):
        found[f"single_blocks.{i}.processor.qkv_lora"] = Target("single_blocks.linear1", i, 0, 3 * config.width)
        found[f"single_blocks.{i}.processor.proj_lora"] = Target("single_blocks.linear2", i, 0, -1)
    return found


DIALECTS: dict[DialectName, Dialect] = {
    "diffusers": Dialect(
        ("transformer.", "", "diffusion_model."), _diffusers_targets, ".", "lora_A.weight", "lora_B.weight", False
    ),
    "peft": Dialect(
        ("base_model.model.", "base_model.model.transformer."),
        _diffusers_targets, ".", "lora_A.weight", "lora_B.weight", False,
    ),
    "kohya": Dialect(("lora_unet_",), _original_targets, "_", "lora_down.weight", "lora_up.weight", True),
    "kohya_diffusers": Dialect(
        ("lora_transformer_",), _diffusers_targets, "_", "lora_down.weight", "lora_up.weight", True
    ),
    "comfyui": Dialect(
        ("diffusion_model.", "", "model.diffusion_model."),
        _original_targets, ".", "lora_down.weight", "lora_up.weight", True,
    ),
    "xlabs": Dialect(("", "diffusion_model."), _xlabs_targets, ".", "down.weight", "up.weight", False),
}  # fmt: skip

ROLES = {
    "lora_A.weight": "A", "lora_A.default.weight": "A", "lora_down.weight": "A", "down.weight": "A",
    "lora_B.weight": "B", "lora_B.default.weight": "B", "lora_up.weight": "B", "up.weight": "B",
    "alpha": "alpha",
}  # fmt: skip
TEXT_ENCODERS = re.compile(r"(lora_te\d?_|text_encoder(_\d)?\.|text_encoders\.).*")
REFUSED = (
    (r".*(dora_scale|lora_magnitude_vector(\.default)?(\.weight)?)", "DoRA (magnitudes beside the low-rank pair)"),
    (r".*\.lokr_w\d.*", "LoKr (Kronecker products)"),
    (r".*\.hada_w\d.*", "LoHa (Hadamard products)"),
    (r".*\.(oft_blocks|oft_diag|boft.*)", "OFT (rotations)"),
    (r".*\.(lora_mid\.weight|lora_B(\.default)?\.bias|lora_up\.bias)", "a low-rank pair with a middle factor or a bias"),
    (r".*\.(diff|diff_b|set_weight|w_norm|b_norm)", "a full difference of a weight, bias or norm"),
    (r".*_norm\.scale", "a control LoRA with norms of its own"),
)
"""Other algebras under a LoRA's name: pattern of a key, and what it is."""


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
    start: int


# --- reading ----------------------------------------------------------------------------------------------------------


def load_lora(dit: DiT, file: str | Path) -> LoRAReport:
    """Attaches a LoRA file (or a folder with one) to a transformer, as an adapter of every layer that it names.

    A transformer that carries adapters already keeps them: the deltas add up. Raises InputError, and changes nothing,
    where a key is unknown, a shape or a rank does not fit, a half of a pair is missing, metadata and tensors disagree, or
    the file holds something else than low-rank pairs.
    """
    dialect, pairs, skipped = read_pairs(file, dit)
    attach_pairs(dit, pairs)
    return LoRAReport(dialect, len(pairs), tuple(skipped))


def read_pairs(
    file: str | Path, dit: DiT
) -> tuple[DialectName, dict[tuple[str, int | None], list[Pair]], list[str]]:
    """The dialect of a LoRA file, its pairs for each (path, layer) of ours, and the keys that were skipped, aloud."""
    tensors = TensorFolder(file)
    skipped = [key for key in tensors.names() if TEXT_ENCODERS.fullmatch(key)]
    if skipped:
        warnings.warn(f"{file}: {len(skipped)} keys for text encoders are skipped ({skipped[0]} …)", stacklevel=3)
    keys = [key for key in tensors.names() if key not in set(skipped)]
    for key in keys:
        for pattern, what in REFUSED:
            if re.fullmatch(pattern, key):
                raise InputError(f"{file}: {key} is {what}, which is not supported; merge it with the tool that made it")
    if not keys:
        raise InputError(f"{file}: no LoRA of the transformer in it")
    dialect, names = _recognise(keys, dit.config, file)
    grouped: dict[str, dict[str, str]] = {}
    spelled_as: dict[tuple[str, str], str] = {}
    for key in keys:
        module, role = _split_role(key) or ("", "")
        other = spelled_as.setdefault((names[module][0], role), key)
        if other != key:
            raise InputError(f"{file}: {other} and {key} are the same matrix of one layer; delete one of the two pairs")
        grouped.setdefault(module, {})[role] = key
    settings = _Settings.read(file, tensors)
    kernels = {path: linear.kernel.shape for path, linear in linears(dit)}
    pairs: dict[tuple[str, int | None], list[Pair]] = {}
    for module, roles in grouped.items():
        if lacking := [role for role in ("A", "B") if role not in roles]:
            raise InputError(f"{file}: {module} has no {lacking[0]} matrix beside {next(iter(roles.values()))}")
        a, b = (_matrix(tensors.read(roles[role]), roles[role], file) for role in ("A", "B"))
        if not a.shape[0]:
            raise InputError(f"{file}: {module} has rank 0; delete the pair, it does nothing")
        alpha = _alpha(tensors.read(roles["alpha"]), roles["alpha"], file) if "alpha" in roles else None
        bare, target = names[module]
        fan_in, fan_out = kernels[target.path][-2:]
        size = fan_out - target.start if target.size == -1 else target.size
        if a.shape[1] != fan_in or b.shape != (size, a.shape[0]):
            raise InputError(
                f"{file}: {module} has A {a.shape} and B {b.shape}, this model wants A (r, {fan_in}) and B ({size}, r)"
                + ("; a control LoRA widens img_in and is not supported" if target.path == "img_in" else "")
            )
        if target.swapped:
            b = np.concatenate(np.split(b, 2)[::-1])
        scale = settings.scale(bare, a.shape[0], alpha)
        pairs.setdefault((target.path, target.layer), []).append(Pair(a, b, scale, target.start))
    return dialect, pairs, skipped


def attach_pairs(dit: DiT, pairs: Mapping[tuple[str, int | None], list[Pair]]) -> None:
    """Adds pairs to the adapters of a transformer. In a stack, lower ranks and absent layers are filled with zeros."""
    modules = dict(linears(dit))
    for path in dict.fromkeys(path for path, _ in pairs):
        linear = modules[path]
        *depth, fan_in, _ = linear.kernel.shape
        layers = {layer: found for (where, layer), found in pairs.items() if where == path}
        parts: list[LowRank] = list(linear.adapter.parts) if linear.adapter is not None else []
        ranges = dict.fromkeys((pair.start, len(pair.b)) for found in layers.values() for pair in found)
        for start, size in ranges:
            here = {layer: p for layer, found in layers.items() for p in found if (p.start, len(p.b)) == (start, size)}
            rank = max(len(pair.a) for pair in here.values())
            down, up = np.zeros((*depth, fan_in, rank), np.float32), np.zeros((*depth, rank, size), np.float32)
            scale = np.ones(tuple(depth), np.float32)
            for layer, pair in here.items():
                at = () if layer is None else (layer,)
                down[(*at, slice(None), slice(0, len(pair.a)))] = pair.a.T
                up[(*at, slice(0, len(pair.a)))] = pair.b.T
                scale[at] = pair.scale
            parts.append(LowRank(jnp.asarray(down), jnp.asarray(up), jnp.asarray(scale), start))
        linear.adapter = Adapter(parts)


def _split_role(key: str) -> tuple[str, str] | None:
    for suffix, role in ROLES.items():
        if key.endswith(f".{suffix}"):
            return key.removesuffix(f".{suffix}"), role
    return None


def spelled(dialect: Dialect, config: DiTConfig) -> dict[str, tuple[str, Target]]:
    """Every layer of a model as a dialect spells it, in all of its prefixes: (name without prefix, what it means)."""
    return {
        prefix + name.replace(".", dialect.joined): (name, target)
        for prefix in dialect.prefixes
        for name, target in dialect.targets(config).items()
    }


def _recognise(
    keys: list[str], config: DiTConfig, file: str | Path
) -> tuple[DialectName, dict[str, tuple[str, Target]]]:
    """The dialect that knows most of the keys; InputError unless it knows them all."""
    modules = {key: split[0] if (split := _split_role(key)) else None for key in keys}
    tables = {name: spelled(dialect, config) for name, dialect in DIALECTS.items()}
    best = max(DIALECTS, key=lambda name: sum(module in tables[name] for module in modules.values()))
    unused = [key for key, module in modules.items() if module not in tables[best]]
    if unused:
        spellings = list(tables[best])
        listed = []
        for key in unused[:6]:
            close = get_close_matches(modules[key] or key, spellings, n=1)
            listed.append(key + (f" (nearest: {close[0]})" if close else ""))
        more = f"; and {len(unused) - 6} more" if len(unused) > 6 else ""
        raise InputError(
            f"{file}: {len(unused)} of {len(keys)} keys name no layer of this model: {'; '.join(listed)}{more}"
        )
    return best, tables[best]


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


@dataclass(frozen=True)
class _Settings:
    """Rank and alpha as metadata give them (diffusers' and PEFT's), against which the tensors are checked.

    Kohya's `ss_network_alpha` only fills in where the file has no alpha.
    """

    file: str | Path
    rank: int | None = None
    alpha: float | None = None
    ranks: Mapping[str, int] | None = None
    alphas: Mapping[str, float] | None = None
    rank_stabilised: bool = False
    absent: float | None = None
    """Alpha of a layer about which nothing else says anything."""

    @staticmethod
    def read(file: str | Path, tensors: TensorFolder) -> "_Settings":
        where = next(iter(tensors.files.values()))
        with safe_open(where, framework="np") as opened:
            metadata = opened.metadata() or {}
        values: dict[str, Any] = {}
        # PEFT's file beside PEFT's weights, or beside the only ones: not one that another file left there.
        alone = where.name == "adapter_model.safetensors" or len(list(where.parent.glob("*.safetensors"))) == 1
        if alone and (beside := where.with_name("adapter_config.json")).is_file():
            values = read_json(beside)
        elif "lora_adapter_metadata" in metadata:
            try:
                values = json.loads(metadata["lora_adapter_metadata"])
            except (ValueError, RecursionError) as error:
                raise InputError(f"{file}: its lora_adapter_metadata is not JSON ({error})") from None
            if not isinstance(values, dict):
                raise InputError(f"{file}: its lora_adapter_metadata is no JSON object")
        else:
            values = {name: value for name, value in metadata.items() if name.startswith("transformer.")}
        values = {name.removeprefix("transformer."): value for name, value in values.items()}
        if values.get("use_dora"):
            raise InputError(f"{file}: its metadata say DoRA, which is not supported; merge it with the tool that made it")
        try:
            for pattern in (*dict(values.get("rank_pattern") or {}), *dict(values.get("alpha_pattern") or {})):
                re.compile(pattern)
            return _Settings(
                file,
                None if values.get("r") is None else int(values["r"]),
                None if values.get("lora_alpha") is None else float(values["lora_alpha"]),
                {name: int(rank) for name, rank in dict(values.get("rank_pattern") or {}).items()},
                {name: float(alpha) for name, alpha in dict(values.get("alpha_pattern") or {}).items()},
                str(values.get("use_rslora", False)).lower() == "true",
                _number(metadata.get("ss_network_alpha")),
            )
        except (TypeError, ValueError, OverflowError, re.error) as error:
            raise InputError(f"{file}: its metadata give no usable rank or alpha ({error})") from None

    def scale(self, name: str, rank: int, alpha: float | None) -> float:
        """alpha / rank of a layer (alpha / √rank if rank-stabilised)."""
        declared_rank = _by_pattern(self.ranks, name, self.rank)
        if declared_rank is not None and declared_rank != rank:
            raise InputError(f"{self.file}: {name} has rank {rank}, its metadata say {declared_rank}")
        declared = _by_pattern(self.alphas, name, self.alpha)
        if declared is not None and alpha is not None and not math.isclose(declared, alpha, rel_tol=1e-2):
            raise InputError(f"{self.file}: {name} has alpha {alpha:g}, its metadata say {declared:g}")
        chosen = next((value for value in (alpha, declared, self.absent) if value is not None), float(rank))
        if not math.isfinite(chosen):
            raise InputError(f"{self.file}: {name} has alpha {chosen}; a finite number is wanted")
        return chosen / (math.sqrt(rank) if self.rank_stabilised else rank)


def _by_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT's rule: the first pattern (a regular expression) that fits the end of the name, else the default."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def _number(text: str | None) -> float | None:
    """A number in a file's metadata, where tools write "None" for none."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


# --- writing ----------------------------------------------------------------------------------------------------------


def save_lora(
    file: str | Path,
    dit: DiT,
    dialect: DialectName = "diffusers",
    dtype: DType = jnp.float32,
    *,
    header: bool = False,
) -> int:
    """Writes a transformer's adapters as a LoRA file; returns how many layers it holds.

    Rows that our layers fuse and the dialect does not are cut (each gets its own copy of A); rows that it fuses are
    joined (A stacked, B block-diagonal, alpha grown with the rank). A dialect without alpha gets the scale in B, or with
    `header` (`diffusers` alone) ranks and alphas in the file's metadata, as diffusers itself writes them, and B as it is.
    `peft` also writes `adapter_config.json` beside the file. Raises InputError where there is no adapter, or one on rows
    that the dialect has no name for.
    """
    if dialect not in DIALECTS:
        raise InputError(f"no LoRA dialect {dialect!r}; choose one of {', '.join(DIALECTS)}")
    if header and dialect != "diffusers":
        raise InputError(f"ranks and alphas in the metadata are diffusers' way, not that of {dialect}")
    spelling = DIALECTS[dialect]
    adapted = {path: linear for path, linear in linears(dit) if linear.adapter is not None}
    if not adapted:
        raise InputError("the transformer carries no adapter; attach one with add_lora or load_lora")
    unnamed = {path: np.ones(linear.kernel.shape[-1], bool) for path, linear in adapted.items()}
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, target in spelling.targets(dit.config).items():
        if target.path not in adapted:
            continue
        linear = adapted[target.path]
        size = linear.kernel.shape[-1] - target.start if target.size == -1 else target.size
        unnamed[target.path][target.start : target.start + size] = False
        pairs = [_pair(part, target.layer) for part in linear.adapter.parts]
        pairs = [cut for pair in pairs if (cut := _cut(pair, target.start, size)) is not None]
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
        if any(unnamed[path][part.start : part.start + part.size].any() for part in linear.adapter.parts):
            raise InputError(f"{file}: the dialect {dialect} has no name for all adapted rows of {path}; choose another")
    peft = peft_config(ranks, alphas)
    metadata = {f"transformer.{name}": value for name, value in peft.items()}
    text = json.dumps(metadata, sort_keys=True)
    write_tensors(Path(file), tensors, {"lora_adapter_metadata": text} if header else None)
    if dialect == "peft":
        write_json(Path(file).with_name("adapter_config.json"), peft)
    return len(ranks)


def peft_config(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, Any]:
    """PEFT's config of layers with these ranks and alphas."""
    rank, alpha = max(ranks.values()), max(alphas.values())
    # Whole names: PEFT would take a bare one for the end of many.
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(name)}$": value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{re.escape(name)}$": value for name, value in alphas.items() if value != alpha},
        "target_modules": "|".join(map(re.escape, ranks)),
    }


def alpha_of(scale: float, rank: int) -> float:
    """The shortest alpha for which alpha / rank is the float32 `scale`."""
    for digits in range(1, 10):
        alpha = float(f"{scale * rank:.{digits}g}")
        if np.float32(alpha / rank) == np.float32(scale):
            return alpha
    return scale * rank


def _pair(part: LowRank, layer: int | None) -> Pair:
    """A part's pair in one layer, without the ranks that only fill a stack up."""
    at = () if layer is None else (layer,)
    a = np.asarray(jax.device_get(part.down[...]), np.float32)[at].T
    b = np.asarray(jax.device_get(part.up[...]), np.float32)[at].T
    used = np.flatnonzero(a.any(axis=1) | b.any(axis=0))
    rank = int(used[-1]) + 1 if used.size else 0
    return Pair(a[:rank], b[:, :rank], float(np.asarray(part.scale[...])[at]), part.start)


def _cut(pair: Pair, start: int, size: int) -> Pair | None:
    """The pair in a window of rows: its rows outside are dropped, rows that it has not are zero."""
    low, high = max(pair.start, start), min(pair.start + len(pair.b), start + size)
    if low >= high or not len(pair.a):
        return None
    b = np.zeros((size, len(pair.a)), np.float32)
    b[low - start : high - start] = pair.b[low - pair.start : high - pair.start]
    return pair._replace(b=b, start=start)


def _joined(pairs: list[Pair]) -> tuple[np.ndarray, np.ndarray, float]:
    """Pairs on the same rows as one: A, B and the common scale (1, with each one's own in B, where they differ)."""
    scales = {pair.scale for pair in pairs}
    common = scales.pop() if len(scales) == 1 else 1.0
    b = [pair.b if pair.scale == common else pair.b * np.float32(pair.scale) for pair in pairs]
    return np.concatenate([pair.a for pair in pairs]), np.concatenate(b, axis=1), common
