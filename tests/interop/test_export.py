"""What `export` writes draws the same pictures in PyTorch, and its card says what it is."""

import ast
import copy
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from exports import exporting, pictures
from PIL import Image

from squeeze_jax.checkpoints.trained import load_trained
from squeeze_jax.commands import sample
from squeeze_jax.config import (
    load_preset,
)
from squeeze_jax.data.images import resize_for_reference, to_rgb, to_uint8
from squeeze_jax.export.card import write_card
from squeeze_jax.export.certificate import relative_error, torch_pipeline
from squeeze_jax.sampling.pipeline import Pipeline, Settings
from squeeze_jax.sampling.schedule import noise_for

torch = pytest.importorskip("torch", reason="PyTorch is not installed: parity tests are skipped")
pytest.importorskip("diffusers")
pytest.importorskip("peft")
torch.set_num_threads(1)  # on matrices this small, threads wait for each other most of the time


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


def test_a_card_of_a_shipped_miniature_leaves_no_licence_open(tmp_path):
    for name, words in (("demo_weights", "own code"), ("emoji_multi_subject", "© Google LLC")):
        config = load_preset(Path(__file__).parents[2] / "configs" / f"{name}.py")
        write_card(tmp_path, config, {"base": None, "dtype": "float32", "step": 7}, None)
        card = (tmp_path / "README.md").read_text()
        assert "FILL IN" not in card and "of its publisher" not in card
        assert words in card.split("| Training data | ")[1].split("\n")[0]


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
