"""Ranks and alphas of a LoRA as its metadata give them: diffusers' header, PEFT's config beside
it, kohya's."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from squeeze_jax.array_types import Json
from squeeze_jax.errors import InputError
from squeeze_jax.interop.tensors import TensorFolder, read_json


@dataclass(frozen=True)
class LoRASettings:
    """Rank and alpha as metadata give them (diffusers' and PEFT's), against which the tensors are
    checked.

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
    def read(file: str | Path, tensors: TensorFolder) -> "LoRASettings":
        where = next(iter(tensors.files.values()))
        with safe_open(where, framework="np") as opened:
            metadata = opened.metadata() or {}
        values: dict[str, Any] = {}
        # PEFT's file beside PEFT's weights, or beside the only ones: not one that another file left
        # there.
        alone = (
            where.name == "adapter_model.safetensors"
            or len(list(where.parent.glob("*.safetensors"))) == 1
        )
        if alone and (beside := where.with_name("adapter_config.json")).is_file():
            values = read_json(beside)
        elif "lora_adapter_metadata" in metadata:
            try:
                values = json.loads(metadata["lora_adapter_metadata"])
            except (ValueError, RecursionError) as error:
                raise InputError(
                    f"{file}: its lora_adapter_metadata is not JSON ({error})"
                ) from None
            if not isinstance(values, dict):
                raise InputError(f"{file}: its lora_adapter_metadata is no JSON object")
        else:
            values = {
                name: value for name, value in metadata.items() if name.startswith("transformer.")
            }
        values = {name.removeprefix("transformer."): value for name, value in values.items()}
        if values.get("use_dora"):
            raise InputError(
                f"{file}: its metadata say DoRA, which is not supported; merge it with the tool that made it"
            )
        try:
            for pattern in (
                *dict(values.get("rank_pattern") or {}),
                *dict(values.get("alpha_pattern") or {}),
            ):
                re.compile(pattern)
            return LoRASettings(
                file,
                None if values.get("r") is None else int(values["r"]),
                None if values.get("lora_alpha") is None else float(values["lora_alpha"]),
                {name: int(rank) for name, rank in dict(values.get("rank_pattern") or {}).items()},
                {
                    name: float(alpha)
                    for name, alpha in dict(values.get("alpha_pattern") or {}).items()
                },
                str(values.get("use_rslora", False)).lower() == "true",
                _number(metadata.get("ss_network_alpha")),
            )
        except (TypeError, ValueError, OverflowError, re.error) as error:
            raise InputError(
                f"{file}: its metadata give no usable rank or alpha ({error})"
            ) from None

    def scale(self, name: str, rank: int, alpha: float | None) -> float:
        """alpha / rank of a layer (alpha / √rank if rank-stabilised), as PEFT computes it. Raises
        InputError where rank or alpha contradict the metadata, or alpha is not finite."""
        declared_rank = _by_pattern(self.ranks, name, self.rank)
        if declared_rank is not None and declared_rank != rank:
            raise InputError(
                f"{self.file}: {name} has rank {rank}, its metadata say {declared_rank}"
            )
        declared = _by_pattern(self.alphas, name, self.alpha)
        if (
            declared is not None
            and alpha is not None
            and not math.isclose(declared, alpha, rel_tol=1e-2)
        ):
            raise InputError(
                f"{self.file}: {name} has alpha {alpha:g}, its metadata say {declared:g}"
            )
        chosen = next(
            (value for value in (alpha, declared, self.absent) if value is not None), float(rank)
        )
        if not math.isfinite(chosen):
            raise InputError(f"{self.file}: {name} has alpha {chosen}; a finite number is wanted")
        return chosen / (math.sqrt(rank) if self.rank_stabilised else rank)


def _by_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT's rule: the first pattern (a regular expression) that fits the end of the name, else
    the default."""
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


def peft_config(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> Json:
    """PEFT's config of layers with these ranks and alphas."""
    rank, alpha = max(ranks.values()), max(alphas.values())
    # Whole names: PEFT would take a bare one for the end of many.
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {
            f"^{re.escape(name)}$": value for name, value in ranks.items() if value != rank
        },
        "alpha_pattern": {
            f"^{re.escape(name)}$": value for name, value in alphas.items() if value != alpha
        },
        "target_modules": "|".join(map(re.escape, ranks)),
    }


def alpha_of(scale: float, rank: int) -> float:
    """The shortest alpha for which alpha / rank is the float32 `scale`."""
    for digits in range(1, 10):
        alpha = float(f"{scale * rank:.{digits}g}")
        if np.float32(alpha / rank) == np.float32(scale):
            return alpha
    return scale * rank
