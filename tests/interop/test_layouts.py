"""The other layouts of published files: single files with and without prefixes, InternVL's original names."""

import dataclasses
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file
from small_dit import CONFIG, random_dit
from small_internvl import INTERNVL, ORIGINAL_CONFIG, random_internvl, randomly

from squeeze_jax.errors import InputError
from squeeze_jax.interop import autoencoder as autoencoder_format
from squeeze_jax.interop import internvl as internvl_format
from squeeze_jax.interop import load_autoencoder, load_dit, load_internvl
from squeeze_jax.interop.flux import (
    config_from_shapes,
    config_to_json,
    diffusers_entries,
    original_entries,
)
from squeeze_jax.interop.load import (
    WEIGHTS,
    autoencoder_source,
    dit_source,
    internvl_source,
    save_dit,
)
from squeeze_jax.interop.mapping import export_entries, load_entries, parameters_by_path
from squeeze_jax.interop.tensors import write_tensors
from squeeze_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from squeeze_jax.models.dit import DiT, DiTConfig
from squeeze_jax.models.internvl import InternVL

DIT = dataclasses.replace(CONFIG, heads=2, head_width=32, rope_axes=(4, 14, 14))
SMALL = AutoencoderConfig(block_out_channels=(8, 16, 16, 24), norm_groups=4)


def same(ours, theirs):
    one, two = parameters_by_path(ours), parameters_by_path(theirs)
    assert one.keys() == two.keys()
    for path in one:
        np.testing.assert_array_equal(one[path][...], two[path][...], err_msg=path)


# --- FLUX.1's transformer in one file --------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("guidance", [True, False])
def test_one_file_loads_by_its_shapes_with_and_without_a_prefix(tmp_path, prefix, guidance):
    config = dataclasses.replace(CONFIG, heads=2, head_width=32, rope_axes=(4, 14, 14), guidance=guidance)
    dit = random_dit(config)
    tensors = {prefix + name: tensor for name, tensor in export_entries(dit, original_entries(config)).items()}
    if prefix:  # a whole system: what else is in it is not ours
        tensors |= {"vae.encoder.conv_in.weight": np.ones(1), "text_encoders.t5xxl.x": np.ones(1)}
    save_file(tensors, tmp_path / "flux1.safetensors")
    for where in (tmp_path / "flux1.safetensors", tmp_path):
        loaded = load_dit(where, jnp.float32)
        assert loaded.config == config
        same(loaded, dit)


def test_the_real_sizes_are_read_off_the_shapes():
    parameters = parameters_by_path(nnx.eval_shape(lambda: DiT(DiTConfig(), rngs=nnx.Rngs(0))))
    shapes = {}
    for entry in original_entries(DiTConfig()):
        shape = parameters[entry.path].shape[entry.layer is not None :]
        shapes[entry.sources[0]] = shape[::-1]

    class Shapes:
        def names(self):
            return list(shapes)

        def shape(self, name):
            return shapes[name]

        def dtype(self, name):
            raise NotImplementedError

        def read(self, name, index=()):
            raise NotImplementedError

    assert config_from_shapes(Shapes()) == DiTConfig()


def test_a_file_of_something_else_is_refused(tmp_path):
    save_file({"double_blocks.0.x": np.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"no FLUX\.1 transformer in it"):
        load_dit(tmp_path / "x.safetensors")
    save_file({"x_embedder.weight": np.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="give the folder that has both"):
        load_dit(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("text", "message"), [('{"in_channels": 64}', "has no field 'joint_attention_dim'"), ("[]", "must hold")]
)
def test_a_config_that_cannot_be_used_is_named(tmp_path, text, message):
    save_file(export_entries(random_dit(), original_entries(CONFIG)), tmp_path / "x.safetensors")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=message):
        load_dit(tmp_path)


# --- the autoencoder in one file -------------------------------------------------------------------------------------


def their_autoencoder_converter(tensors):
    """diffusers' own converter from the original names."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: parity tests are skipped")
    module = pytest.importorskip("diffusers.loaders.single_file_utils")
    converted = module.convert_ldm_vae_checkpoint(
        {name: torch.tensor(tensor) for name, tensor in tensors.items()}, autoencoder_format.config_to_json(SMALL)
    )
    return {name: tensor.numpy() for name, tensor in converted.items()}


def test_the_original_autoencoder_is_what_diffusers_makes_of_it():
    autoencoder = randomly(lambda: Autoencoder(SMALL, rngs=nnx.Rngs(0)))
    original = export_entries(autoencoder, autoencoder_format.original_entries(SMALL))
    wanted = export_entries(autoencoder, autoencoder_format.entries(SMALL))
    converted = their_autoencoder_converter(original)
    assert converted.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(converted[name], wanted[name], err_msg=name)


@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model."])
def test_the_autoencoder_loads_from_one_file(tmp_path, prefix):
    autoencoder = randomly(lambda: Autoencoder(SMALL, rngs=nnx.Rngs(0)))
    original = export_entries(autoencoder, autoencoder_format.original_entries(SMALL))
    save_file({prefix + name: tensor for name, tensor in original.items()}, tmp_path / "ae.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(autoencoder_format.config_to_json(SMALL)))
    same(load_autoencoder(tmp_path), autoencoder)
    with pytest.raises(InputError, match="does not fit the model"):  # alone, it is taken for FLUX.1's
        load_autoencoder(tmp_path / "ae.safetensors")


# --- InternVL's original names ---------------------------------------------------------------------------------------


def by_hand(tensors):
    """`-hf` tensors under the original names: q, k and v of the vision tower fused."""
    out = {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(r"vision_tower\.encoder\.layer\.(\d+)\.attention\.([qkv])_proj\.(weight|bias)", name):
            layer, which, leaf = match.groups()
            if which == "q":
                parts = [tensors[name.replace("q_proj", f"{other}_proj")] for other in "qkv"]
                out[f"vision_model.encoder.layers.{layer}.attn.qkv.{leaf}"] = np.concatenate(parts)
            continue
        for theirs, original in {
            "vision_tower.embeddings.cls_token": "vision_model.embeddings.class_embedding",
            "vision_tower.embeddings.position_embeddings": "vision_model.embeddings.position_embedding",
            "vision_tower.embeddings.patch_embeddings.projection": "vision_model.embeddings.patch_embedding",
            "vision_tower.encoder.layer": "vision_model.encoder.layers",
            "attention.projection_layer": "attn.proj",
            "layernorm_before": "norm1", "layernorm_after": "norm2", "lambda_1": "ls1", "lambda_2": "ls2",
            "multi_modal_projector.layer_norm": "mlp1.0",
            "multi_modal_projector.linear_1": "mlp1.1",
            "multi_modal_projector.linear_2": "mlp1.3",
        }.items():  # fmt: skip
            name = name.replace(theirs, original)
        out[name] = tensor
    return out


def test_the_original_internvl_loads(tmp_path):
    mllm = random_internvl()
    original = by_hand(export_entries(mllm, internvl_format.entries(INTERNVL)))
    save_file(original, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(ORIGINAL_CONFIG))
    loaded = load_internvl(tmp_path, jnp.float32)
    assert loaded.config == dataclasses.replace(INTERNVL, image_token_id=151667)  # their config does not say
    same(loaded, mllm)
    again = export_entries(loaded, internvl_format.original_entries(loaded.config))
    assert again.keys() == original.keys()
    for name in original:
        np.testing.assert_array_equal(again[name], original[name], err_msg=name)


def test_another_pixel_shuffle_is_refused(tmp_path):
    save_file({"x": np.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**ORIGINAL_CONFIG, "ps_version": "v1"}))
    with pytest.raises(InputError, match="ps_version is 'v1'"):
        load_internvl(tmp_path)


def test_internvl_is_read_from_a_folder(tmp_path):
    save_file({"x": np.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="InternVL is read from its folder"):
        load_internvl(tmp_path / "model.safetensors")


def test_diffusers_names_in_a_single_file_need_their_folder(tmp_path):
    save_dit(tmp_path, random_dit(), jnp.float32)
    load_dit(tmp_path / WEIGHTS, jnp.float32)  # its folder's config.json is beside it
    (tmp_path / WEIGHTS).rename(tmp_path / "mine.safetensors")
    with pytest.raises(InputError, match="give the folder that has both"):
        load_dit(tmp_path / "mine.safetensors")


def test_a_fused_tensor_of_another_size_is_named(tmp_path):
    mllm = random_internvl()
    original = by_hand(export_entries(mllm, internvl_format.entries(INTERNVL)))
    original["vision_model.encoder.layers.1.attn.qkv.weight"] = np.ones((71, 24), np.float32)
    save_file(original, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(ORIGINAL_CONFIG))
    with pytest.raises(InputError, match=r"layers\.1\.attn\.qkv\.weight gives"):
        load_internvl(tmp_path, jnp.float32)


# --- in and out again --------------------------------------------------------------------------------------------------

FORMATS = {
    "flux-diffusers": (dit_source, DiT, DIT, diffusers_entries, config_to_json),
    "flux-original": (dit_source, DiT, DIT, original_entries, None),
    "autoencoder-diffusers": (
        autoencoder_source, Autoencoder, SMALL, autoencoder_format.entries, autoencoder_format.config_to_json,
    ),
    "autoencoder-original": (
        autoencoder_source, Autoencoder, SMALL, autoencoder_format.original_entries, autoencoder_format.config_to_json,
    ),
    "internvl-hf": (
        internvl_source, InternVL, INTERNVL, internvl_format.entries, internvl_format.config_to_json,
    ),
    "internvl-original": (
        internvl_source, InternVL, dataclasses.replace(INTERNVL, image_token_id=151667),
        internvl_format.original_entries, lambda config: ORIGINAL_CONFIG,
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", FORMATS)
def test_import_and_export_give_the_file_back_byte_for_byte(tmp_path, layout, dtype):
    """The file is written with safetensors' own PyTorch writer, from names and shapes of the table."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: parity tests are skipped")
    from safetensors.torch import save_file as save_torch

    source_of, make, config, entries, to_json = FORMATS[layout]
    module = randomly(lambda: make(config, rngs=nnx.Rngs(0)))
    tensors = {name: torch.tensor(value) for name, value in export_entries(module, entries(config)).items()}
    file = tmp_path / "in" / "model.safetensors"
    file.parent.mkdir()
    save_torch({n: t.to(getattr(torch, dtype)) for n, t in tensors.items()}, file, metadata={"format": "pt"})
    if to_json is not None:
        (file.parent / "config.json").write_text(json.dumps(to_json(config)))
    source = source_of(file.parent)
    assert source.entries is entries
    assert source.config == config
    fresh = nnx.eval_shape(lambda: make(config, param_dtype=jnp.dtype(dtype), rngs=nnx.Rngs(1)))
    load_entries(fresh, source.entries(source.config), source.tensors)
    write_tensors(tmp_path / "out.safetensors", export_entries(fresh, source.entries(source.config)))
    assert (tmp_path / "out.safetensors").read_bytes() == file.read_bytes()
