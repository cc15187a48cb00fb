"""FLUX.2's transformer in its two published layouts: diffusers', and Black Forest Labs' file.

`FLUX2` at the end is what the rest of the system takes.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from squeeze_jax.diffusion.latents import grid_positions, timed_reference_positions
from squeeze_jax.errors import InputError
from squeeze_jax.interop.mapping import Entry, Tensors
from squeeze_jax.interop.transformer_format import TransformerFormat
from squeeze_jax.models.flux2 import Flux2, Flux2Config
from squeeze_jax.models.flux2_autoencoder import Flux2AutoencoderConfig


class Row(NamedTuple):
    """A weight of ours and its names in both layouts, without the last part (`weight`, `scale`)."""

    path: str
    original: str
    diffusers: tuple[str, ...]
    """Several where the single file joins q, k and v."""
    layer: int | None = None
    sizes: tuple[int, ...] = ()
    """Output sizes of diffusers' tensors, where they are several."""


NORMS = ("query_norm", "key_norm")
FINAL_MODULATION = "final_layer.adaLN_modulation.lin"


def rows(config: Flux2Config) -> Iterator[Row]:
    """Every weight. There are no biases."""
    yield Row("img_in", "img_in", ("x_embedder",))
    yield Row("txt_in", "txt_in", ("context_embedder",))
    embedders = {"time_in": "timestep_embedder"}
    if config.guidance:
        embedders["guidance_in"] = "guidance_embedder"
    for ours, theirs in embedders.items():
        for i, layer in enumerate(("in_layer", "out_layer"), 1):
            name = f"{ours}.{layer}"
            yield Row(name, name, (f"time_guidance_embed.{theirs}.linear_{i}",))
    for name in (
        "double_stream_modulation_img",
        "double_stream_modulation_txt",
        "single_stream_modulation",
    ):
        yield Row(f"{name}.lin", f"{name}.lin", (f"{name}.linear",))

    streams = {
        "img": (("to_q", "to_k", "to_v"), "to_out.0", ("norm_q", "norm_k"), "ff"),
        "txt": (
            ("add_q_proj", "add_k_proj", "add_v_proj"),
            "to_add_out",
            ("norm_added_q", "norm_added_k"),
            "ff_context",
        ),
    }
    for i in range(config.num_double_blocks):
        theirs = f"transformer_blocks.{i}"
        for stream, (qkv, out, norms, ff) in streams.items():
            ours, original = f"double_blocks.{stream}", f"double_blocks.{i}.{stream}"
            names = tuple(f"{theirs}.attn.{name}" for name in qkv)
            yield Row(f"{ours}_attn.qkv", f"{original}_attn.qkv", names, i, (config.width,) * 3)
            yield Row(f"{ours}_attn.proj", f"{original}_attn.proj", (f"{theirs}.attn.{out}",), i)
            yield Row(f"{ours}_mlp.in_layer", f"{original}_mlp.0", (f"{theirs}.{ff}.linear_in",), i)
            yield Row(
                f"{ours}_mlp.out_layer", f"{original}_mlp.2", (f"{theirs}.{ff}.linear_out",), i
            )
            for norm, name in zip(NORMS, norms):
                norm = f"_attn.norm.{norm}"
                yield Row(ours + norm, original + norm, (f"{theirs}.attn.{name}",), i)

    layers = {"linear1": "to_qkv_mlp_proj", "linear2": "to_out"}
    layers |= {"norm.query_norm": "norm_q", "norm.key_norm": "norm_k"}
    for i in range(config.num_single_blocks):
        for ours, theirs in layers.items():
            names = (f"single_transformer_blocks.{i}.attn.{theirs}",)
            yield Row(f"single_blocks.{ours}", f"single_blocks.{i}.{ours}", names, i)

    yield Row(FINAL_MODULATION, "final_layer.adaLN_modulation.1", ("norm_out.linear",))
    yield Row("final_layer.linear", "final_layer.linear", ("proj_out",))


def diffusers_entries(config: Flux2Config) -> list[Entry]:
    """The table for diffusers' `Flux2Transformer2DModel` (169 tensors for klein 4B)."""
    table = []
    for row in rows(config):
        names = tuple(f"{name}.weight" for name in row.diffusers)
        if row.path.endswith(NORMS):
            table.append(Entry(names, f"{row.path}.scale", "same", row.layer))
        else:
            # diffusers keeps (scale, shift) where the single file and we keep (shift, scale).
            layout = "swap_halves" if row.path == FINAL_MODULATION else "linear"
            table.append(Entry(names, f"{row.path}.kernel", layout, row.layer, row.sizes))
    return table


def original_entries(config: Flux2Config) -> list[Entry]:
    """The table for Black Forest Labs' own file, whose names have no prefix (149 tensors)."""
    return [
        Entry((f"{row.original}.scale",), f"{row.path}.scale", "same", row.layer)
        if row.path.endswith(NORMS)
        else Entry((f"{row.original}.weight",), f"{row.path}.kernel", "linear", row.layer)
        for row in rows(config)
    ]


FIXED = {"patch_size": 1, "eps": 1e-6, "timestep_guidance_channels": 256}
"""What every published config.json of FLUX.2 says and this model does not vary."""


def config_from_json(values: dict[str, Any]) -> Flux2Config:
    """Our config from diffusers' `config.json` of a Flux2Transformer2DModel.

    Raises KeyError where a size is missing, and InputError where a value is not one of FLUX.2's.
    """
    fixed = {
        **FIXED,
        "_class_name": "Flux2Transformer2DModel",
        "out_channels": values["in_channels"],
    }
    for name, want in fixed.items():
        found = values.get(name)
        if found not in (None, want):
            raise InputError(
                f"config.json has {name} = {found!r}; only {want!r} is supported for FLUX.2"
            )
    return Flux2Config(
        in_channels=values["in_channels"],
        context_width=values["joint_attention_dim"],
        heads=values["num_attention_heads"],
        head_width=values["attention_head_dim"],
        num_double_blocks=values["num_layers"],
        num_single_blocks=values["num_single_layers"],
        mlp_ratio=float(values.get("mlp_ratio", 3.0)),
        rope_axes=tuple(values.get("axes_dims_rope", (32, 32, 32, 32))),
        rope_theta=float(values.get("rope_theta", 2000)),
        guidance=values["guidance_embeds"],
    )


def config_to_json(config: Flux2Config) -> dict[str, Any]:
    """diffusers' `config.json` for our config."""
    return {
        **FIXED,
        "_class_name": "Flux2Transformer2DModel",
        "in_channels": config.in_channels,
        "joint_attention_dim": config.context_width,
        "num_attention_heads": config.heads,
        "attention_head_dim": config.head_width,
        "num_layers": config.num_double_blocks,
        "num_single_layers": config.num_single_blocks,
        "mlp_ratio": config.mlp_ratio,
        "axes_dims_rope": list(config.rope_axes),
        "rope_theta": config.rope_theta,
        "guidance_embeds": config.guidance,
    }


def config_from_shapes(tensors: Tensors) -> Flux2Config:
    """Our config of a file in the original layout, which has no config.json.

    Rotary axes are equal shares of a head and theta is 2,000, as in every published FLUX.2. Raises
    KeyError, ValueError or IndexError where a tensor is missing or of an unexpected rank.
    """
    names = tensors.names()

    def depth(stack: str) -> int:
        return len({name.split(".")[1] for name in names if name.startswith(f"{stack}.")})

    width, in_channels = tensors.shape("img_in.weight")
    head = tensors.shape("double_blocks.0.img_attn.norm.query_norm.scale")[0]
    axis = head // 4
    return Flux2Config(
        in_channels=in_channels,
        context_width=tensors.shape("txt_in.weight")[1],
        heads=width // head,
        head_width=head,
        num_double_blocks=depth("double_blocks"),
        num_single_blocks=depth("single_blocks"),
        mlp_ratio=tensors.shape("double_blocks.0.img_mlp.2.weight")[1] / width,
        rope_axes=(axis, axis, axis, axis),
        guidance=any(name.startswith("guidance_in.") for name in names),
    )


def twin_velocity(
    config: Flux2Config,
    weights: dict[str, np.ndarray],
    inputs: dict[str, np.ndarray],
    target_grid: tuple[int, int],
    reference_grids: tuple[tuple[int, int], ...],
) -> np.ndarray:
    """Computes the velocity with diffusers in PyTorch, in float32.

    `weights` has diffusers' names. `inputs`: target [B, N, c], reference [B, R, c] (all references
    in one), context [B, L, C], t [B], guidance [B].
    """
    import torch
    from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel

    settings = {name: value for name, value in config_to_json(config).items() if name[0] != "_"}
    with torch.device("meta"):
        twin = Flux2Transformer2DModel(**settings)
    state = {name: torch.from_numpy(tensor.astype(np.float32)) for name, tensor in weights.items()}
    twin.load_state_dict(state, strict=True, assign=True)
    # Positions (t, row, column, l): the target at t = 0, text along l.
    x = {name: torch.from_numpy(value) for name, value in inputs.items()}
    target = np.pad(grid_positions(*target_grid), ((0, 0), (1, 1)))
    references = np.pad(timed_reference_positions(reference_grids), ((0, 0), (0, 1)))
    text = np.pad(np.arange(x["context"].shape[1])[:, None], ((0, 0), (3, 0)))
    with torch.no_grad():
        out = twin.eval()(
            hidden_states=torch.cat([x["target"], x["reference"]], 1),
            encoder_hidden_states=x["context"],
            timestep=x["t"],
            guidance=x["guidance"] if config.guidance else None,
            img_ids=torch.from_numpy(np.concatenate([target, references])),
            txt_ids=torch.from_numpy(text),
        ).sample
    return out[:, : x["target"].shape[1]].numpy()


PUBLISHED = {
    "FLUX.2 [klein] 4B": Flux2Config(),
    "FLUX.2 [klein] 9B": Flux2Config(
        context_width=12288, heads=32, num_double_blocks=8, num_single_blocks=24
    ),
    "FLUX.2-dev": Flux2Config(
        context_width=15360, heads=48, num_double_blocks=8, num_single_blocks=48, guidance=True
    ),
}
"""Sizes of dev: the defaults of diffusers 0.42.1's `Flux2Transformer2DModel`."""


FLUX2 = TransformerFormat(
    name="FLUX.2",
    kind="flux2",
    config=Flux2Config,
    autoencoder=Flux2AutoencoderConfig,
    module=Flux2,
    class_name="Flux2Transformer2DModel",
    markers=("double_stream_modulation_img.",),
    config_from_json=config_from_json,
    config_to_json=config_to_json,
    config_from_shapes=config_from_shapes,
    published=PUBLISHED,
    entries={"diffusers": diffusers_entries, "original": original_entries},
    lora_targets={},
    extra_inputs=lambda config: {},
    twin=twin_velocity,
)
