"""What `export` writes: the same pictures in PyTorch, the same leaves back, whole or not at all."""

import ast
import copy
import dataclasses
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from safetensors.numpy import load_file
from small_dit import inputs, random_dit, run, run_twin
from small_run import random_weights, small_config, write_home

from squeeze_jax.checkpoints.manager import (
    CHECKPOINTS,
    Checkpoints,
    Saved,
    read_weights,
    write_config,
    write_weights,
)
from squeeze_jax.checkpoints.trained import load_initial_params, load_trained
from squeeze_jax.commands import export, sample
from squeeze_jax.config import (
    load_preset,
)
from squeeze_jax.data.images import resize_for_reference, to_rgb, to_uint8
from squeeze_jax.errors import InputError
from squeeze_jax.export.card import write_card
from squeeze_jax.export.certificate import relative_error, torch_pipeline
from squeeze_jax.interop import tensors
from squeeze_jax.interop.exported import LORA
from squeeze_jax.interop.load import DEMO, save_dit
from squeeze_jax.interop.lora import load_lora, save_lora
from squeeze_jax.interop.mapping import parameters_by_path
from squeeze_jax.interop.merged import save_merged
from squeeze_jax.layers.lora import LoRAConfig, add_lora, linears
from squeeze_jax.models.dit import DiT, DiTConfig
from squeeze_jax.sampling.pipeline import Pipeline, Settings
from squeeze_jax.sampling.schedule import noise_for
from squeeze_jax.sharding import make_mesh

torch = pytest.importorskip("torch", reason="PyTorch is not installed: parity tests are skipped")
pytest.importorskip("diffusers")
pytest.importorskip("peft")
torch.set_num_threads(1)  # on matrices this small, threads wait for each other most of the time


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """base, vae, mllm as published folders, and a weights folder `run`."""
    home = tmp_path_factory.mktemp("home")
    os.environ["SQUEEZE_JAX_CACHE"] = os.environ["SQUEEZE_TEST_CACHE"]
    write_home(home)
    scores = {"pairs": 512, "scores": {"staged": {"tasks": {"subject": {"value": 0.875}, "scene": {"value": 0.5}}}}}
    (home / "run" / "scores.json").write_text(json.dumps(scores))
    return home


def exporting(checkpoint, out, *flags):
    assert export.main([str(checkpoint), "--out", str(out), *flags]) == 0
    return out


@pytest.fixture(scope="module")
def exported(home):
    return exporting(home / "run", home / "exported", "--merge")


def pictures(count):
    rng = np.random.default_rng(1)
    return [Image.fromarray(rng.integers(0, 256, size, np.uint8)) for size in ((40, 64, 3), (32, 32, 3))[:count]]


# --- the same pictures ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sides(home, exported):
    """Ours and PyTorch's, both from the exported folder."""
    trained = load_trained(exported)
    with torch_pipeline(exported, trained) as theirs:
        yield Pipeline.of(trained.system, trained.config), theirs


@pytest.mark.parametrize(
    ("references", "changes"),
    [
        (2, {}),
        (2, {"tau1": 0.0, "tau2": 0.0}),
        (2, {"tau1": 1.1, "tau2": 0.0}),
        (0, {}),
        pytest.param(1, {"tau1": 0.8, "tau2": 0.8}, marks=pytest.mark.slow),
        pytest.param(2, {"height": 48, "width": 80}, marks=pytest.mark.slow),
    ],
    ids=["two references", "MLLM throughout", "both throughout", "text only", "one reference", "not square"],
)
def test_pytorch_draws_the_same(sides, references, changes):
    ours, theirs = sides
    prompt, images, settings = "a small critter on the beach, <img> and all", pictures(references), Settings(**changes)
    resolved = ours.resolved(settings)
    grid = ours.config.grid(resolved.height, resolved.width)
    seeds = [0] if images else [0, 1]  # one image, where it is the certificate's program, needs no compilation
    noise = noise_for(seeds, grid[0] * grid[1], 64)
    states = ours.encoders.read([prompt], [images])
    latents = [ours.encoders.latents([sized(ours, image)])[0] for image in images]
    expected = ours.sample(states, [latents], seeds, settings)
    with torch.no_grad():
        found = theirs(prompt, images, latents=torch.tensor(np.array(noise)), output_type="latent", **changes)
        decoded = theirs.decode(found, grid)
    assert relative_error(found.numpy(), expected) <= 1e-4
    assert relative_error(expected, noise) > 0.1
    drawn = [to_uint8(x).astype(int) for x in (decoded, ours.decode(expected, settings))]
    assert np.mean(np.abs(drawn[0] - drawn[1]) > 1) <= 1e-3
    assert drawn[0].std() > 5


def test_times_and_guidance_are_told_in_float32_whatever_the_dtype(sides, monkeypatch):
    """diffusers rounds them: in bfloat16 the times of two steps would be one."""
    _, theirs = sides
    rounded, told = copy.deepcopy(theirs.transformer).to(torch.bfloat16), []
    rounded.time_text_embed.time_proj.register_forward_hook(lambda module, given, out: told.append(given[0]))
    monkeypatch.setattr(theirs, "transformer", rounded)
    positions, guided = torch.zeros(4, 3), rounded.config.guidance_embeds
    with torch.no_grad():
        theirs.velocity(torch.zeros(1, 4, 64), 0.9783, positions, torch.zeros(2, rounded.config.joint_attention_dim), None)
    assert [value.dtype for value in told] == [torch.float32] * (1 + guided)
    assert told[0].item() == pytest.approx(978.3, abs=1e-3)
    assert not theirs.told


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "I;16", "I", "CMYK"])
def test_references_of_every_kind_become_the_same_picture(sides, tmp_path, mode):
    theirs, ramp = sys.modules[type(sides[1]).__module__], np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    image = Image.fromarray(ramp) if mode == "I;16" else Image.fromarray((ramp // 257).astype(np.uint8)).convert(mode)
    if mode == "I":
        image = Image.fromarray(ramp.astype(np.int32))
    np.testing.assert_array_equal(np.asarray(theirs.to_rgb(image)), np.asarray(to_rgb(image)))
    for unknown in (Image.fromarray(ramp.astype(np.float32)), Image.fromarray(ramp.astype(np.int32) * 2)):
        with pytest.raises(ValueError, match="no known range"):
            theirs.to_rgb(unknown)


def sized(pipeline, image):
    return resize_for_reference(image, pipeline.config.data.reference_long_side)


@pytest.mark.slow
def test_sample_draws_from_the_exported_folder_what_it_draws_from_the_run(home, exported, tmp_path):
    pictures(1)[0].save(tmp_path / "subject.png")
    drawn = []
    for folder in ("run", "exported"):
        arguments = ["--prompt", "a critter", "--out", tmp_path / f"{folder}.png", "--reference", tmp_path / "subject.png"]
        assert sample.main([str(a) for a in (*arguments, "--checkpoint", home / folder, "--steps", 2)]) == 0
        drawn.append(np.asarray(Image.open(tmp_path / f"{folder}.png")))
    np.testing.assert_array_equal(*drawn)


def test_the_certificate_says_what_was_compared(exported):
    report = json.loads((exported / "parity.json").read_text())
    assert len(report["parts"]) == 6
    assert all(0 < error <= 1e-4 for error in report["parts"].values())
    assert report["whole"]["latents"] <= 1e-4 and report["whole"]["pixels"] <= 1e-3
    assert report["versions"]["torch"] == torch.__version__
    files = {file.relative_to(exported).as_posix() for file in exported.rglob("*") if file.is_file()}
    assert files == {*report["files"], "parity.json"}
    card = (exported / "README.md").read_text()
    assert f"{report['whole']['latents']:.1e}" in card and "rank 3, alpha 2" in card
    assert "This computes in float32" in card and "torch_dtype=torch.float32" in card
    assert "held-out pairs | subject | scene |" in card and "| staged | 87.5 | 50.0 |" in card


def test_there_is_nothing_to_run_but_two_short_files(exported):
    kinds = {file.suffix for file in exported.rglob("*") if file.is_file()}
    assert kinds == {".json", ".safetensors", ".py", ".md"}
    code = sorted(exported.rglob("*.py"))
    assert [file.name for file in code] == ["squeeze_aggregator.py", "squeeze_pipeline.py"]
    assert sum(len(file.read_text().splitlines()) for file in code) <= 500
    imported = {
        (node.module or "").split(".")[0] if isinstance(node, ast.ImportFrom) else alias.name.split(".")[0]
        for file in code for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names
    }  # fmt: skip
    theirs = {"torch", "diffusers", "transformers", "safetensors", "numpy", "PIL", "tokenizers"}  # the last three: theirs
    assert imported - set(sys.stdlib_module_names) == theirs | {"squeeze_aggregator"}


USER = """
import sys
sys.dont_write_bytecode, unpickled = True, []
sys.addaudithook(lambda event, args: unpickled.append(args) if event == "pickle.find_class" else None)
{usage}
assert picture.size == (64, 64) and not unpickled, unpickled
assert not [name for name in sys.modules if name.split(".")[0] in ("jax", "squeeze_jax")]
"""


@pytest.mark.slow
@pytest.mark.parametrize("merged", [True, False], ids=["merged", "base and LoRA"])
def test_what_the_card_says_to_paste_runs_without_us(home, exported, tmp_path, merged):
    folder = exporting(home / "run", tmp_path / "out", "--no-check", *["--merge"][: int(merged)])
    usage = re.search("```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert usage is not None and ("transformer=" in usage[1]) != merged
    pictures(1)[0].save(folder / "subject.png")
    (folder / "user.py").write_text(USER.format(usage=usage[1]))
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "user.py"], cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert np.asarray(Image.open(folder / "out.png")).std() > 5


def test_every_part_has_its_licence_in_the_card_of_a_real_run(tmp_path):
    preset = load_preset(Path(__file__).parents[2] / "configs" / "flux_stage2.py")
    write_card(tmp_path, preset, {"base": "0123456789abcdef", "dtype": "float32", "step": 7}, None)
    card = (tmp_path / "README.md").read_text()
    assert "license_name: flux-1-dev-non-commercial-license" in card.split("---")[1]
    table = card.split("## Licences")[1].split("\n## ")[0]
    rows = dict(row.strip("| ").split(" | ") for row in table.splitlines()[4:] if row)
    assert "Apache-2.0" in rows["Code (`squeeze_*.py`)"]
    for part in ("Base transformer", "LoRA", "Autoencoder"):
        assert "FLUX.1-dev" in rows[part] and "no" in rows[part] and "commercial use" in rows[part]
    assert {"Aggregator", "Multimodal LLM", "Training data"} < rows.keys()
    assert "This computes in bfloat16. With `torch_dtype=torch.float32`" in card
    assert "The check was skipped" in card and 'vae="black-forest-labs/FLUX.1-dev"' in card


@pytest.mark.parametrize(
    ("preset", "base", "licence"),
    [
        ("flux_stage2", "FLUX.1-dev", "license: other"), ("flux_krea", "FLUX.1-Krea-dev", "license: other"),
        ("flux_kontext", "FLUX.1-Kontext-dev", "license: other"), ("flux_schnell", "FLUX.1-schnell", "license: apache-2.0"),
    ],
)  # fmt: skip
def test_a_card_names_the_base_that_the_lora_belongs_to(tmp_path, preset, base, licence):
    """All but the last have the same sizes."""
    config = load_preset(Path(__file__).parents[2] / "configs" / f"{preset}.py")
    moved = dataclasses.replace(config.model, dit_weights=f"/mnt/{base}/transformer")
    for one in (config, dataclasses.replace(config, model=moved)):
        write_card(tmp_path, one, {"base": None, "dtype": "float32", "step": None}, None)
        card = (tmp_path / "README.md").read_text()
        front, usage = card.split("---")[1], re.search("```python\n(.*?)```", card, re.DOTALL)[1]
        assert licence in front and f"base_model: black-forest-labs/{base}\n" in front
        assert f'transformer="black-forest-labs/{base}"' in usage and "float32" not in usage
        assert 'mllm="OpenGVLab/InternVL3-8B-hf"' in usage


# --- the LoRA ---------------------------------------------------------------------------------------------------------


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


# --- and back ---------------------------------------------------------------------------------------------------------


def contents(folder):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def same_folders(one, other):
    a, b = contents(one), contents(other)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name] == b[name], name


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--merge", "--lora-format", "comfyui"],
        ["--merge", "--lora-format", "kohya", "--dtype", "bfloat16"],
    ],
)
def test_export_import_export_is_byte_identical(home, tmp_path, flags):
    one = exporting(home / "run", tmp_path / "one", "--no-check", *flags)
    same_folders(one, exporting(one, tmp_path / "two", "--no-check", *flags))


@pytest.mark.parametrize(
    ("model", "lora"),
    [
        ({}, {"qkv": "separate", "target": ".*"}),
        ({"frozen_dtype": "int8"}, {"alpha": 3.3}),
    ],
    ids=["every layer, q k v apart", "int8 base"],
)
def test_other_loras_are_byte_identical_too(home, tmp_path, model, lora):
    if model:
        pytest.importorskip("qwix", reason="needs the `quantize` extra")
    config = small_config(home)
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, **model), lora=dataclasses.replace(config.lora, **lora)
    )
    write_weights(tmp_path / "run", *random_weights(config), jnp.float32)
    one = exporting(tmp_path / "run", tmp_path / "one", "--no-check", "--merge")
    same_folders(one, exporting(one, tmp_path / "two", "--no-check", "--merge"))
    same_leaves(tmp_path / "run", one)


def test_the_miniature_is_byte_identical_too(tmp_path):
    one = exporting("demo", tmp_path / "one", "--no-check")
    assert {path.name for path in one.iterdir() if path.is_dir()} == {"aggregator", "transformer", "vae", "mllm"}
    same_folders(one, exporting(one, tmp_path / "two", "--no-check"))
    same_leaves(DEMO / "system", one)


@pytest.mark.slow
def test_the_certificate_comes_out_the_same_again(exported, tmp_path):
    same_folders(exported, exporting(exported, tmp_path / "two", "--merge"))


def test_the_leaves_come_back_bit_for_bit(home, exported):
    same_leaves(home / "run", exported)


def same_leaves(one, other):
    wanted, found = (read_weights(folder)[1] for folder in (one, other))
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


def test_training_begins_with_an_exported_folder_a_lora_or_a_transformer(home, exported):
    config, mesh = small_config(home), make_mesh(2, 2, 2)
    _, wanted, _ = read_weights(home / "run")
    base = load_trained(home / "run").base
    for start in (exported, home / "run", exported / LORA):
        leaves = load_initial_params(start, config, base, mesh)
        expected = {name: leaf for name, leaf in wanted.items() if start.suffix == "" or name.startswith("dit.")}
        assert leaves.keys() == expected.keys()
        for name in expected:
            np.testing.assert_array_equal(leaves[name], expected[name], err_msg=name)
    assert len(jax_devices(leaves)) == 8
    whole = dataclasses.replace(config, lora=None)
    leaves = load_initial_params(home / "base", whole, base, mesh)
    assert leaves.keys() == {name for name in random_weights(whole)[1] if name.startswith("dit.")}
    cached = dataclasses.replace(config.model, dit=dataclasses.replace(config.model.dit, reference_attention="cached"))
    with pytest.raises(InputError, match="has learned joint reference attention"):
        load_initial_params(home / "run", dataclasses.replace(config, model=cached), base, mesh)


def test_unos_lora_begins_a_run_of_a_larger_rank(home, tmp_path):
    """Its layers and shared down-projections are ours; rank 2 under rank 3, and alpha = rank where ours is 2 / 3."""
    dit = random_dit()
    add_lora(dit, LoRAConfig(rank=2), rngs=nnx.Rngs(3))
    for _, linear in linears(dit):
        for part in linear.adapter.parts if linear.adapter is not None else ():
            part.up.set_value(jnp.cos(jnp.arange(part.up.size, dtype=jnp.float32)).reshape(part.up.shape))
    save_lora(tmp_path / "uno.safetensors", dit, "xlabs")
    leaves = load_initial_params(tmp_path / "uno.safetensors", small_config(home), "", make_mesh())
    for path, linear in linears(dit):
        for number, part in enumerate(linear.adapter.parts if linear.adapter is not None else ()):
            down, up = (np.asarray(leaves.pop(f"dit.{path}.adapter.parts.{number}.{half}")) for half in ("down", "up"))
            assert down.shape[-1] == 3
            assert down[..., 2].all() and not up[..., 2, :].any()  # of two zero matrices neither would ever learn
            np.testing.assert_allclose(down @ up * np.float32(2 / 3), part.matrix(), atol=1e-5, err_msg=path)
    assert not leaves
    shared = small_config(home)
    save_lora(tmp_path / "apart.safetensors", separately_adapted(), "diffusers")
    with pytest.raises(InputError, match=r"set lora\.qkv to separate"):
        load_initial_params(tmp_path / "apart.safetensors", shared, "", make_mesh())
    smaller = dataclasses.replace(shared, lora=LoRAConfig(rank=1))
    with pytest.raises(InputError, match=r"has rank 2, the config's lora\.rank is 1"):
        load_initial_params(tmp_path / "uno.safetensors", smaller, "", make_mesh())


def separately_adapted():
    dit = random_dit()
    add_lora(dit, LoRAConfig(rank=2, qkv="separate"), rngs=nnx.Rngs(3))
    for _, linear in linears(dit):
        for part in linear.adapter.parts if linear.adapter is not None else ():
            part.up.set_value(part.up[...] + 1)  # of pairs without effect it would not matter
    return dit


def jax_devices(leaves):
    return {device for leaf in leaves.values() for device in leaf.sharding.device_set}


@pytest.mark.slow
def test_a_merged_export_samples_without_its_base(home, tmp_path):
    run = tmp_path / "run"
    config, leaves = random_weights(small_config(home))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dit_weights=str(tmp_path / "base")))
    shutil.copytree(home / "base", tmp_path / "base")
    write_weights(run, config, leaves, jnp.float32)
    out = exporting(run, tmp_path / "out", "--merge", "--no-check")
    halved = exporting(run, tmp_path / "halved", "--merge", "--no-check", "--dtype", "bfloat16")
    with_base = load_trained(out)
    shutil.rmtree(tmp_path / "base")
    without = load_trained(out)
    assert {str(leaf.dtype) for leaf in parameters_by_path(load_trained(halved).system.dit).values()} == {"bfloat16"}
    assert with_base.config.lora is not None and without.config.lora is None
    x = noise_for([0], 16, 64)
    context = jnp.zeros((1, 0, 40))
    first, second = (
        nnx.jit(lambda dit: dit(x, context, jnp.ones(1) * 0.5, jnp.ones(1), target_grid=(4, 4)))(side.system.dit)
        for side in (with_base, without)
    )
    assert relative_error(second, first) < 1e-5


# --- whole or not at all ----------------------------------------------------------------------------------------------


def refused(capsys, code, arguments, *words):
    assert export.main([str(a) for a in arguments]) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Traceback" not in error
    for word in words:
        assert word in error, error


def test_what_cannot_be_exported_is_named(capsys, home, tmp_path):
    out = tmp_path / "out"
    config = small_config(home)
    (tmp_path / "unfinished" / CHECKPOINTS).mkdir(parents=True)
    write_config(tmp_path / "unfinished", config)
    refused(capsys, 2, [tmp_path / "unfinished", "--out", out], "no finished checkpoint yet")
    refused(capsys, 2, [home / "run", "--out", home / "base"], "base exists")
    refused(capsys, 2, ["demo", "--out", out, "--lora-format", "kohya"], "has no LoRA")
    refused(capsys, 2, [tmp_path / "absent", "--out", out], "absent", "config.json")
    random = dataclasses.replace(config, model=dataclasses.replace(config.model, dit_weights=None))
    write_weights(tmp_path / "random", *random_weights(random), jnp.float32)
    refused(capsys, 2, [tmp_path / "random", "--out", out], "--merge")
    cached = dataclasses.replace(config.model, dit=dataclasses.replace(config.model.dit, reference_attention="cached"))
    (tmp_path / "cached").mkdir()
    write_config(tmp_path / "cached", dataclasses.replace(config, model=cached))
    refused(capsys, 2, [tmp_path / "cached", "--out", out], "cached reference attention")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cached", "random", "unfinished"]


def test_another_base_is_refused(capsys, home, exported, tmp_path):
    folder = tmp_path / "exported"
    shutil.copytree(exported, folder)
    save_dit(tmp_path / "base", random_dit(seed=1), jnp.float32)
    text = (folder / "config.json").read_text().replace(str(home / "base"), str(tmp_path / "base"))
    (folder / "config.json").write_text(text)
    refused(capsys, 2, [folder, "--out", tmp_path / "out"], "trained on another base", "model.dit_weights")
    assert sample.main(["--prompt", "a", "--out", str(tmp_path / "x.png"), "--checkpoint", str(folder)]) == 2
    assert "another base" in capsys.readouterr().err
    assert not (tmp_path / "out.part").exists() and not (tmp_path / "out").exists()


def test_a_runs_checkpoint_exports_its_average_and_keeps_to_its_base(capsys, home, tmp_path):
    """Of a work folder: the newest step, the weights that sampling takes, and the base that the run wrote down."""
    config, average = random_weights(small_config(home))
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, ema=0.9))
    state = {"trained": {name: leaf + 1 for name, leaf in average.items()}, "average": average}
    for name, base in (("right", load_trained(home / "run").base), ("wrong", "0123456789abcdef")):
        checkpoints = Checkpoints(tmp_path / name, keep=1)
        checkpoints.save(7, state, b"{}", Saved(config, base, 1.0))
        checkpoints.wait()
        checkpoints.close()
        write_config(tmp_path / name, config)
    out = exporting(tmp_path / "right", tmp_path / "out", "--no-check")
    same_leaves(home / "run", out)
    assert json.loads((out / "export.json").read_text())["step"] == 7 and ", step 7" in (out / "README.md").read_text()
    refused(capsys, 2, [tmp_path / "wrong", "--out", tmp_path / "no"], "on another base (fingerprint 0123456789abcdef)")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "right", "wrong"]


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_leaves_nothing(tmp_path, number):
    code = (  # a shell's background job, which these tests may be, begins with SIGINT ignored
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from squeeze_jax.commands import export; sys.exit(export.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "demo", "--out", str(tmp_path / "out")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not (tmp_path / "out.part" / "export.json").exists():  # the certificate is next
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(number)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number and "Traceback" not in said
    assert not list(tmp_path.iterdir())


@contextmanager
def full_disk():
    """Files cannot grow beyond 4 KB: what the system then says comes up on the same ways as a full disk's."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(("problem", "code"), [("disk", 1), ("interrupted", 130)])
def test_an_interrupted_export_leaves_nothing(capsys, monkeypatch, home, tmp_path, problem, code):
    written = []

    def save(arrays, path, metadata=None):
        written.append(path)
        if len(written) == 2 and problem == "interrupted":
            raise KeyboardInterrupt
        with full_disk() if len(written) == 2 else nullcontext():
            write(arrays, path, metadata)

    monkeypatch.setattr(tensors, "save_file", save)
    assert export.main([str(home / "run"), "--out", str(tmp_path / "out"), "--no-check"]) == code
    assert len(written) == 2 and not list(tmp_path.iterdir())
    said = capsys.readouterr().err
    assert said == "interrupted\n" if code == 130 else said.startswith("error: ") and "(File too large)" in said, said
    assert len(said.splitlines()) == 1


write = tensors.save_file
