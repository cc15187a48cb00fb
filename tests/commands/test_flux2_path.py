"""FLUX.2 as a user runs it: extract, train both stages over a frozen base, sample; the wrong files are named."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from small_dit import random_dit
from small_flux2 import random_flux2
from small_internvl import randomly

from squeeze_jax.interop import autoencoder as flux1_format
from squeeze_jax.interop import flux2_autoencoder
from squeeze_jax.interop.load import WEIGHTS, save_dit
from squeeze_jax.interop.tensors import write_json, write_tensors
from squeeze_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from squeeze_jax.models.dit import DiTConfig
from squeeze_jax.models.flux2 import Flux2Config
from squeeze_jax.models.flux2_autoencoder import Flux2Autoencoder, Flux2AutoencoderConfig

ROOT = Path(__file__).parents[2]
DIT = Flux2Config(
    in_channels=32, context_width=32, heads=2, head_width=16, num_double_blocks=1, num_single_blocks=1,
    mlp_ratio=2.0, rope_axes=(4, 4, 4, 4),
)  # fmt: skip
SIZES = {"latent_channels": 8, "block_out_channels": (8, 8, 8), "norm_groups": 4}
PRESET = f"""
from squeeze_jax.config import *
from squeeze_jax.layers.lora import LoRAConfig
from squeeze_jax.models.aggregator import AggregatorConfig
from squeeze_jax.models.flux2 import Flux2Config

config = Config(
    name="small_klein",
    model=ModelConfig(
        dit={DIT!r}, dit_weights="transformer", autoencoder="vae",
        latent_pixels=4, dtype="float32", frozen_dtype="float32",
    ),
    aggregator=AggregatorConfig(
        layers=tuple(range(5)), width=128, out_width=32, heads=4, mlp_width=32, refiner_blocks=1
    ),
    lora=LoRAConfig(rank=2),
    data=DataConfig(
        height=64, width=64, reference_long_side=64, batch_per_chip=4,
        critters=CrittersConfig(train=8, held_out=4),
    ),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=2),
    training=TrainingConfig(
        stages=(StageConfig(steps=2, references=False), StageConfig(steps=3, references=True)),
        validate_every=5, sample_every=0,
    ),
    sampling=SamplingConfig(steps=3, tau1=0.9, tau2=0.8, cfg_scale=2.0),
    log=LogConfig(every=1, tensorboard=False, grid=2),
)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("klein")
    save_dit(folder / "transformer", random_flux2(DIT), jnp.float32)
    vae = randomly(lambda: Flux2Autoencoder(Flux2AutoencoderConfig(**SIZES), rngs=nnx.Rngs(0)))
    vae.bn.running_var.set_value(jnp.abs(vae.bn.running_var[...]) + 0.5)
    write_tensors(folder / "vae" / WEIGHTS, flux2_autoencoder.export_autoencoder(vae))
    write_json(folder / "vae" / "config.json", flux2_autoencoder.config_to_json(vae.config))
    flux1 = DiTConfig(in_channels=32, context_width=32, pooled_width=8, heads=2, head_width=16,
                      num_double_blocks=1, num_single_blocks=1, rope_axes=(4, 6, 6), guidance=False)  # fmt: skip
    save_dit(folder / "flux1", random_dit(flux1), jnp.float32)
    of_flux1 = randomly(lambda: Autoencoder(AutoencoderConfig(**SIZES), rngs=nnx.Rngs(0)))
    flux1_format.save_autoencoder(of_flux1, folder / "flux1_vae")
    (folder / "preset.py").write_text(PRESET)
    return folder


def run(folder, script, *arguments):
    flags = "--xla_llvm_disable_expensive_passes=true --xla_backend_optimization_level=0"
    changes = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    return subprocess.run(
        command, cwd=folder, env=os.environ | changes, capture_output=True, text=True, check=False
    )


@pytest.mark.telling
@pytest.mark.slow
def test_it_trains_both_stages_and_draws(folder):
    ran = run(folder, "train.py", "preset.py", "--workdir", "run")
    assert ran.returncode == 0, ran.stderr[-2000:]
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 5 and np.isfinite(losses).all()
    asked = ("--checkpoint", "run", "--prompt", "a critter on the beach", "--out", "out.png")
    drawn = run(folder, "sample.py", *asked, "--reference", ROOT / "squeeze_jax/demo/references/critter-0.png")
    assert drawn.returncode == 0, drawn.stderr[-2000:]
    with Image.open(folder / "out.png") as picture:
        assert picture.size == (64, 64)
        assert np.asarray(picture).std() > 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "given", "words"),
    [
        ("--model.dit-weights", "flux1", "flux1 holds a FLUX.1 transformer, but model.dit is FLUX.2's"),
        ("--model.autoencoder", "flux1_vae", "flux1_vae is FLUX.1's autoencoder, but model.dit is FLUX.2's"),
    ],
)
def test_files_of_the_other_family_are_named(folder, flag, given, words):
    ran = run(folder, "train.py", "preset.py", "--workdir", f"not_{given}", flag, given)
    assert ran.returncode == 2, ran.stderr[-2000:]
    assert words in ran.stderr
