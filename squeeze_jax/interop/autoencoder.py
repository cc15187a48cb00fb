"""The autoencoder's table: diffusers' AutoencoderKL, tensor by tensor, and its `config.json`.

Module names are diffusers' but for two: an up- or downsampler is `conv` of its level, and the
middle's attention is `attention`. Published folders and ours hold the same two files, so that each
side reads the other's.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from squeeze_jax.array_types import DType, Json
from squeeze_jax.interop.mapping import Entry, Layout, export_entries
from squeeze_jax.interop.tensors import write_json, write_tensors
from squeeze_jax.models.autoencoder import Autoencoder, AutoencoderConfig

CONFIG_FILE, WEIGHTS_FILE = "config.json", "diffusion_pytorch_model.safetensors"


def entries(config: AutoencoderConfig) -> list[Entry]:
    """Every tensor of an AutoencoderKL without quant convolutions (244 for FLUX.1's)."""
    widths = config.block_out_channels
    table = [*_coder("encoder", "down", widths, config.layers_per_block)]
    table += _coder("decoder", "up", widths[::-1], config.layers_per_block + 1)
    return table


def original_entries(config: AutoencoderConfig) -> list[Entry]:
    """The table for Black Forest Labs' own file (`ae.safetensors`)."""
    return [
        entry._replace(
            sources=tuple(
                _original(name, len(config.block_out_channels)) for name in entry.sources
            ),
            layout="pointwise" if entry.layout == "linear" else entry.layout,
        )
        for entry in entries(config)
    ]


def _original(name: str, levels: int) -> str:
    """Their name of one of diffusers' tensors. The decoder's levels are counted from the
    picture's end."""
    name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{levels - 1 - int(match[1])}", name)
    for pattern, replacement in (
        (r"down_blocks\.", "down."),
        (r"resnets\.", "block."),
        (r"(down|up)samplers\.0\.", r"\1sample."),
        (r"conv_shortcut", "nin_shortcut"),
        (r"conv_norm_out", "norm_out"),
        (r"mid_block\.block\.0", "mid.block_1"),
        (r"mid_block\.block\.1", "mid.block_2"),
        (r"mid_block\.attentions\.0\.", "mid.attn_1."),
        (r"(attn_1\.)group_norm", r"\1norm"),
        (r"(attn_1\.)to_([qkv])", r"\1\2"),
        (r"(attn_1\.)to_out\.0", r"\1proj_out"),
    ):
        name = re.sub(pattern, replacement, name)
    return name


def config_from_json(values: Json) -> AutoencoderConfig:
    """The config of a diffusers folder; what this model does not do (quant convolutions, other
    blocks) is refused. Raises ValueError with its name."""
    fixed = _fixed(len(values["block_out_channels"]))
    for name, want in fixed.items():
        # diffusers' defaults where a field is absent: quant convolutions on, everything else as
        # here.
        found = values.get(name, True if name.startswith("use_") else want)
        if found != want and name != "_class_name":
            raise ValueError(
                f"the autoencoder's config.json has {name} = {found!r}; only {want!r} is supported"
            )
    if values.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        raise ValueError(f"config.json describes a {values['_class_name']}, not an AutoencoderKL")
    return AutoencoderConfig(
        in_channels=values.get("in_channels", 3),
        latent_channels=values.get("latent_channels", 4),
        block_out_channels=tuple(values["block_out_channels"]),
        layers_per_block=values.get("layers_per_block", 1),
        norm_groups=values.get("norm_num_groups", 32),
        scaling_factor=values.get("scaling_factor", 0.18215),
        shift_factor=values.get("shift_factor") or 0.0,
    )


def config_to_json(config: AutoencoderConfig, sample_size: int = 1024) -> Json:
    """The `config.json` that diffusers reads; `sample_size`, the side of the pictures trained
    on, only informs."""
    return {
        **_fixed(len(config.block_out_channels)),
        "block_out_channels": list(config.block_out_channels),
        "force_upcast": True,
        "in_channels": config.in_channels,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.norm_groups,
        "out_channels": config.in_channels,
        "sample_size": sample_size,
        "scaling_factor": config.scaling_factor,
        "shift_factor": config.shift_factor,
    }


def save_autoencoder(
    autoencoder: Autoencoder,
    directory: Path,
    *,
    dtype: DType | None = None,
    sample_size: int = 1024,
) -> None:
    """Writes `config.json` and the weights as diffusers lays them out; each file is whole or
    absent.

    `dtype` converts the weights (default: as they are).
    """
    tensors = export_entries(autoencoder, entries(autoencoder.config))
    if dtype is not None:
        tensors = {name: tensor.astype(np.dtype(dtype)) for name, tensor in tensors.items()}
    write_tensors(directory / WEIGHTS_FILE, tensors)
    write_json(directory / CONFIG_FILE, config_to_json(autoencoder.config, sample_size))


def _coder(coder: str, direction: str, widths: tuple[int, ...], depth: int) -> list[Entry]:
    table = _conv(f"{coder}.conv_in") + _norm(f"{coder}.conv_norm_out") + _conv(f"{coder}.conv_out")
    for level, width in enumerate(widths):
        ours = f"{coder}.{direction}_blocks.{level}"
        for block in range(depth):
            widened = block == 0 and level > 0 and widths[level - 1] != width
            table += _resnet(f"{ours}.resnets.{block}", shortcut=widened)
        if level < len(widths) - 1:
            table += _conv(f"{ours}.conv", theirs=f"{ours}.{direction}samplers.0.conv")
    middle = f"{coder}.mid_block"
    table += _resnet(f"{middle}.resnets.0", shortcut=False) + _resnet(
        f"{middle}.resnets.1", shortcut=False
    )
    ours, theirs = f"{middle}.attention", f"{middle}.attentions.0"
    table += _norm(f"{ours}.group_norm", theirs=f"{theirs}.group_norm")
    for name, source in (
        ("to_q", "to_q"),
        ("to_k", "to_k"),
        ("to_v", "to_v"),
        ("to_out", "to_out.0"),
    ):
        table += _conv(f"{ours}.{name}", theirs=f"{theirs}.{source}", layout="linear")
    return table


def _resnet(path: str, *, shortcut: bool) -> list[Entry]:
    table = (
        _norm(f"{path}.norm1")
        + _conv(f"{path}.conv1")
        + _norm(f"{path}.norm2")
        + _conv(f"{path}.conv2")
    )
    return table + _conv(f"{path}.conv_shortcut") if shortcut else table


def _conv(ours: str, *, theirs: str | None = None, layout: Layout = "conv") -> list[Entry]:
    theirs = theirs or ours
    return [
        Entry((f"{theirs}.weight",), f"{ours}.kernel", layout),
        Entry((f"{theirs}.bias",), f"{ours}.bias"),
    ]


def _norm(ours: str, *, theirs: str | None = None) -> list[Entry]:
    theirs = theirs or ours
    return [
        Entry((f"{theirs}.weight",), f"{ours}.scale"),
        Entry((f"{theirs}.bias",), f"{ours}.bias"),
    ]


def twin_codes(
    config: AutoencoderConfig,
    weights: dict[str, np.ndarray],
    pictures: np.ndarray,
    latents: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Encodes pictures [B, height, width, 3] and decodes latents [B, h, w, c] with diffusers.

    `weights` has diffusers' names. Returns what `encode` and `decode` of ours must give.
    """
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    twin: Any = AutoencoderKL(
        **{k: v for k, v in config_to_json(config).items() if k[0] != "_"}
    ).eval()
    state = {name: torch.from_numpy(value.astype(np.float32)) for name, value in weights.items()}
    twin.load_state_dict(state, strict=True)
    channels_first = [torch.from_numpy(x.transpose(0, 3, 1, 2).copy()) for x in (pictures, latents)]
    with torch.no_grad():
        mean = twin.encode(channels_first[0]).latent_dist.mean
        raw = channels_first[1] / config.scaling_factor + config.shift_factor
        codes = (mean - config.shift_factor) * config.scaling_factor, twin.decode(raw).sample
    encoded, decoded = (code.numpy().transpose(0, 2, 3, 1) for code in codes)
    return encoded, decoded


def _fixed(levels: int) -> Json:
    """What FLUX.1's file says and this model does not vary."""
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "mid_block_add_attention": True,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    }
