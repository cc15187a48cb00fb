"""FLUX.2's autoencoder in its two published layouts, and diffusers' `config.json` of it.

The encoder and the decoder are FLUX.1's but for a convolution each, so that their rows are those of
`interop/autoencoder.py`.
"""

from pathlib import Path
from typing import Any

import numpy as np

from squeeze_jax.array_types import Json
from squeeze_jax.errors import InputError
from squeeze_jax.interop import autoencoder as flux1
from squeeze_jax.interop.mapping import Entry, Renamed, Tensors, export_entries
from squeeze_jax.interop.tensors import write_json, write_tensors
from squeeze_jax.models.flux2_autoencoder import Flux2Autoencoder, Flux2AutoencoderConfig

BATCHES = "bn.num_batches_tracked"
"""diffusers' count of training batches, an integer that changes nothing: left out, written as 0."""
STATISTICS = [Entry((f"bn.{name}",), f"bn.{name}") for name in ("running_mean", "running_var")]


def entries(config: Flux2AutoencoderConfig) -> list[Entry]:
    """The table for diffusers' `AutoencoderKLFlux2`, without `BATCHES` (250 tensors of 251)."""
    table = _half("encoder", flux1.entries(config.encoder)) + _half(
        "decoder", flux1.entries(config.decoder)
    )
    return table + _quantisation("", "") + STATISTICS


def original_entries(config: Flux2AutoencoderConfig) -> list[Entry]:
    """The table for Black Forest Labs' own file, whose coders hold the 1x1 convolutions as ours."""
    table = _half("encoder", flux1.original_entries(config.encoder))
    table += _half("decoder", flux1.original_entries(config.decoder))
    return table + _quantisation("encoder.", "decoder.") + STATISTICS


def without_batches(tensors: Tensors) -> Tensors:
    """A checkpoint of either layout without `BATCHES`, for `load_entries`."""
    return Renamed(tensors, {name: name for name in tensors.names() if name != BATCHES})


def export_autoencoder(autoencoder: Flux2Autoencoder) -> dict[str, np.ndarray]:
    """Every tensor that diffusers' model has, in PyTorch's layouts (convolutions [out, in, h, w]),
    `BATCHES` with them."""
    tensors = export_entries(autoencoder, entries(autoencoder.config))
    return {**tensors, BATCHES: np.zeros((), np.int64)}


def save_autoencoder(autoencoder: Flux2Autoencoder, directory: Path) -> None:
    """Writes `config.json` and the weights as diffusers lays them out."""
    write_tensors(directory / flux1.WEIGHTS_FILE, export_autoencoder(autoencoder))
    write_json(directory / flux1.CONFIG_FILE, config_to_json(autoencoder.config))


def config_from_json(values: Json) -> Flux2AutoencoderConfig:
    """The config of a diffusers folder.

    Raises KeyError where a size is missing, and InputError for what this model does not do (no
    convolutions at the latents, other blocks, other patches).
    """
    fixed = _fixed(len(values["block_out_channels"]))
    for name, want in {**fixed, "out_channels": values.get("in_channels", 3)}.items():
        found = values.get(name, want)
        if (list(found) if isinstance(found, tuple) else found) != want:
            raise InputError(
                f"the autoencoder's config.json has {name} = {found!r}; only {want!r} is supported"
            )
    small_decoder = values.get("decoder_block_out_channels")
    return Flux2AutoencoderConfig(
        in_channels=values.get("in_channels", 3),
        latent_channels=values["latent_channels"],
        block_out_channels=tuple(values["block_out_channels"]),
        decoder_block_out_channels=None if small_decoder is None else tuple(small_decoder),
        layers_per_block=values["layers_per_block"],
        norm_groups=values.get("norm_num_groups", 32),
        batch_norm_eps=values.get("batch_norm_eps", 1e-4),
    )


def config_to_json(config: Flux2AutoencoderConfig, sample_size: int = 1024) -> Json:
    """The `config.json` that diffusers reads; `sample_size` is the side of its tiles in pixels."""
    small_decoder = config.decoder_block_out_channels
    return {
        **_fixed(len(config.block_out_channels)),
        "batch_norm_eps": config.batch_norm_eps,
        "batch_norm_momentum": 0.1,
        "block_out_channels": list(config.block_out_channels),
        "decoder_block_out_channels": None if small_decoder is None else list(small_decoder),
        "in_channels": config.in_channels,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.norm_groups,
        "out_channels": config.in_channels,
        "sample_size": sample_size,
    }


def twin_codes(
    config: Flux2AutoencoderConfig,
    weights: dict[str, np.ndarray],
    pictures: np.ndarray,
    latents: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Encodes pictures [B, height, width, 3] and decodes latents [B, h, w, 4c] with diffusers.

    `weights` has diffusers' names. Returns what `encode` and `decode` of ours must give.
    """
    import torch
    from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
    from torch.nn.functional import pixel_shuffle, pixel_unshuffle

    settings = {name: value for name, value in config_to_json(config).items() if name[0] != "_"}
    twin: Any = AutoencoderKLFlux2(**settings).eval()
    state = {name: torch.from_numpy(value.astype(np.float32)) for name, value in weights.items()}
    twin.load_state_dict({BATCHES: torch.zeros((), dtype=torch.long), **state}, strict=True)
    channels_first = [torch.from_numpy(x.transpose(0, 3, 1, 2).copy()) for x in (pictures, latents)]
    mean, variance = (x.view(1, -1, 1, 1) for x in (twin.bn.running_mean, twin.bn.running_var))
    deviation = torch.sqrt(variance + config.batch_norm_eps)
    with torch.no_grad():
        packed = pixel_unshuffle(twin.encode(channels_first[0]).latent_dist.mode(), 2)
        raw = pixel_shuffle(channels_first[1] * deviation + mean, 2)
        codes = (packed - mean) / deviation, twin.decode(raw).sample
    encoded, decoded = (code.numpy().transpose(0, 2, 3, 1) for code in codes)
    return encoded, decoded


def _half(coder: str, table: list[Entry]) -> list[Entry]:
    """The rows of one coder: the two may have other widths."""
    return [entry for entry in table if entry.path.startswith(f"{coder}.")]


def _quantisation(encoder: str, decoder: str) -> list[Entry]:
    """The rows of the 1x1 convolutions, whose names start so in the file."""
    table = []
    for ours, theirs in (
        ("encoder.quant_conv", f"{encoder}quant_conv"),
        ("decoder.post_quant_conv", f"{decoder}post_quant_conv"),
    ):
        table.append(Entry((f"{theirs}.weight",), f"{ours}.kernel", "conv"))
        table.append(Entry((f"{theirs}.bias",), f"{ours}.bias"))
    return table


def _fixed(levels: int) -> Json:
    """What FLUX.2's file says and this model does not vary."""
    return {
        "_class_name": "AutoencoderKLFlux2",
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "mid_block_add_attention": True,
        "patch_size": [2, 2],
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_post_quant_conv": True,
        "use_quant_conv": True,
    }
