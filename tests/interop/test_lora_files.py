"""LoRA files are read: every dialect's delta lands in exactly the right rows, and what is no LoRA is
refused by name."""

import json
import math

import numpy as np
import pytest
from lora_pairs import DOWN, UP, WIDTH, A, B, deltas, pair, write
from safetensors.numpy import load_file
from small_dit import random_dit

from squeeze_jax.errors import InputError
from squeeze_jax.interop.lora import load_lora
from squeeze_jax.layers.lora import linears

W, MLP = WIDTH, 4 * WIDTH
ROLES = {"diffusers": (A, B), "peft": (A, B), "xlabs": ("down.weight", "up.weight")}  # others: DOWN, UP
# dialect, what stands before the layer's name or the whole key, the layer in the checkpoint, (in, out)
BY_HAND = [
    ("diffusers", "transformer.", "transformer_blocks.1.attn.to_k", (W, W)),
    ("diffusers", "", "transformer_blocks.0.attn.add_v_proj", (W, W)),
    ("diffusers", "transformer.", "transformer_blocks.0.attn.to_out.0", (W, W)),
    ("diffusers", "transformer.", "transformer_blocks.1.ff.net.0.proj", (W, MLP)),
    ("diffusers", "transformer.", "single_transformer_blocks.2.proj_mlp", (W, MLP)),
    ("diffusers", "transformer.", "single_transformer_blocks.2.proj_out", (W + MLP, W)),
    ("diffusers", "transformer.", "single_transformer_blocks.0.norm.linear", (W, 3 * W)),
    ("diffusers", "transformer.", "proj_out", (W, 64)),
    ("diffusers", "transformer.", "norm_out.linear", (W, 2 * W)),
    ("diffusers", "transformer.", "x_embedder", (64, W)),
    ("diffusers", "transformer.", "time_text_embed.guidance_embedder.linear_2", (W, W)),
    ("peft", "base_model.model.", "transformer_blocks.1.norm1_context.linear", (W, 6 * W)),
    ("kohya", "lora_unet_double_blocks_1_img_attn_qkv", "double_blocks.1.img_attn.qkv", (W, 3 * W)),
    ("kohya", "lora_unet_double_blocks_0_txt_mlp_2", "double_blocks.0.txt_mlp.2", (MLP, W)),
    ("kohya", "lora_unet_double_blocks_0_img_mod_lin", "double_blocks.0.img_mod.lin", (W, 6 * W)),
    ("kohya", "lora_unet_single_blocks_2_linear1", "single_blocks.2.linear1", (W, 3 * W + MLP)),
    ("kohya", "lora_unet_single_blocks_1_modulation_lin", "single_blocks.1.modulation.lin", (W, 3 * W)),
    ("kohya", "lora_unet_final_layer_adaLN_modulation_1", "final_layer.adaLN_modulation.1", (W, 2 * W)),
    ("kohya", "lora_unet_time_in_in_layer", "time_in.in_layer", (256, W)),
    ("kohya", "lora_unet_txt_in", "txt_in", (40, W)),
    (
        "kohya_diffusers",
        "lora_transformer_single_transformer_blocks_1_attn_to_v",
        "single_transformer_blocks.1.attn.to_v",
        (W, W),
    ),
    ("comfyui", "diffusion_model.", "double_blocks.1.txt_attn.proj", (W, W)),
    ("comfyui", "diffusion_model.", "single_blocks.0.linear2", (W + MLP, W)),
    ("xlabs", "double_blocks.1.processor.qkv_lora1", "double_blocks.1.img_attn.qkv", (W, 3 * W)),
    ("xlabs", "double_blocks.0.processor.proj_lora2", "double_blocks.0.txt_attn.proj", (W, W)),
    ("xlabs", "single_blocks.2.processor.proj_lora", "single_blocks.2.linear2", (W + MLP, W)),
]


@pytest.mark.parametrize(("dialect", "key", "name", "sizes"), BY_HAND, ids=[row[2] for row in BY_HAND])
def test_a_pair_lands_in_its_layer_and_nowhere_else(tmp_path, dialect, key, name, sizes):
    key = key + name if key == "" or key.endswith(".") else key
    down, up = ROLES.get(dialect, (DOWN, UP))
    a, b = pair(np.random.default_rng(0), 4, *sizes)
    tensors, scale = {f"{key}.{down}": a, f"{key}.{up}": b}, 1.0
    if dialect not in ROLES:
        tensors[f"{key}.alpha"], scale = np.float32(1.0), 0.25
    dit = random_dit()
    report = load_lora(dit, write(tmp_path / "lora.safetensors", tensors))
    assert (report.dialect, report.modules) == (dialect, 1)
    found = deltas(dit, "diffusers" if dialect in ("diffusers", "peft", "kohya_diffusers") else "original")
    assert list(found) == [f"{name}.weight"]
    np.testing.assert_allclose(found[f"{name}.weight"], scale * b @ a, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("key", "roles", "dialect"),
    [
        ("base_model.model.x_embedder", ("lora_A.default.weight", "lora_B.default.weight"), "peft"),
        ("diffusion_model.img_in", (A, B), "ai_toolkit"),
        ("img_in", (A, B), "comfyui"),
        ("diffusion_model.x_embedder", (A, B), "diffusers"),
        ("transformer.x_embedder", ("lora.down.weight", "lora.up.weight"), "diffusers"),
        ("x_embedder", ("lora.down.weight", "lora.up.weight"), "diffusers"),
    ],
)
def test_other_spellings_of_the_same(tmp_path, key, roles, dialect):
    a, b = pair(np.random.default_rng(0), 2, 64, W)
    dit = random_dit()
    report = load_lora(dit, write(tmp_path / "l.safetensors", {f"{key}.{roles[0]}": a, f"{key}.{roles[1]}": b}))
    assert report.dialect == dialect
    np.testing.assert_allclose(deltas(dit)["x_embedder.weight"], b @ a, rtol=1e-4, atol=1e-4)


def test_qkv_of_a_single_block_in_xlabs_files_leaves_the_feed_forward_alone(tmp_path):
    a, b = pair(np.random.default_rng(0), 2, W, 3 * W)
    key = "single_blocks.1.processor.qkv_lora"
    dit = random_dit()
    load_lora(dit, write(tmp_path / "x.safetensors", {f"{key}.down.weight": a, f"{key}.up.weight": b}))
    found = deltas(dit, "original")["single_blocks.1.linear1.weight"]
    np.testing.assert_allclose(found[: 3 * W], b @ a, rtol=1e-4, atol=1e-4)
    assert not found[3 * W :].any()


# --- alpha ------------------------------------------------------------------------------------------------------------


def one(tmp_path, rank=8, alpha=None, **metadata):
    """A file with one pair, and B·A."""
    a, b = pair(np.random.default_rng(0), rank, W, W)
    key = "transformer.transformer_blocks.0.attn.to_v"
    tensors = {f"{key}.{A}": a, f"{key}.{B}": b}
    if alpha is not None:
        tensors[f"{key}.alpha"] = np.float32(alpha)
    return write(tmp_path / "lora.safetensors", tensors, **metadata), b @ a


def adapter_metadata(**values):
    return {"lora_adapter_metadata": json.dumps({f"transformer.{name}": value for name, value in values.items()})}


@pytest.mark.parametrize(
    ("alpha", "metadata", "scale"),
    [
        (None, {}, 1.0),
        (2.0, {}, 0.25),
        (None, adapter_metadata(r=8, lora_alpha=4), 0.5),
        (None, {"transformer.r": "8", "transformer.lora_alpha": "16"}, 2.0),
        (4.0, adapter_metadata(r=8, lora_alpha=4), 0.5),
        (None, adapter_metadata(r=8, lora_alpha=4, use_rslora=True), 4 / math.sqrt(8)),
        (None, adapter_metadata(r=2, lora_alpha=4, rank_pattern={"attn.to_v": 8}, alpha_pattern={"to_v": 24}), 3.0),
        (None, adapter_metadata(r=8, lora_alpha=4, alpha_pattern={r"^transformer_blocks\.\d\.attn\.to_[kv]$": 24}), 3.0),
        (None, adapter_metadata(r=8, lora_alpha=4, alpha_pattern={"^to_v$": 24}), 0.5),
        (None, {"transformer.lora_alpha": "16", "transformer.use_rslora": "True"}, 16 / math.sqrt(8)),
        (None, {"transformer.lora_alpha": "16", "transformer.use_rslora": "False"}, 2.0),
        (None, {"ss_network_alpha": "2"}, 0.25),
        (None, {"ss_network_alpha": "None"}, 1.0),
        (4.0, {"ss_network_alpha": "2"}, 0.5),
    ],
)
def test_scale_is_alpha_over_rank_wherever_alpha_stands(tmp_path, alpha, metadata, scale):
    file, product = one(tmp_path, alpha=alpha, **metadata)
    dit = random_dit()
    load_lora(dit, file)
    (found,) = deltas(dit).values()
    np.testing.assert_allclose(found, scale * product, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("alpha", "metadata", "message"),
    [
        (2.0, adapter_metadata(r=8, lora_alpha=4), "alpha 2, its metadata say 4"),
        (None, adapter_metadata(r=16, lora_alpha=4), "rank 8, its metadata say 16"),
        (None, adapter_metadata(r="many"), "no usable rank"),
        (None, {"lora_adapter_metadata": "{"}, "not JSON"),
        (None, {"lora_adapter_metadata": "[" * 100_000}, "not JSON"),
        (None, {"lora_adapter_metadata": "[]"}, "no JSON object"),
        (None, adapter_metadata(r=1e999), "no usable rank"),
        (None, adapter_metadata(lora_alpha=math.inf), "alpha inf"),
        (None, adapter_metadata(alpha_pattern={"(": 1}), "no usable rank or alpha"),
        (math.nan, {}, "is nan; a finite number"),
        (None, adapter_metadata(use_dora=True), "DoRA"),
    ],
)
def test_metadata_that_contradict_the_tensors_are_refused(tmp_path, alpha, metadata, message):
    file, _ = one(tmp_path, alpha=alpha, **metadata)
    dit = random_dit()
    with pytest.raises(InputError, match=message):
        load_lora(dit, file)
    assert all(linear.adapter is None for _, linear in linears(dit))


@pytest.mark.parametrize("shape", [(), (1,), (2,)])
def test_alpha_is_one_number(tmp_path, shape):
    file, product = one(tmp_path, alpha=np.full(shape, 2.0))
    dit = random_dit()
    if shape == (2,):
        with pytest.raises(InputError, match=r"alpha has shape \(2,\)"):
            load_lora(dit, file)
        return
    load_lora(dit, file)
    (found,) = deltas(dit).values()
    np.testing.assert_allclose(found, 0.25 * product, rtol=1e-4, atol=1e-4)


def test_an_adapter_config_beside_the_file_gives_alpha(tmp_path):
    product = one(tmp_path)[1]
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 8, "lora_alpha": 4}))
    dit = random_dit()
    load_lora(dit, tmp_path)
    (found,) = deltas(dit).values()
    np.testing.assert_allclose(found, 0.5 * product, rtol=1e-4, atol=1e-4)
    # Beside several files it is that of PEFT's own.
    write(tmp_path / "adapter_model.safetensors", load_file(tmp_path / "lora.safetensors"))
    for name, scale in (("lora", 1.0), ("adapter_model", 0.5)):
        dit = random_dit()
        load_lora(dit, tmp_path / f"{name}.safetensors")
        (found,) = deltas(dit).values()
        np.testing.assert_allclose(found, scale * product, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("transformer.x_embedder", A, B), ("x_embedder", A, B)),
        (("x_embedder", A, B), ("x_embedder", "lora_A.default.weight", "lora_B.default.weight")),
    ],
)
def test_one_layer_named_twice_is_refused(tmp_path, first, second):
    a, b = pair(np.random.default_rng(0), 2, 64, W)
    tensors = {f"{key}.{role}": matrix for key, *roles in (first, second) for role, matrix in zip(roles, (a, b))}
    with pytest.raises(InputError, match="the same matrix of one layer"):
        load_lora(random_dit(), write(tmp_path / "x.safetensors", tensors))


def test_rank_0_is_refused(tmp_path):
    a, b = np.ones((0, 64), np.float32), np.ones((W, 0), np.float32)
    with pytest.raises(InputError, match="x_embedder has rank 0"):
        load_lora(random_dit(), write(tmp_path / "x.safetensors", {f"x_embedder.{A}": a, f"x_embedder.{B}": b}))


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("transformer.transformer_blocks.0.attn.to_v.lora_magnitude_vector", "DoRA"),
        ("lora_unet_double_blocks_0_img_attn_qkv.dora_scale", "DoRA"),
        ("lora_unet_double_blocks_0_img_attn_qkv.lokr_w1", "LoKr"),
        ("lora_unet_double_blocks_0_img_attn_qkv.hada_w1_a", "LoHa"),
        ("double_blocks.0.img_attn.norm.key_norm.scale", "control LoRA"),
        ("double_blocks.0.img_attn.qkv.lora_B.bias", "bias"),
        ("diffusion_model.double_blocks.0.img_attn.qkv.diff_b", "full difference"),
        ("transformer.transformer_blocks.0.attn.to_w.lora_A.weight", r"1 of 3 keys .*\(nearest: .*transformer_blocks"),
        ("something.else", "1 of 3 keys"),
        ("transformer.transformer_blocks.7.attn.to_v.lora_A.weight", "1 of 3 keys"),
        ("transformer.transformer_blocks.1.attn.to_v.lora_A.weight", "no B matrix"),
        ("attn.to_v.lora_A.weight", "1 of 3 keys"),
    ],
)
def test_what_is_no_pair_of_a_layer_is_refused_by_name(tmp_path, extra, message):
    file, _ = one(tmp_path)
    write(file, {**load_file(file), extra: np.ones((2, W))})
    dit = random_dit()
    with pytest.raises(InputError, match=message):
        load_lora(dit, file)
    assert all(linear.adapter is None for _, linear in linears(dit))


@pytest.mark.parametrize(
    ("key", "shapes", "message"),
    [
        ("transformer.x_embedder", ((2, 128), (W, 2)), r"A \(2, 128\).*wants A \(r, 64\).*control LoRA widens img_in"),
        ("transformer.transformer_blocks.0.attn.to_v", ((2, W), (W, 3)), r"B \(72, 3\)"),
        ("transformer.transformer_blocks.0.attn.to_v", ((2, W), (3 * W, 2)), r"B \(216, 2\)"),
        ("transformer.transformer_blocks.0.attn.to_v", ((2, W, 3), (W, 2)), "a matrix is wanted"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(tmp_path, key, shapes, message):
    file = write(tmp_path / "l.safetensors", {f"{key}.{A}": np.ones(shapes[0]), f"{key}.{B}": np.ones(shapes[1])})
    with pytest.raises(InputError, match=message):
        load_lora(random_dit(), file)


def test_keys_of_text_encoders_are_skipped_aloud(tmp_path):
    file, product = one(tmp_path)
    te = "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"
    embedding = "bundle_emb.<animal>.clip_l"  # as OneTrainer writes
    older = "lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha"
    names = (te, older, "text_encoder.x.lora_A.weight", "text_encoders.clip_l.x.lora_A.weight", embedding)
    others = {name: np.ones((2, 8)) for name in names}
    write(file, {**load_file(file), **others})
    dit = random_dit()
    with pytest.warns(UserWarning, match="5 keys for text encoders are skipped"):
        report = load_lora(dit, file)
    assert set(report.skipped) == set(names)
    (found,) = deltas(dit).values()
    np.testing.assert_allclose(found, product, rtol=1e-4, atol=1e-4)
