"""LoRA files are written: out and in again is the same delta in every dialect, and PyTorch draws the
same."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from lora_pairs import DOWN, UP, WIDTH, A, deltas, pair, write
from safetensors.numpy import load_file
from small_dit import CONFIG, inputs, like_twin, random_dit, run, run_twin, torch_twin

from squeeze_jax.errors import InputError
from squeeze_jax.interop.flux import FLUX1
from squeeze_jax.interop.lora import load_lora, save_lora
from squeeze_jax.interop.lora_dialects import DIALECTS, spelled
from squeeze_jax.layers.lora import LoRAConfig, add_lora, linears, remove_lora


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
        a, b = pair(rng, rank, WIDTH, WIDTH)
        key = f"lora_transformer_transformer_blocks_0_attn_to_{name}"
        tensors |= {f"{key}.{DOWN}": a, f"{key}.{UP}": b, f"{key}.alpha": np.float32(alpha)}
        wanted.append(b @ a)
    dit = random_dit()
    load_lora(dit, write(tmp_path / "in.safetensors", tensors))
    save_lora(tmp_path / "out.safetensors", dit, "kohya")
    out = load_file(tmp_path / "out.safetensors")
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    assert out[f"{key}.{DOWN}"].shape == (9, WIDTH)
    assert out[f"{key}.{UP}"].shape == (3 * WIDTH, 9)
    assert out[f"{key}.alpha"] == 9.0
    assert np.count_nonzero(out[f"{key}.{UP}"]) == WIDTH * 9
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
