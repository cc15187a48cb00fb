"""The smallest system that has every part, with random weights everywhere, and batches for it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from squeeze_jax.batch import HiddenStates, References, TrainingBatch
from squeeze_jax.checkpoints.build import build_system
from squeeze_jax.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    SamplingConfig,
    StageConfig,
    TrainingConfig,
)
from squeeze_jax.diffusion.latents import reference_positions
from squeeze_jax.models.aggregator import AggregatorConfig
from squeeze_jax.models.dit import DiTConfig

LAYERS, WIDTH = 3, 16
STAGE = StageConfig(steps=4, references=True)


def tiny_config(**changes) -> Config:
    """2 heads x 8, one block of each kind, 32x32 pictures (2x2 tokens), everything trained."""
    config = Config(
        name="tiny",
        model=ModelConfig(
            dit=DiTConfig(
                context_width=24, pooled_width=8, heads=2, head_width=8,
                num_double_blocks=1, num_single_blocks=2,
                rope_axes=(2, 2, 4),
            ),
            dtype="float32",
            frozen_dtype="float32",
        ),
        aggregator=AggregatorConfig(
            layers=tuple(range(LAYERS)), width=WIDTH, out_width=24, heads=2, mlp_width=24, refiner_blocks=1
        ),
        lora=None,
        data=DataConfig(height=32, width=32, reference_long_side=32, batch_per_chip=4),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2, ema=0.9),
        training=TrainingConfig(stages=(STAGE,)),
        sampling=SamplingConfig(steps=6, tau1=0.9, tau2=0.5),
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


def randomised(config: Config, seed: int = 0):
    """The config's system with every parameter random: gates, biases and norms included."""
    system, rng = build_system(config), np.random.default_rng(seed)
    for path, leaf in nnx.to_flat_state(nnx.state(system, nnx.Param)):
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        vector = path[-1] not in ("kernel", "down", "up")
        around = 1.0 if path[-1] == "scale" and path[0] == "dit" else 0.0
        leaf.set_value(jnp.asarray(around + noise * (0.2 if vector else leaf.shape[-2] ** -0.5), leaf.dtype))
    return system


def tiny_batch(rows: int = 4, text: int = 5, images: int = 3, references: int = 6, seed: int = 0, mixed: bool = True):
    """Random records; `mixed` gives every row its own number of valid tokens, with large numbers in the padding."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    def mask(length, least):
        valid = rng.integers(least, length + 1, rows) if mixed else np.full(rows, length)
        return np.arange(length)[None] < valid[:, None]

    text_mask, image_mask, reference_mask = mask(text, 2), mask(images, 0), mask(references, 0)
    states = [normal(rows, LAYERS, length, WIDTH) for length in (text, images)]
    for values, valid in zip(states, (text_mask, image_mask)):
        values[~np.broadcast_to(valid[:, None], values.shape[:3])] = 1e2
    tokens = normal(rows, references, 64)
    tokens[~reference_mask] = 1e2
    positions = np.tile(reference_positions((2, 2), [(2, 3)])[:references], (rows, 1, 1))
    place = np.arange(text + images, dtype=np.int32)
    return TrainingBatch(
        normal(rows, 4, 64),
        HiddenStates(
            states[0], text_mask, np.tile(place[images:], (rows, 1)),
            states[1], image_mask, np.tile(place[:images], (rows, 1)),
        ),
        References(tokens, reference_mask, positions),
        np.arange(rows, dtype=np.int32),
    )  # fmt: skip


def row(tree, i: int):
    """One row of a batch, as a batch of one."""
    return jax.tree.map(lambda x: x[i : i + 1], tree)
