"""A small checkpoint of every part with random weights: base, autoencoder, MLLM and a run."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from qwen_like import qwen_like
from small_dit import CONFIG as DIT
from small_dit import random_dit
from small_flux2 import random_flux2
from small_internvl import INTERNVL, randomly, write_internvl

from squeeze_jax.checkpoints.build import build_system, is_trained
from squeeze_jax.checkpoints.manager import write_weights
from squeeze_jax.config import (
    Config,
    DataConfig,
    ModelConfig,
    SamplingConfig,
    StageConfig,
    TrainingConfig,
)
from squeeze_jax.data.chat import IMAGE
from squeeze_jax.interop.load import autoencoder_format, autoencoder_of, save_dit
from squeeze_jax.layers.lora import LoRAConfig
from squeeze_jax.models.aggregator import AggregatorConfig
from squeeze_jax.models.autoencoder import AutoencoderConfig
from squeeze_jax.models.dit import DiTConfig
from squeeze_jax.models.flux2 import Flux2Config
from squeeze_jax.models.flux2_autoencoder import Flux2AutoencoderConfig


def small_config(home: Path, dit: DiTConfig | Flux2Config = DIT) -> Config:
    """Every part with random weights: 64x64 pictures are 4x4 tokens, references at most 32 pixels.

    The base is kept in bfloat16, as real runs do, though its file is float32.
    """
    return Config(
        name="small",
        model=ModelConfig(
            dit=dit, dit_weights=str(home / "base"), autoencoder=str(home / "vae"),
            mllm=str(home / "mllm"), dtype="float32", frozen_dtype="bfloat16",
        ),
        aggregator=AggregatorConfig(
            layers=(0, 1, 3), width=48, out_width=40, heads=4, mlp_width=40, refiner_blocks=1
        ),
        lora=LoRAConfig(rank=3, alpha=2.0),
        data=DataConfig(height=64, width=64, reference_long_side=32),
        training=TrainingConfig(stages=(StageConfig(steps=1, references=True),)),
        sampling=SamplingConfig(steps=8, tau1=0.9, tau2=0.5),
    )  # fmt: skip


def write_home(home: Path, dit: DiTConfig | Flux2Config = DIT) -> Path:
    """base, vae, mllm as published folders, and a weights folder `run`."""
    base = random_flux2(dit) if isinstance(dit, Flux2Config) else random_dit(dit)
    save_dit(home / "base", base, jnp.float32)
    sizes = {"block_out_channels": (8, 16, 16, 24), "norm_groups": 4}
    small = AutoencoderConfig(**sizes)
    if isinstance(dit, Flux2Config):
        small = Flux2AutoencoderConfig(latent_channels=dit.in_channels // 4, **sizes)
    autoencoder = randomly(lambda: autoencoder_of(small)(small, rngs=nnx.Rngs(0)))
    if isinstance(dit, Flux2Config):
        variance = np.random.default_rng(1).uniform(0.3, 3.0, dit.in_channels)
        autoencoder.bn.running_var.set_value(jnp.asarray(variance, jnp.float32))
    autoencoder_format(small).save_autoencoder(autoencoder, home / "vae")
    tokenizer = qwen_like()
    write_internvl(
        home / "mllm", dataclasses.replace(INTERNVL, image_token_id=tokenizer.token_to_id(IMAGE))
    )
    tokenizer.save(str(home / "mllm" / "tokenizer.json"))
    write_weights(home / "run", *random_weights(small_config(home, dit)), jnp.float32)
    return home


def random_weights(config: Config):
    """A config and random trained leaves: gates, norms and both LoRA matrices clearly not zero."""
    shapes = nnx.eval_shape(lambda: build_system(config, with_base=False))
    rng, leaves = np.random.default_rng(0), {}
    for path, leaf in nnx.to_flat_state(nnx.state(shapes, is_trained(config))):
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        matrix = path[-1] in ("kernel", "down", "up")
        around = 1.0 if path[-1] == "scale" and path[0] == "dit" else 0.0
        spread = leaf.shape[-2] ** -0.5 if matrix else 0.2
        leaves[".".join(map(str, path))] = np.float32(around) + noise * np.float32(spread)
    return config, leaves
