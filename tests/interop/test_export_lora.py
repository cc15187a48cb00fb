"""The LoRA of an exported folder, as diffusers reads it in every dialect."""

import jax.numpy as jnp
import numpy as np
import pytest
from exports import exporting
from flax import nnx
from safetensors.numpy import load_file
from small_dit import inputs, random_dit, run, run_twin

from squeeze_jax.checkpoints.trained import load_trained
from squeeze_jax.export.certificate import relative_error
from squeeze_jax.interop.exported import LORA
from squeeze_jax.interop.lora import load_lora, save_lora
from squeeze_jax.interop.merged import save_merged
from squeeze_jax.layers.lora import LoRAConfig, add_lora, linears
from squeeze_jax.models.dit import DiT, DiTConfig

torch = pytest.importorskip("torch", reason="PyTorch is not installed: parity tests are skipped")
pytest.importorskip("diffusers")
pytest.importorskip("peft")
torch.set_num_threads(1)  # on matrices this small, threads wait for each other most of the time


def delta(tensors, name, scale):
    return scale * tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]


@pytest.mark.parametrize("dialect", ["comfyui", "kohya"])
def test_every_dialect_and_the_merged_transformer_have_the_same_delta(home, tmp_path, dialect):
    out = exporting(home / "run", tmp_path / "out", "--merge", "--lora-format", dialect, "--no-check")
    lora, base = load_file(out / LORA), load_file(home / "base" / "diffusion_pytorch_model.safetensors")
    base = {name: tensor.astype(jnp.bfloat16).astype(np.float32) for name, tensor in base.items()}  # as the run kept it
    merged = load_file(out / "transformer" / "diffusion_pytorch_model.safetensors")
    shapes = [{name: tensor.shape for name, tensor in side.items()} for side in (merged, base)]
    assert shapes[0] == shapes[1]
    touched = {name.rsplit(".", 2)[0].removeprefix("transformer.") for name in lora}
    for name in merged:
        module = name.removesuffix(".weight")
        expected = delta(lora, f"transformer.{module}", 2 / 3) if module in touched else 0
        np.testing.assert_allclose(merged[name] - base[name], expected, atol=1e-5, err_msg=name)
    other = random_dit()
    assert load_lora(other, out / dialect / "lora.safetensors").dialect == dialect
    save_lora(tmp_path / "again.safetensors", other, "diffusers")
    again = load_file(tmp_path / "again.safetensors")
    for module in touched:
        name = f"transformer.{module}"
        np.testing.assert_allclose(delta(again, name, 1), delta(lora, name, 2 / 3), atol=1e-5, err_msg=name)


@pytest.fixture(scope="module")
def full_size():
    """FLUX.1-dev's shapes without its values, with random adapters of UNO's placement."""

    def make():
        dit = DiT(DiTConfig(), rngs=nnx.Rngs(0))
        add_lora(dit, LoRAConfig(rank=2, alpha=0.5), rngs=nnx.Rngs(0))
        return dit

    dit, rng = nnx.eval_shape(make), np.random.default_rng(0)
    for _, linear in linears(dit):
        for part in linear.adapter.parts if linear.adapter is not None else ():
            for leaf in (part.down, part.up):
                leaf.set_value(rng.standard_normal(leaf.shape, np.float32))
            part.scale.set_value(np.full(part.scale.shape, 0.25, np.float32))
    return dit


def test_diffusers_loads_the_lora_at_full_size(full_size, tmp_path, monkeypatch):
    """Shapes of FLUX.1-dev, base on the meta device: every key is taken, none is missing, alpha is the file's."""
    from diffusers import FluxPipeline, FluxTransformer2DModel
    from diffusers.loaders import peft as loader
    from peft import get_peft_model_state_dict

    save_lora(tmp_path / LORA, full_size, "diffusers", jnp.bfloat16, header=True)
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True).to(torch.bfloat16)
    pipeline = FluxPipeline(None, None, None, None, None, None, transformer)
    said = []
    monkeypatch.setattr(loader, "_maybe_warn_for_unhandled_keys", lambda keys, name: said.append(keys))
    pipeline.load_lora_weights(str(tmp_path), weight_name=LORA, adapter_name="squeeze", low_cpu_mem_usage=True)
    assert not said[0].unexpected_keys and not [key for key in said[0].missing_keys if "lora_" in key]
    found = get_peft_model_state_dict(transformer, adapter_name="squeeze")
    wanted = load_file(tmp_path / LORA)
    assert {f"transformer.{name}" for name in found} == wanted.keys()
    assert len(wanted) == 2 * (19 * 8 + 38 * 4)
    assert all(tuple(tensor.shape) == wanted[f"transformer.{name}"].shape for name, tensor in found.items())
    config = transformer.peft_config["squeeze"]
    assert (config.r, config.lora_alpha) == (2, 0.5)


@pytest.mark.parametrize("dialect", ["comfyui", "kohya"])
def test_diffusers_finds_the_same_deltas_in_the_other_dialects_at_full_size(full_size, tmp_path, dialect):
    """Its own translation of ComfyUI's and kohya's files, an adapted layer's delta by what it does to a random vector."""
    from diffusers import FluxPipeline

    save_lora(tmp_path / "theirs.safetensors", full_size, dialect)
    save_lora(tmp_path / LORA, full_size, "diffusers", header=True)
    found = FluxPipeline.lora_state_dict(str(tmp_path), weight_name="theirs.safetensors")
    found, wanted = {name: tensor.numpy() for name, tensor in found.items()}, load_file(tmp_path / LORA)
    for module in {name.rsplit(".", 2)[0] for name in found | wanted}:
        x = np.random.default_rng(0).standard_normal(found[f"{module}.lora_A.weight"].shape[1], np.float32)
        done = found[f"{module}.lora_B.weight"] @ (found[f"{module}.lora_A.weight"] @ x)
        if f"{module}.lora_A.weight" not in wanted:  # rows of a fused layer that have no adapter
            assert module.endswith(".proj_mlp") and not done.any()
            continue
        expected = 0.25 * wanted[f"{module}.lora_B.weight"] @ (wanted[f"{module}.lora_A.weight"] @ x)
        assert relative_error(done, expected) < 1e-5, module


def test_the_pipeline_of_flux_computes_the_same_with_our_lora(home, exported):
    from diffusers import FluxPipeline, FluxTransformer2DModel

    twin = FluxTransformer2DModel.from_pretrained(home / "base", torch_dtype=torch.bfloat16).float()
    x = inputs()
    with torch.no_grad():
        bare = run_twin(torch, twin, x)
        FluxPipeline(None, None, None, None, None, None, twin).load_lora_weights(str(exported), weight_name=LORA)
        adapted = run_twin(torch, twin, x)
    assert relative_error(adapted.numpy(), run(load_trained(home / "run").system.dit, x)) < 1e-5
    assert relative_error(adapted.numpy(), bare.numpy()) > 0.1


def test_diffusers_loads_a_merged_transformer_in_shards(home, exported, tmp_path):
    from diffusers import FluxTransformer2DModel

    save_merged(tmp_path / "shards", load_trained(home / "run").system.dit, jnp.float32, shard_bytes=400_000)
    assert len(list((tmp_path / "shards").glob("*-of-*.safetensors"))) > 2
    for folder in (tmp_path / "shards", exported / "transformer"):
        model, said = FluxTransformer2DModel.from_pretrained(folder, output_loading_info=True)
        assert not any(said.values()), said
        wanted = load_file(exported / "transformer" / "diffusion_pytorch_model.safetensors")
        for name, tensor in model.state_dict().items():
            np.testing.assert_array_equal(tensor.numpy(), wanted.pop(name), err_msg=name)
        assert not wanted
