"""LoRA files: every dialect's delta lands in exactly the right rows, and what is no LoRA is refused by name."""

import json
import math
import re

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from small_dit import CONFIG, inputs, like_twin, random_dit, run, run_twin, torch_twin

from squeeze_jax.errors import InputError
from squeeze_jax.interop.flux import FLUX1, diffusers_entries, original_entries
from squeeze_jax.interop.lora import load_lora, save_lora
from squeeze_jax.interop.lora_dialects import DIALECTS, spelled
from squeeze_jax.interop.mapping import export_entries
from squeeze_jax.layers.lora import LoRAConfig, add_lora, linears, merge_lora, remove_lora

WIDTH = CONFIG.width
A, B, DOWN, UP = "lora_A.weight", "lora_B.weight", "lora_down.weight", "lora_up.weight"


def weights(dit, names="diffusers"):
    table = diffusers_entries if names == "diffusers" else original_entries
    return export_entries(dit, table(dit.config))


def deltas(dit, names="diffusers"):
    """What the adapters add to each tensor of a checkpoint; tensors that they leave alone are not in it."""
    base = random_dit()
    before, after = weights(base, names), {}
    for path, linear in linears(base):
        linear.adapter = dict(linears(dit))[path].adapter
    merge_lora(base)
    after = weights(base, names)
    return {name: after[name] - before[name] for name in before if not np.array_equal(after[name], before[name])}


def pair(rng, rank, fan_in, fan_out):
    return rng.standard_normal((rank, fan_in)).astype(np.float32), rng.standard_normal((fan_out, rank)).astype(np.float32)


def write(path, tensors, **metadata):
    save_file({name: np.asarray(tensor, np.float32) for name, tensor in tensors.items()}, path, metadata or None)
    return path


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


# --- from dialect to dialect ------------------------------------------------------------------------------------------


def adapted(qkv, target=".*", alpha=3.0, seed=0, rank=4):
    """A transformer with a random adapter on every linear layer, and another scale in each layer of a stack."""
    dit, rng = random_dit(), np.random.default_rng(seed)
    add_lora(dit, LoRAConfig(rank=rank, alpha=alpha, target=target, qkv=qkv), rngs=nnx.Rngs(0))
    for _, linear in linears(dit):
        for part in linear.adapter.parts if linear.adapter is not None else ():
            part.up.set_value(jnp.asarray(rng.standard_normal(part.up.shape), jnp.float32))
            part.scale.set_value(jnp.asarray(rng.uniform(0.5, 2, part.scale.shape), jnp.float32))
    return dit


@pytest.mark.parametrize("qkv", ["shared", "separate"])
@pytest.mark.parametrize("dialect", sorted(DIALECTS))
def test_out_and_in_again_is_the_same_delta(tmp_path, dialect, qkv):
    dit = adapted(qkv, r"(double_blocks\..*_attn|single_blocks\.linear).*" if dialect == "xlabs" else ".*")
    count = save_lora(tmp_path / "lora.safetensors", dit, dialect)
    again = random_dit()
    report = load_lora(again, tmp_path / "lora.safetensors")
    assert report.modules <= count  # q, k and v are one layer of ours and three of theirs
    assert report.dialect == dialect
    wanted, found = deltas(dit), deltas(again)
    assert wanted.keys() == found.keys()
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-4, atol=1e-4, err_msg=name)
    if not DIALECTS[dialect].alpha:
        assert not any(name.endswith("alpha") for name in load_file(tmp_path / "lora.safetensors"))


@pytest.mark.parametrize("dialect", sorted(DIALECTS))
def test_ranks_of_their_own_go_out_and_in(tmp_path, dialect):
    """Names that are ends of others (`proj_out` of a block and of the whole) included."""
    ranks = {r"single_blocks\.linear2": 5, r"double_blocks\.img_attn\.proj": 2}
    if dialect != "xlabs":
        ranks |= {r"final_layer\.linear": 3, r"double_blocks\.txt_mod\.lin": 4}
    dit, rng = random_dit(), np.random.default_rng(0)
    for target, rank in ranks.items():
        add_lora(dit, LoRAConfig(rank=rank, alpha=float(rank), target=target), rngs=nnx.Rngs(rank))
    for _, linear in linears(dit):
        for part in linear.adapter.parts if linear.adapter is not None else ():
            part.up.set_value(jnp.asarray(rng.standard_normal(part.up.shape), jnp.float32))
    save_lora(tmp_path / "lora.safetensors", dit, dialect)
    again = random_dit()
    load_lora(again, tmp_path / "lora.safetensors")
    wanted, found = deltas(dit), deltas(again)
    assert wanted.keys() == found.keys()
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-4, atol=1e-4, err_msg=name)


def test_three_ranks_fused_are_block_diagonal_with_alpha_grown(tmp_path):
    rng, tensors, wanted = np.random.default_rng(0), {}, []
    for name, rank, alpha in (("q", 2, 2.0), ("k", 3, 3.0), ("v", 4, 4.0)):
        a, b = pair(rng, rank, W, W)
        key = f"lora_transformer_transformer_blocks_0_attn_to_{name}"
        tensors |= {f"{key}.{DOWN}": a, f"{key}.{UP}": b, f"{key}.alpha": np.float32(alpha)}
        wanted.append(b @ a)
    dit = random_dit()
    load_lora(dit, write(tmp_path / "in.safetensors", tensors))
    save_lora(tmp_path / "out.safetensors", dit, "kohya")
    out = load_file(tmp_path / "out.safetensors")
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    assert out[f"{key}.{DOWN}"].shape == (9, W)
    assert out[f"{key}.{UP}"].shape == (3 * W, 9)
    assert out[f"{key}.alpha"] == 9.0
    assert np.count_nonzero(out[f"{key}.{UP}"]) == W * 9
    np.testing.assert_allclose(out[f"{key}.{UP}"] @ out[f"{key}.{DOWN}"], np.concatenate(wanted), rtol=1e-4, atol=1e-4)


def test_a_shared_down_projection_is_written_three_times(tmp_path):
    save_lora(tmp_path / "x.safetensors", adapted("shared", r".*img_attn\.qkv"))
    out = load_file(tmp_path / "x.safetensors")
    q, k, v = (out[f"transformer.transformer_blocks.0.attn.to_{n}.{A}"] for n in "qkv")
    np.testing.assert_array_equal(q, k)
    np.testing.assert_array_equal(q, v)


def test_a_fresh_adapter_keeps_its_rank(tmp_path):
    dit = random_dit()
    add_lora(dit, LoRAConfig(rank=5), rngs=nnx.Rngs(0))
    save_lora(tmp_path / "x.safetensors", dit, "kohya")
    again = random_dit()
    load_lora(again, tmp_path / "x.safetensors")
    save_lora(tmp_path / "y.safetensors", again, "kohya")
    x, y = load_file(tmp_path / "x.safetensors"), load_file(tmp_path / "y.safetensors")
    assert x.keys() == y.keys()
    assert all(len(tensor) == 5 for name, tensor in x.items() if name.endswith(DOWN))
    for name in x:
        np.testing.assert_array_equal(x[name], y[name])


def test_two_files_add_up_and_come_off_again(tmp_path):
    first, second = adapted("shared", seed=1), adapted("separate", seed=2)
    save_lora(tmp_path / "1.safetensors", first, "kohya")
    save_lora(tmp_path / "2.safetensors", second, "diffusers")
    both = random_dit()
    load_lora(both, tmp_path / "1.safetensors")
    load_lora(both, tmp_path / "2.safetensors")
    one, two, total = deltas(first), deltas(second), deltas(both)
    for name in total:
        np.testing.assert_allclose(total[name], one[name] + two[name], rtol=1e-3, atol=1e-3, err_msg=name)
    remove_lora(both)
    assert not deltas(both)


def test_rows_without_a_name_are_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(InputError, match=r"xlabs has no name for all adapted rows of (txt_in|img_in)"):
        save_lora(tmp_path / "x.safetensors", adapted("shared", r"(txt|img)_in"), "xlabs")
    with pytest.raises(InputError, match="carries no adapter"):
        save_lora(tmp_path / "x.safetensors", random_dit())
    assert not list(tmp_path.iterdir())


def test_every_dialect_spells_every_layer_once():
    for name, dialect in DIALECTS.items():
        names = spelled(dialect, CONFIG)
        assert len(names) == len(dialect.prefixes) * len(FLUX1.targets(dialect.naming, CONFIG)), name


# --- against PyTorch --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", ["diffusers", "older diffusers", "peft"])
def test_the_file_means_the_same_to_diffusers_and_peft(tmp_path, dialect):
    torch, twin = torch_twin()
    peft = pytest.importorskip("peft")
    dit, _ = like_twin(twin)
    for path, linear in linears(adapted("shared")):
        dict(linears(dit))[path].adapter = linear.adapter
    folder = tmp_path / dialect
    folder.mkdir()
    file = folder / "adapter_model.safetensors"
    save_lora(file, dit, "peft" if dialect == "peft" else "diffusers")
    if dialect == "older diffusers":  # the same under the names of before PEFT: they mean the same to both
        names = {"lora_A": "lora.down", "lora_B": "lora.up"}
        write(file, {re.sub("lora_[AB]", lambda m: names[m[0]], k): v for k, v in load_file(file).items()})
        remove_lora(dit)
        assert load_lora(dit, file).dialect == "diffusers"
    if dialect == "peft":
        loaded = peft.PeftModel.from_pretrained(twin, folder)
        model = loaded.base_model.model
    else:
        twin.load_lora_adapter(load_torch(torch, file))
        model = twin
    x = inputs()
    with torch.no_grad():
        wanted = run_twin(torch, model, x).numpy()
    found = np.asarray(run(dit, x))
    assert np.linalg.norm(found - wanted) <= 1e-5 * np.linalg.norm(wanted)
    remove_lora(dit)
    assert np.linalg.norm(np.asarray(run(dit, x)) - wanted) > 1e-2 * np.linalg.norm(wanted)


def load_torch(torch, file):
    return {name: torch.from_numpy(tensor) for name, tensor in load_file(file).items()}
