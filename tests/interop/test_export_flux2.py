"""What `export` writes of a run on FLUX.2: the same pictures in PyTorch, the same leaves back."""

import copy
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from small_dit import random_dit
from small_flux2 import CONFIG, inputs, run, run_twin
from small_run import random_weights, small_config, write_home

from squeeze_jax.checkpoints.manager import read_weights, write_weights
from squeeze_jax.checkpoints.trained import load_initial_params, load_trained
from squeeze_jax.commands import export, sample
from squeeze_jax.config import load_preset
from squeeze_jax.data.images import resize_for_reference, to_uint8
from squeeze_jax.export.card import write_card
from squeeze_jax.export.certificate import relative_error, torch_pipeline
from squeeze_jax.interop.exported import LORA
from squeeze_jax.interop.load import save_dit
from squeeze_jax.sampling.pipeline import Pipeline, Settings
from squeeze_jax.sampling.schedule import noise_for
from squeeze_jax.sharding import make_mesh

torch = pytest.importorskip("torch", reason="PyTorch is not installed: parity tests are skipped")
pytest.importorskip("diffusers")
pytest.importorskip("peft")
torch.set_num_threads(1)  # on matrices this small, threads wait for each other most of the time
CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """base, vae, mllm as published folders, and a weights folder `run`."""
    os.environ["SQUEEZE_JAX_CACHE"] = os.environ["SQUEEZE_TEST_CACHE"]
    return write_home(tmp_path_factory.mktemp("home"), CONFIG)


def exporting(checkpoint, out, *flags):
    assert export.main([str(checkpoint), "--out", str(out), *flags]) == 0
    return out


@pytest.fixture(scope="module")
def exported(home):
    return exporting(home / "run", home / "exported", "--no-check")


@pytest.fixture(scope="module")
def theirs(home, exported):
    """PyTorch's pipeline of the exported folder, on its base."""
    with torch_pipeline(exported, load_trained(home / "run")) as pipeline:
        yield pipeline


def pictures():
    rng = np.random.default_rng(1)
    return [
        Image.fromarray(rng.integers(0, 256, size, np.uint8)) for size in ((40, 64, 3), (32, 32, 3))
    ]


# --- the same pictures ----------------------------------------------------------------------------


def test_pytorch_draws_the_same(exported, theirs):
    """8 steps in all three stages, with guidance, on two references of unequal size."""
    trained = load_trained(exported)
    ours = Pipeline.of(trained.system, trained.config)
    resolved = ours.resolved(Settings())
    assert (resolved.steps, set(resolved.scales)) == (8, {2.5})
    grid = ours.config.grid(resolved.height, resolved.width)
    noise = noise_for([0], grid[0] * grid[1], CONFIG.in_channels)
    prompt, images = "a small critter on the beach, <img> and all", pictures()
    sized = [resize_for_reference(image, 32) for image in images]
    assert sized[0].shape != sized[1].shape
    latents = [ours.encoders.latents([image])[0] for image in sized]
    expected = ours.sample(ours.encoders.read([prompt], [images]), [latents], [0])
    with torch.no_grad():
        x = torch.tensor(np.array(noise))
        found = theirs(prompt, images, latents=x, output_type="latent")
        decoded = theirs.decode(found, grid)
    assert relative_error(found.numpy(), expected) <= 1e-4
    assert relative_error(expected, noise) > 0.1
    drawn = [to_uint8(x).astype(int) for x in (decoded, ours.decode(expected))]
    assert np.abs(drawn[0] - drawn[1]).max() <= 1
    assert drawn[0].std() > 5


@pytest.mark.slow
def test_the_certificate_and_the_card_say_what_was_compared(home, tmp_path):
    out = exporting(home / "run", tmp_path / "out", "--merge", "--lora-format", "ai_toolkit")
    report = json.loads((out / "parity.json").read_text())
    assert len(report["parts"]) == 6
    assert all(0 < error <= 1e-4 for error in report["parts"].values())
    assert report["whole"]["latents"] <= 1e-4 and report["whole"]["pixels"] <= 1e-3
    files = {file.relative_to(out).as_posix() for file in out.rglob("*") if file.is_file()}
    assert files == {*report["files"], "parity.json"}
    assert {name for name in files if name.endswith(".py")} == {
        "squeeze_aggregator.py", "squeeze_flux2.py", "squeeze_pipeline.py",
    }  # fmt: skip
    card = (out / "README.md").read_text()
    assert "a FLUX.2 transformer" in card and "a Flux2Transformer2DModel" in card
    assert "spelled for ai-toolkit" in card and f"{report['whole']['latents']:.1e}" in card


def test_times_are_told_in_float32_whatever_the_dtype(theirs, monkeypatch):
    """diffusers rounds them: in bfloat16 the times of two steps would be one."""
    rounded, told = copy.deepcopy(theirs.transformer).to(torch.bfloat16), []
    time_proj = rounded.time_guidance_embed.time_proj
    time_proj.register_forward_hook(lambda module, given, out: told.append(given[0]))
    monkeypatch.setattr(theirs, "transformer", rounded)
    x, context = torch.zeros(1, 4, CONFIG.in_channels), torch.zeros(2, CONFIG.context_width)
    with torch.no_grad():
        theirs.velocity(x, 0.9783, torch.zeros(4, 4), context, None)
    assert [(time.dtype, time.item()) for time in told] == [
        (torch.float32, pytest.approx(978.3, abs=1e-3))
    ]
    assert not theirs.told


@pytest.mark.parametrize("guidance", [False, True])
def test_a_velocity_is_that_of_diffusers_own_call(theirs, monkeypatch, guidance):
    """Positions by `Flux2KleinPipeline`; with `guidance` as [dev] takes it."""
    from diffusers import Flux2Transformer2DModel

    x = inputs(batch=1, config=dataclasses.replace(CONFIG, guidance=guidance))
    settings = dict(theirs.transformer.config) | {"guidance_embeds": guidance}
    twin = Flux2Transformer2DModel.from_config(settings).eval()
    twin.time_guidance_embed.time_proj.register_forward_pre_hook(
        lambda module, given: (theirs.told.pop(0),) if theirs.told else given
    )
    monkeypatch.setattr(theirs, "transformer", twin)
    monkeypatch.setitem(theirs.settings, "guidance", 1.0)
    sizes = [torch.zeros(1, 1, 2 * rows, 2 * columns) for _, (rows, columns) in x["references"]]
    tokens = torch.cat([torch.tensor(tokens) for tokens, _ in x["references"]], dim=1)
    with torch.no_grad():
        expected = run_twin(torch, twin, x).numpy()
        found = theirs.velocity(
            torch.tensor(x["target"]), float(x["t"][0]),
            theirs.positions(x["target_grid"], sizes).float(),
            torch.tensor(x["context"][0]), tokens,
        )  # fmt: skip
    assert relative_error(found.numpy(), expected) <= 1e-5
    assert np.abs(expected).max() > 0.1


def test_latents_are_normalised_as_diffusers_does(theirs):
    """As `Flux2KleinPipeline` packs and normalises what its autoencoder encodes."""
    from diffusers import Flux2KleinPipeline

    theirs.settings["reference_long_side"], longest = 64, theirs.settings["reference_long_side"]
    picture = pictures()[0].resize((64, 48))
    pixels = torch.from_numpy(np.asarray(picture, np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
    own = Flux2KleinPipeline(None, theirs.vae, None, None, None)
    with torch.no_grad():
        expected = own._encode_vae_image(pixels, generator=None)
        found = theirs.encode(picture)
    theirs.settings["reference_long_side"] = longest
    np.testing.assert_allclose(
        torch.nn.functional.pixel_unshuffle(found, 2), expected, rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(
        theirs.denormalise(found), theirs.vae.encode(pixels).latent_dist.mode().detach(),
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip


USER = """
import sys
sys.dont_write_bytecode = True
{usage}
assert picture.size == (64, 64)
assert not [name for name in sys.modules if name.split(".")[0] in ("jax", "squeeze_jax")]
"""


@pytest.mark.slow
def test_what_the_card_says_to_paste_runs_without_us(exported, tmp_path):
    usage = re.search("```python\n(.*?)```", (exported / "README.md").read_text(), re.DOTALL)
    assert usage is not None and "SqueezeFlux2Pipeline" in usage[1]
    pictures()[0].save(tmp_path / "subject.png")
    text = USER.format(usage=usage[1].replace('"."', f'"{exported}"'))
    (tmp_path / "user.py").write_text(f"import sys\nsys.path.insert(0, {str(exported)!r})\n{text}")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "user.py"], cwd=tmp_path, env=env, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert np.asarray(Image.open(tmp_path / "out.png")).std() > 5


# --- the files ------------------------------------------------------------------------------------


def test_diffusers_own_pipeline_computes_the_same_with_our_lora(home, exported):
    from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel

    twin = Flux2Transformer2DModel.from_pretrained(home / "base", torch_dtype=torch.bfloat16)
    twin, x = twin.float(), inputs()
    with torch.no_grad():
        bare = run_twin(torch, twin, x)
        own = Flux2KleinPipeline(None, None, None, None, twin)
        own.load_lora_weights(str(exported), weight_name=LORA)
        adapted = run_twin(torch, twin, x)
    assert relative_error(adapted.numpy(), run(load_trained(home / "run").system.dit, x)) < 1e-5
    assert relative_error(adapted.numpy(), bare.numpy()) > 0.1


@pytest.mark.parametrize(
    ("preset", "base", "licence", "commercial"),
    [
        ("klein_stage2", "FLUX.2-klein-base-4B", "license: apache-2.0", True),
        ("klein_stage2", "FLUX.2-klein-4B", "license: apache-2.0", True),
        ("klein_small_stage2", "FLUX.2-klein-9B", "license: other", False),
        ("klein_stage2", "FLUX.2-dev", "license: other", False),
    ],
)
def test_a_card_has_its_bases_licence(tmp_path, preset, base, licence, commercial):
    config = load_preset(CONFIGS / f"{preset}.py")
    model = dataclasses.replace(
        config.model, dit_weights=f"/mnt/{base}/transformer", autoencoder=f"/mnt/{base}/vae"
    )
    config = dataclasses.replace(config, model=model)
    write_card(tmp_path, config, {"base": None, "dtype": "float32", "step": None}, None)
    card = (tmp_path / "README.md").read_text()
    front, usage = card.split("---")[1], re.search("```python\n(.*?)```", card, re.DOTALL)[1]
    assert licence in front and f"base_model: black-forest-labs/{base}\n" in front
    assert ("license_name: flux-non-commercial-license" in front) != commercial
    assert f'transformer="black-forest-labs/{base}"' in usage and "float32" not in usage
    reader = "InternVL3-2B" if preset == "klein_small_stage2" else "InternVL3-8B"
    assert f'mllm="OpenGVLab/{reader}-hf"' in usage and "FLUX.1" not in card
    table = card.split("## Licences")[1].split("\n## ")[0]
    rows = dict(row.strip("| ").split(" | ") for row in table.splitlines()[4:] if row)
    for part in ("Base transformer", "LoRA", "Autoencoder"):
        assert ("commercial use" in rows[part]) != commercial
    distilled = 'transformer="black-forest-labs/FLUX.2-klein-4B"`, call with'
    assert (distilled in card) == (base == "FLUX.2-klein-base-4B")


# --- and back -------------------------------------------------------------------------------------


def contents(folder):
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {file.relative_to(folder): file.read_bytes() for file in files}


def test_the_leaves_come_back_bit_for_bit(home, exported):
    wanted, found = (read_weights(folder)[1] for folder in (home / "run", exported))
    assert found.keys() == wanted.keys()
    assert any("single_blocks.linear1.adapter" in name for name in wanted)
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


@pytest.mark.parametrize("qkv", ["shared", "separate"])
def test_export_import_export_is_byte_identical(home, tmp_path, qkv):
    config = small_config(home, CONFIG)
    config = dataclasses.replace(config, lora=dataclasses.replace(config.lora, qkv=qkv))
    write_weights(tmp_path / "run", *random_weights(config), jnp.float32)
    flags = ["--merge", "--lora-format", "ai_toolkit", "--no-check"]
    one = exporting(tmp_path / "run", tmp_path / "one", *flags)
    two = exporting(one, tmp_path / "two", *flags)
    assert contents(one) == contents(two)
    wanted, found = (read_weights(folder)[1] for folder in (tmp_path / "run", one))
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


def test_ai_toolkits_file_has_the_same_deltas_to_diffusers(home, tmp_path):
    """By diffusers' own translation of the other spelling."""
    from diffusers.loaders.lora_pipeline import Flux2LoraLoaderMixin

    flags = ["--lora-format", "ai_toolkit", "--no-check"]
    out = exporting(home / "run", tmp_path / "out", *flags)
    found = Flux2LoraLoaderMixin.lora_state_dict(
        str(out / "ai_toolkit"), weight_name="lora.safetensors"
    )
    wanted = load_file(out / LORA)
    assert found.keys() == wanted.keys()
    for name in {name.rsplit(".", 2)[0] for name in wanted}:
        pairs = [
            np.asarray(side[f"{name}.lora_B.weight"]) @ np.asarray(side[f"{name}.lora_A.weight"])
            for side in (found, wanted)
        ]  # alpha 2 on rank 3: in the matrices of the one, in the header of the other
        np.testing.assert_allclose(pairs[0], pairs[1] * 2 / 3, atol=1e-5, err_msg=name)


def test_training_begins_with_an_exported_folder_or_its_lora(home, exported):
    config, mesh = small_config(home, CONFIG), make_mesh()
    _, wanted, _ = read_weights(home / "run")
    base = load_trained(home / "run").base
    for start in (exported, exported / LORA):
        leaves = load_initial_params(start, config, base, mesh)
        kept = "" if start == exported else "dit."
        assert leaves.keys() == {name for name in wanted if name.startswith(kept)}
        for name, leaf in leaves.items():
            np.testing.assert_array_equal(leaf, wanted[name], err_msg=name)


@pytest.mark.slow
def test_sample_draws_from_the_exported_folder_what_it_draws_from_the_run(home, exported, tmp_path):
    pictures()[0].save(tmp_path / "subject.png")
    drawn = []
    for folder in ("run", "exported"):
        out = tmp_path / f"{folder}.png"
        arguments = ["--prompt", "a critter", "--out", out, "--steps", 2]
        arguments += ["--reference", tmp_path / "subject.png", "--checkpoint", home / folder]
        assert sample.main([str(argument) for argument in arguments]) == 0
        drawn.append(np.asarray(Image.open(out)))
    np.testing.assert_array_equal(*drawn)


# --- bad input ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flux1(tmp_path_factory):
    """FLUX.1's base, autoencoder and run."""
    return write_home(tmp_path_factory.mktemp("flux1"))


def test_pytorch_names_a_part_of_the_other_family(home, exported, flux1, theirs):
    kind, base = type(theirs), str(home / "base")
    parts = {"mllm": str(home / "mllm"), "torch_dtype": torch.float32}
    with pytest.raises(
        ValueError, match=r"transformer is of class FluxTransformer2DModel, but .* goes with"
    ):
        kind.load(str(exported), transformer=str(flux1 / "base"), vae=theirs.vae, **parts)
    with pytest.raises(
        ValueError, match=r"vae is of class AutoencoderKL, but .* AutoencoderKLFlux2"
    ):
        kind.load(str(exported), transformer=base, vae=str(flux1 / "vae"), **parts)
    with pytest.raises(ValueError, match="transformer is of class AutoencoderKLFlux2, but"):
        kind.load(str(exported), transformer=theirs.vae, vae=theirs.vae, **parts)
    with pytest.raises(ValueError, match=r"is not for SqueezePipeline; its README\.md names"):
        kind.__base__.load(str(exported), transformer=base, vae=theirs.vae, **parts)
    flux1_export = exporting(flux1 / "run", flux1 / "exported", "--no-check")
    with pytest.raises(ValueError, match="is not for SqueezeFlux2Pipeline"):
        kind.load(str(flux1_export), transformer=base, vae=theirs.vae, **parts)
    with pytest.raises(ValueError, match="transformer is of class Flux2Transformer2DModel, but"):
        kind.__base__.load(str(flux1_export), transformer=base, vae=theirs.vae, **parts)


def refused(capsys, arguments, *words):
    assert export.main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and len(error.splitlines()) == 1
    for word in words:
        assert word in error, error


def test_what_cannot_be_exported_is_named(capsys, home, exported, flux1, tmp_path):
    config = small_config(home, CONFIG)
    mixed = dataclasses.replace(config.model, autoencoder=str(flux1 / "vae"))
    weights = random_weights(dataclasses.replace(config, model=mixed))
    write_weights(tmp_path / "mixed", *weights, jnp.float32)
    words = f"{flux1 / 'vae'} is FLUX.1's autoencoder", "model.dit is FLUX.2's"
    refused(capsys, [tmp_path / "mixed", "--out", tmp_path / "out"], *words)
    save_dit(tmp_path / "base", random_dit(), jnp.float32)
    other = dataclasses.replace(config.model, dit_weights=str(tmp_path / "base"))
    weights = random_weights(dataclasses.replace(config, model=other))
    write_weights(tmp_path / "other", *weights, jnp.float32)
    words = "holds a FLUX.1 transformer", "model.dit is FLUX.2's"
    refused(capsys, [tmp_path / "other", "--out", tmp_path / "out"], *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "mixed", "other"]
