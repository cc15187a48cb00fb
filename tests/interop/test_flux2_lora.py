"""LoRA files of FLUX.2: what diffusers makes of ours, ours of ours, and what is refused."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from small_dit import random_dit
from small_flux2 import CONFIG, inputs, like_twin, random_flux2, run, run_twin, torch_twin

from squeeze_jax.errors import InputError
from squeeze_jax.interop.adapters import adapter_leaves
from squeeze_jax.interop.lora import load_lora, save_lora
from squeeze_jax.layers.lora import LoRAConfig, LoRAParam, add_lora, linears, merge_lora

DIALECTS = ["diffusers", "peft", "kohya", "kohya_diffusers", "comfyui", "ai_toolkit"]
LORA = LoRAConfig(rank=3, alpha=6.0)


def adapted(model, config=LORA, seed=1):
    """The model with random adapters."""
    add_lora(model, config, rngs=nnx.Rngs(seed))
    rng = np.random.default_rng(seed)
    for _, leaf in nnx.to_flat_state(nnx.state(model, LoRAParam)):
        deviation = 0.3 * leaf.shape[-2] ** -0.5
        leaf.set_value(jnp.asarray(deviation * rng.standard_normal(leaf.shape), jnp.float32))
    return model


def merged_kernels(model):
    merge_lora(model)
    return {path: np.asarray(linear.kernel[...]) for path, linear in linears(model)}


def test_the_default_placement_leaves_the_feed_forward_of_single_blocks_alone():
    """FLUX.1's preset on FLUX.2's names: attention's projections, and q, k and v alone in linear1."""
    model = adapted(random_flux2())
    parts = {path: linear.adapter.parts for path, linear in linears(model) if linear.adapter}
    attention = {f"double_blocks.{s}_attn.{n}" for s in ("img", "txt") for n in ("qkv", "proj")}
    assert set(parts) == attention | {"single_blocks.linear1", "single_blocks.linear2"}
    ((part,),) = [parts["single_blocks.linear1"]]
    assert (part.start, part.size) == (0, 3 * CONFIG.width)


@pytest.mark.parametrize("dialect", ["diffusers", "peft", "ai_toolkit", "kohya"])
def test_the_file_means_the_same_to_diffusers(tmp_path, dialect):
    torch, twin = torch_twin()
    from diffusers.loaders.lora_pipeline import Flux2LoraLoaderMixin

    model, x = adapted(like_twin(twin)), inputs()
    save_lora(tmp_path / "x.safetensors", model, dialect)
    state = Flux2LoraLoaderMixin.lora_state_dict(str(tmp_path), weight_name="x.safetensors")
    if dialect == "peft":  # whose adapters belong to the transformer alone
        state = {name.replace("base_model.model.", "transformer."): v for name, v in state.items()}
    twin.load_lora_adapter(state, prefix="transformer")
    with torch.no_grad():
        theirs = run_twin(torch, twin, x).numpy()
    ours = np.asarray(run(model, x))
    assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_comes_back_as_it_went(tmp_path, dialect):
    save_lora(tmp_path / "x.safetensors", adapted(random_flux2()), dialect)
    again = random_flux2()
    report = load_lora(again, tmp_path / "x.safetensors")
    assert report.modules == 4 * CONFIG.num_double_blocks + 2 * CONFIG.num_single_blocks
    expected, found = merged_kernels(adapted(random_flux2())), merged_kernels(again)
    for path in expected:
        np.testing.assert_allclose(found[path], expected[path], rtol=1e-5, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("qkv", ["shared", "separate"])
@pytest.mark.parametrize("dialect", ["diffusers", "kohya"])
def test_a_run_continues_from_an_exported_file(tmp_path, dialect, qkv):
    """linear1's rows of the feed-forward are zero in the file, and no part of the config's adapter."""
    config = dataclasses.replace(LORA, qkv=qkv)
    model = adapted(random_flux2(), config)
    save_lora(tmp_path / "x.safetensors", model, dialect)
    fresh = random_flux2()
    add_lora(fresh, config, rngs=nnx.Rngs(0))
    leaves = adapter_leaves(fresh, tmp_path / "x.safetensors", config.alpha / config.rank)
    for path, leaf in nnx.to_flat_state(nnx.state(fresh, LoRAParam)):
        leaf.set_value(jnp.asarray(leaves[".".join(map(str, ("dit", *path)))]))
    nnx.update(fresh, nnx.state(fresh, LoRAParam))
    expected, found = merged_kernels(model), merged_kernels(fresh)
    for path in expected:
        np.testing.assert_allclose(found[path], expected[path], rtol=1e-5, atol=1e-6, err_msg=path)


def test_a_file_that_changes_other_rows_is_refused_for_training(tmp_path):
    model = random_flux2()
    add_lora(model, LORA, rngs=nnx.Rngs(0))
    a, b = np.ones((2, CONFIG.width), np.float32), np.ones((3 * CONFIG.width + 2 * CONFIG.mlp_width, 2), np.float32)
    name = "transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj"
    file = tmp_path / "x.safetensors"
    save_file({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, file)
    with pytest.raises(InputError, match=r"rows of single_blocks.linear1 that this config leaves alone"):
        adapter_leaves(model, file, 2.0)


def test_a_file_for_the_other_family_is_named(tmp_path):
    flux1 = random_dit()
    adapted(flux1)
    save_lora(tmp_path / "flux1.safetensors", flux1, "kohya")
    with pytest.raises(InputError, match=r"a LoRA for FLUX\.1, but this transformer is FLUX\.2's"):
        load_lora(random_flux2(dataclasses.replace(CONFIG, num_double_blocks=1)), tmp_path / "flux1.safetensors")
    save_lora(tmp_path / "flux2.safetensors", adapted(random_flux2()), "diffusers")
    with pytest.raises(InputError, match=r"a LoRA for FLUX\.2, but this transformer is FLUX\.1's"):
        load_lora(flux1, tmp_path / "flux2.safetensors")


def test_lokr_of_flux2_is_refused_by_name(tmp_path):
    key = "diffusion_model.single_blocks.0.linear1.lokr_w1"
    save_file({key: np.ones((2, 2), np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="LoKr"):
        load_lora(random_flux2(), tmp_path / "x.safetensors")
    assert key in load_file(tmp_path / "x.safetensors")
