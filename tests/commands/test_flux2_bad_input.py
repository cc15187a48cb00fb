"""Files of another model under the presets of FLUX.2 [klein] 4B: what is found and expected."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from squeeze_jax.commands import extract, train
from squeeze_jax.interop import autoencoder as flux1_autoencoder
from squeeze_jax.interop import flux2_autoencoder
from squeeze_jax.interop.formats import format_of
from squeeze_jax.models.autoencoder import AutoencoderConfig
from squeeze_jax.models.dit import DiTConfig
from squeeze_jax.models.flux2 import Flux2Config
from squeeze_jax.models.flux2_autoencoder import Flux2AutoencoderConfig

ROOT = Path(__file__).parents[2]
KLEIN_9B = Flux2Config(context_width=12288, heads=32, num_double_blocks=8, num_single_blocks=24)
FLUX2_DEV = Flux2Config(
    context_width=15360, heads=48, num_double_blocks=8, num_single_blocks=48, guidance=True
)
SHORT = dataclasses.replace(Flux2Config(), num_single_blocks=1)


def write(folder, values):
    """A folder with the config.json of a published one; its weights are not looked at."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(values))
    save_file({"x": np.zeros(1, np.float32)}, folder / "diffusion_pytorch_model.safetensors")
    return folder


def refused(capsys, main, *arguments):
    """What a command says in one line on stderr as it ends with code 2."""
    assert main([str(a) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error.removeprefix("error: ").strip()


def refuse_weights(capsys, folder, preset, found):
    """What `train.py` says of a transformer of these sizes under a preset; it writes nothing."""
    weights = write(folder / "weights" / "transformer", format_of(found).config_to_json(found))
    preset, run = ROOT / "configs" / f"{preset}.py", folder / "run"
    error = refused(capsys, train.main, preset, "--model.dit-weights", weights, "--workdir", run)
    assert not run.exists()
    return error.replace(str(weights), "FOLDER")


@pytest.mark.parametrize(
    ("found", "preset", "said"),
    [
        (
            KLEIN_9B,
            "klein_stage1",
            "FOLDER holds FLUX.2 [klein] 9B (context_width=12288, heads=32, num_double_blocks=8, "
            "num_single_blocks=24), but model.dit is FLUX.2 [klein] 4B (context_width=7680, "
            "heads=24, num_double_blocks=5, num_single_blocks=20); make them equal",
        ),
        (
            FLUX2_DEV,
            "klein_small_stage2",
            "FOLDER holds FLUX.2-dev (context_width=15360, heads=48, num_double_blocks=8, "
            "num_single_blocks=48, guidance=True), but model.dit is FLUX.2 [klein] 4B "
            "(context_width=7680, heads=24, num_double_blocks=5, num_single_blocks=20, "
            "guidance=False); make them equal",
        ),
        (
            SHORT,
            "klein_multi_subject",
            "FOLDER holds a FLUX.2 transformer (num_single_blocks=1), but model.dit is "
            "FLUX.2 [klein] 4B (num_single_blocks=20); make them equal",
        ),
        (
            DiTConfig(),
            "klein_stage2",
            "FOLDER holds a FLUX.1 transformer, but model.dit is FLUX.2's; give the other",
        ),
        (
            Flux2Config(),
            "flux_stage2",
            "FOLDER holds a FLUX.2 transformer, but model.dit is FLUX.1's; give the other",
        ),
        (
            DiTConfig(guidance=False),
            "flux_stage2",
            "FOLDER holds FLUX.1-schnell (guidance=False), but model.dit is FLUX.1-dev "
            "(guidance=True); make them equal",
        ),
    ],
)
def test_another_transformer_is_named(capsys, tmp_path, found, preset, said):
    assert refuse_weights(capsys, tmp_path, preset, found) == said


def test_sizes_are_compared_without_how_references_are_seen(capsys, tmp_path):
    found = dataclasses.replace(KLEIN_9B, reference_attention="cached")
    assert "holds FLUX.2 [klein] 9B (context" in refuse_weights(
        capsys, tmp_path, "klein_stage1", found
    )


@pytest.mark.parametrize(
    ("name", "warned"),
    [("FLUX.2-klein-4B", True), ("FLUX.2-klein-9B", True), ("FLUX.2-klein-base-4B", False)],
)
def test_training_on_a_distilled_model_is_warned_of(capsys, tmp_path, name, warned):
    """The folder's name tells, not its files. Training would go on: other sizes end it here."""
    weights = write(tmp_path / name / "transformer", format_of(SHORT).config_to_json(SHORT))
    assert (
        train.main([str(ROOT / "configs" / "klein_stage1.py"), "--model.dit-weights", str(weights)])
        == 2
    )
    told = f"warning: {name} is distilled to 4 steps and not made for training; take its base"
    assert (told in capsys.readouterr().out) == warned


@pytest.mark.parametrize(
    ("preset", "values", "said"),
    [
        (
            "klein_small_stage2",
            flux1_autoencoder.config_to_json(AutoencoderConfig()),
            "is FLUX.1's autoencoder, but model.dit is FLUX.2's; give FLUX.2's autoencoder",
        ),
        (
            "flux_stage2",
            flux2_autoencoder.config_to_json(Flux2AutoencoderConfig()),
            "is FLUX.2's autoencoder, but model.dit is FLUX.1's; give FLUX.1's autoencoder",
        ),
    ],
)
def test_an_autoencoder_of_the_other_family_is_named(capsys, tmp_path, preset, values, said):
    """Before the MLLM is loaded: here there is an empty folder in its place."""
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "cat.png")
    row = {"prompt": "a cat", "image_paths": ["cat.png"], "image_tgt_path": "cat.png"}
    (tmp_path / "pairs.json").write_text(json.dumps([row] * 2))
    (tmp_path / "mllm").mkdir()
    config, out = tmp_path / f"{preset}.py", tmp_path / "features"
    config.write_text(
        "import dataclasses\nfrom squeeze_jax.config import load_preset\n"
        f"config = load_preset({str(ROOT / 'configs' / f'{preset}.py')!r})\n"
        f"autoencoder = {str(write(tmp_path / 'vae', values))!r}\nmllm = {str(tmp_path / 'mllm')!r}\n"
        "model = dataclasses.replace(config.model, autoencoder=autoencoder, mllm=mllm)\n"
        "config = dataclasses.replace(config, model=model)\n"
    )
    error = refused(capsys, extract.main, tmp_path / "pairs.json", "--out", out, "--config", config)
    assert error == f"{tmp_path / 'vae'} {said}"
    assert not out.exists()
