"""FLUX.1's transformer in its two published layouts: diffusers', and Black Forest Labs' single
file.

`FLUX1` at the end is what the rest of the system takes.
"""

from typing import Any

import numpy as np

from squeeze_jax.diffusion.latents import grid_positions, reference_origins
from squeeze_jax.interop.mapping import Entry, Layout, Tensors
from squeeze_jax.interop.transformer_format import Target, TransformerFormat
from squeeze_jax.models.autoencoder import AutoencoderConfig
from squeeze_jax.models.dit import DiT, DiTConfig


def diffusers_entries(config: DiTConfig) -> list[Entry]:
    """The table for diffusers' `FluxTransformer2DModel`."""
    width, table = config.width, []

    def linear(
        path: str, *names: str, layer: int | None = None, sizes: tuple[int, ...] = ()
    ) -> None:
        table.append(
            Entry(tuple(f"{n}.weight" for n in names), f"{path}.kernel", "linear", layer, sizes)
        )
        table.append(Entry(tuple(f"{n}.bias" for n in names), f"{path}.bias", "same", layer, sizes))

    linear("img_in", "x_embedder")
    linear("txt_in", "context_embedder")
    embedders = {"time_in": "timestep_embedder", "vector_in": "text_embedder"}
    if config.guidance:
        embedders["guidance_in"] = "guidance_embedder"
    for ours, theirs in embedders.items():
        linear(f"{ours}.in_layer", f"time_text_embed.{theirs}.linear_1")
        linear(f"{ours}.out_layer", f"time_text_embed.{theirs}.linear_2")

    for i in range(config.num_double_blocks):
        block = f"transformer_blocks.{i}"
        streams = {
            "img": ("norm1", ("to_q", "to_k", "to_v"), "to_out.0", "norm_q", "norm_k", "ff"),
            "txt": (
                "norm1_context",
                ("add_q_proj", "add_k_proj", "add_v_proj"),
                "to_add_out",
                "norm_added_q",
                "norm_added_k",
                "ff_context",
            ),
        }
        for stream, (mod, qkv, out, norm_q, norm_k, ff) in streams.items():
            ours = f"double_blocks.{stream}"
            linear(f"{ours}_mod.lin", f"{block}.{mod}.linear", layer=i)
            linear(
                f"{ours}_attn.qkv", *(f"{block}.attn.{n}" for n in qkv), layer=i, sizes=(width,) * 3
            )
            linear(f"{ours}_attn.proj", f"{block}.attn.{out}", layer=i)
            linear(f"{ours}_mlp.in_layer", f"{block}.{ff}.net.0.proj", layer=i)
            linear(f"{ours}_mlp.out_layer", f"{block}.{ff}.net.2", layer=i)
            for norm, name in (("query_norm", norm_q), ("key_norm", norm_k)):
                table.append(
                    Entry(
                        (f"{block}.attn.{name}.weight",), f"{ours}_attn.norm.{norm}.scale", layer=i
                    )
                )

    for i in range(config.num_single_blocks):
        block = f"single_transformer_blocks.{i}"
        parts = (*(f"{block}.attn.{n}" for n in ("to_q", "to_k", "to_v")), f"{block}.proj_mlp")
        linear("single_blocks.modulation.lin", f"{block}.norm.linear", layer=i)
        linear(
            "single_blocks.linear1",
            *parts,
            layer=i,
            sizes=(width, width, width, config.mlp_ratio * width),
        )
        linear("single_blocks.linear2", f"{block}.proj_out", layer=i)
        for norm, name in (("query_norm", "norm_q"), ("key_norm", "norm_k")):
            table.append(
                Entry((f"{block}.attn.{name}.weight",), f"single_blocks.norm.{norm}.scale", layer=i)
            )

    # diffusers keeps (scale, shift) where FLUX.1 keeps (shift, scale).
    for leaf, ours in (("weight", "kernel"), ("bias", "bias")):
        table.append(
            Entry(
                (f"norm_out.linear.{leaf}",),
                f"final_layer.adaLN_modulation.lin.{ours}",
                "swap_halves",
            )
        )
    linear("final_layer.linear", "proj_out")
    return table


def original_entries(config: DiTConfig) -> list[Entry]:
    """The table for Black Forest Labs' own file; names are ours but for the spelling of lists."""
    table = []

    def leaf(name: str, path: str, layout: Layout = "same", layer: int | None = None) -> None:
        table.append(Entry((name,), path, layout, layer))

    def linear(name: str, path: str, layer: int | None = None) -> None:
        leaf(f"{name}.weight", f"{path}.kernel", "linear", layer)
        leaf(f"{name}.bias", f"{path}.bias", "same", layer)

    linear("img_in", "img_in")
    linear("txt_in", "txt_in")
    for embedder in ("time_in", "vector_in", *(["guidance_in"] if config.guidance else [])):
        for layer in ("in_layer", "out_layer"):
            linear(f"{embedder}.{layer}", f"{embedder}.{layer}")
    for i in range(config.num_double_blocks):
        for stream in ("img", "txt"):
            theirs, ours = f"double_blocks.{i}.{stream}", f"double_blocks.{stream}"
            linear(f"{theirs}_mod.lin", f"{ours}_mod.lin", i)
            linear(f"{theirs}_attn.qkv", f"{ours}_attn.qkv", i)
            linear(f"{theirs}_attn.proj", f"{ours}_attn.proj", i)
            linear(f"{theirs}_mlp.0", f"{ours}_mlp.in_layer", i)
            linear(f"{theirs}_mlp.2", f"{ours}_mlp.out_layer", i)
            for norm in ("query_norm", "key_norm"):
                leaf(f"{theirs}_attn.norm.{norm}.scale", f"{ours}_attn.norm.{norm}.scale", layer=i)
    for i in range(config.num_single_blocks):
        theirs = f"single_blocks.{i}"
        linear(f"{theirs}.modulation.lin", "single_blocks.modulation.lin", i)
        for name in ("linear1", "linear2"):
            linear(f"{theirs}.{name}", f"single_blocks.{name}", i)
        for norm in ("query_norm", "key_norm"):
            leaf(f"{theirs}.norm.{norm}.scale", f"single_blocks.norm.{norm}.scale", layer=i)
    linear("final_layer.adaLN_modulation.1", "final_layer.adaLN_modulation.lin")
    linear("final_layer.linear", "final_layer.linear")
    return table


def config_from_json(values: dict[str, Any]) -> DiTConfig:
    """Our config from diffusers' `config.json` of a FluxTransformer2DModel."""
    return DiTConfig(
        in_channels=values["in_channels"],
        context_width=values["joint_attention_dim"],
        pooled_width=values["pooled_projection_dim"],
        heads=values["num_attention_heads"],
        head_width=values["attention_head_dim"],
        num_double_blocks=values["num_layers"],
        num_single_blocks=values["num_single_layers"],
        rope_axes=tuple(values.get("axes_dims_rope", (16, 56, 56))),
        guidance=values["guidance_embeds"],
    )


def config_to_json(config: DiTConfig) -> dict[str, Any]:
    """diffusers' `config.json` for our config."""
    return {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": config.in_channels,
        "joint_attention_dim": config.context_width,
        "pooled_projection_dim": config.pooled_width,
        "num_attention_heads": config.heads,
        "attention_head_dim": config.head_width,
        "num_layers": config.num_double_blocks,
        "num_single_layers": config.num_single_blocks,
        "axes_dims_rope": list(config.rope_axes),
        "guidance_embeds": config.guidance,
    }


def config_from_shapes(tensors: Tensors) -> DiTConfig:
    """Our config of a file in the original layout, which has no config.json.

    Rotary axes are FLUX.1's shares of a head.
    """
    names = tensors.names()

    def depth(stack: str) -> int:
        return len({name.split(".")[1] for name in names if name.startswith(f"{stack}.")})

    width, in_channels = tensors.shape("img_in.weight")
    head = tensors.shape("double_blocks.0.img_attn.norm.query_norm.scale")[0]
    default = DiTConfig()
    unused, rows, columns = (axis * head // default.head_width for axis in default.rope_axes)
    return DiTConfig(
        in_channels=in_channels,
        context_width=tensors.shape("txt_in.weight")[1],
        pooled_width=tensors.shape("vector_in.in_layer.weight")[1],
        heads=width // head,
        head_width=head,
        num_double_blocks=depth("double_blocks"),
        num_single_blocks=depth("single_blocks"),
        rope_axes=(unused, rows, columns),
        guidance=any(name.startswith("guidance_in.") for name in names),
    )


def xlabs_targets(config: DiTConfig) -> dict[str, Target]:
    """Returns the layers that XLabs' LoRA files adapt: attention alone.

    Stream 1 is the image's, 2 the text's; a single block's qkv leaves the feed-forward's rows out.
    """
    found = {}
    for i in range(config.num_double_blocks):
        for number, stream in ((1, "img"), (2, "txt")):
            for name in ("qkv", "proj"):
                path = f"double_blocks.{stream}_attn.{name}"
                found[f"double_blocks.{i}.processor.{name}_lora{number}"] = Target(path, i, 0, -1)
    for i in range(config.num_single_blocks):
        block, rows = f"single_blocks.{i}.processor", 3 * config.width
        found[f"{block}.qkv_lora"] = Target("single_blocks.linear1", i, 0, rows)
        found[f"{block}.proj_lora"] = Target("single_blocks.linear2", i, 0, -1)
    return found


def twin_velocity(
    config: DiTConfig,
    weights: dict[str, np.ndarray],
    inputs: dict[str, np.ndarray],
    target_grid: tuple[int, int],
    reference_grids: tuple[tuple[int, int], ...],
) -> np.ndarray:
    """Computes the velocity with diffusers in PyTorch, in float32.

    `weights` has diffusers' names. `inputs`: target [B, N, c], reference [B, R, c] (all references
    in one), context [B, L, C], pooled [B, P], t [B], guidance [B].
    """
    import torch
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    settings = {name: value for name, value in config_to_json(config).items() if name[0] != "_"}
    with torch.device("meta"):
        twin = FluxTransformer2DModel(**settings)
    state = {name: torch.from_numpy(tensor.astype(np.float32)) for name, tensor in weights.items()}
    twin.load_state_dict(state, strict=True, assign=True)
    twin.pos_embed = type(twin.pos_embed)(theta=10000, axes_dim=list(config.rope_axes))
    origins = reference_origins(target_grid, reference_grids)
    positions = [grid_positions(*target_grid)]
    positions += [grid_positions(*g, origin=o) for g, o in zip(reference_grids, origins)]
    ids = np.pad(np.concatenate(positions), ((0, 0), (1, 0))).astype(np.float32)
    x = {name: torch.from_numpy(value) for name, value in inputs.items()}
    with torch.no_grad():
        out = twin.eval()(
            hidden_states=torch.cat([x["target"], x["reference"]], 1),
            encoder_hidden_states=x["context"],
            pooled_projections=x["pooled"],
            timestep=x["t"],
            guidance=x["guidance"] if config.guidance else None,
            img_ids=torch.from_numpy(ids),
            txt_ids=torch.zeros(x["context"].shape[1], 3),
        ).sample
    return out[:, : x["target"].shape[1]].numpy()


FLUX1 = TransformerFormat(
    name="FLUX.1",
    kind="flux",
    config=DiTConfig,
    autoencoder=AutoencoderConfig,
    module=DiT,
    class_name="FluxTransformer2DModel",
    markers=("vector_in.", "time_text_embed.text_embedder."),
    config_from_json=config_from_json,
    config_to_json=config_to_json,
    config_from_shapes=config_from_shapes,
    published={"FLUX.1-dev": DiTConfig(), "FLUX.1-schnell": DiTConfig(guidance=False)},
    entries={"diffusers": diffusers_entries, "original": original_entries},
    lora_targets={"xlabs": xlabs_targets},
    extra_inputs=lambda config: {"pooled": config.pooled_width},
    twin=twin_velocity,
)
