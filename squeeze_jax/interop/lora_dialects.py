"""How LoRA files spell layers and matrices: the dialects, and what goes under a LoRA's name and
is none."""

import re
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, NamedTuple

from squeeze_jax.errors import InputError
from squeeze_jax.interop.formats import FORMATS, format_of
from squeeze_jax.interop.transformer_format import Naming, Target
from squeeze_jax.models.backbone import BackboneConfig

DialectName = Literal[
    "diffusers", "peft", "kohya", "kohya_diffusers", "comfyui", "ai_toolkit", "xlabs"
]


class Dialect(NamedTuple):
    """How a dialect spells a layer and the two matrices."""

    prefixes: tuple[str, ...]
    """Before the layer's name; the first is written, all are read."""
    naming: Naming
    """Whose names the layers have."""
    joined: str
    """Between the parts of the layer's name."""
    down: str
    up: str
    alpha: bool
    """An `.alpha` tensor beside every pair; without one the scale is multiplied into B on writing."""


A_B, DOWN_UP = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")
DIALECTS: dict[DialectName, Dialect] = {
    "diffusers": Dialect(
        ("transformer.", "", "diffusion_model."), "diffusers", ".", *A_B, alpha=False
    ),
    "peft": Dialect(
        ("base_model.model.", "base_model.model.transformer."), "diffusers", ".", *A_B, alpha=False
    ),
    "kohya": Dialect(("lora_unet_",), "original", "_", *DOWN_UP, alpha=True),
    "kohya_diffusers": Dialect(("lora_transformer_",), "diffusers", "_", *DOWN_UP, alpha=True),
    "comfyui": Dialect(
        ("diffusion_model.", "", "model.diffusion_model."), "original", ".", *DOWN_UP, alpha=True
    ),
    "ai_toolkit": Dialect(("diffusion_model.",), "original", ".", *A_B, alpha=False),
    "xlabs": Dialect(
        ("", "diffusion_model."), "xlabs", ".", "down.weight", "up.weight", alpha=False
    ),
}

ROLES = {
    "lora_A.weight": "A",
    "lora_A.default.weight": "A",
    "lora_down.weight": "A",
    "lora.down.weight": "A",  # diffusers' older files
    "down.weight": "A",
    "lora_B.weight": "B",
    "lora_B.default.weight": "B",
    "lora_up.weight": "B",
    "lora.up.weight": "B",
    "up.weight": "B",
    "alpha": "alpha",
}
"""How a key ends → which matrix, or which number, it holds."""
TEXT_ENCODERS = re.compile(r"(lora_te\d?_|text_encoder(_\d)?\.|text_encoders\.|bundle_emb\.).*")
"""Keys of text encoders, and OneTrainer's embeddings for them."""
REFUSED = (
    (
        r".*(dora_scale|lora_magnitude_vector(\.default)?(\.weight)?)",
        "DoRA (magnitudes beside the low-rank pair)",
    ),
    (r".*\.lokr_w\d.*", "LoKr (Kronecker products)"),
    (r".*\.hada_w\d.*", "LoHa (Hadamard products)"),
    (r".*\.(oft_blocks|oft_diag|boft.*)", "OFT (rotations)"),
    (
        r".*\.(lora_mid\.weight|lora_B(\.default)?\.bias|lora_up\.bias)",
        "a low-rank pair with a middle factor or a bias",
    ),
    (r".*\.(diff|diff_b|set_weight|w_norm|b_norm)", "a full difference of a weight, bias or norm"),
    (r".*_norm\.scale", "a control LoRA with norms of its own"),
)
"""Other algebras under a LoRA's name: pattern of a key, and what it is."""


def split_role(key: str) -> tuple[str, str] | None:
    """Returns the layer and the role of a key (`ROLES`); None where it ends otherwise."""
    for suffix, role in ROLES.items():
        if key.endswith(f".{suffix}"):
            return key.removesuffix(f".{suffix}"), role
    return None


def spelled(dialect: Dialect, config: BackboneConfig) -> dict[str, tuple[str, Target]]:
    """Returns every layer of a model as a dialect spells it, in all of its prefixes.

    The values are (name without prefix, what it means); none where the model's family has no such
    files.
    """
    return {
        prefix + name.replace(".", dialect.joined): (name, target)
        for prefix in dialect.prefixes
        for name, target in format_of(config).targets(dialect.naming, config).items()
    }


def recognise(
    keys: list[str], config: BackboneConfig, file: str | Path
) -> tuple[DialectName, dict[str, tuple[str, Target]]]:
    """The dialect that knows most of the keys. Raises InputError unless it knows them all."""
    modules = {key: split[0] if (split := split_role(key)) else None for key in keys}
    tables = {name: spelled(dialect, config) for name, dialect in DIALECTS.items()}

    def known(name: DialectName) -> tuple[int, bool]:
        """How many layers a dialect knows, and whether it spells the matrices so, too."""
        layers = sum(module in tables[name] for module in modules.values())
        return layers, any(key.endswith(DIALECTS[name].down) for key in keys)

    best = max(DIALECTS, key=known)
    unused = [key for key, module in modules.items() if module not in tables[best]]
    if unused:
        own = format_of(config)
        for family in FORMATS:
            names = {name for d in DIALECTS.values() for name in spelled(d, family.config())}
            if family is not own and all(module in names for module in modules.values()):
                raise InputError(
                    f"{file}: a LoRA for {family.name}, but this transformer is {own.name}'s"
                )
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
