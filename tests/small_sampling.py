"""A small system with random weights for tests of sampling, and pipelines of it that begin behind the encoders."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx
from tiny import tiny_config

from squeeze_jax.checkpoints.build import build_system
from squeeze_jax.data.feature_extractor import FeatureExtractor
from squeeze_jax.models.system import System


def random_system(config) -> System:
    """Every parameter random, as `tiny.randomised`, but without compiling an initialisation."""
    system, rng = nnx.eval_shape(lambda: build_system(config)), np.random.default_rng(0)
    flat = nnx.to_flat_state(nnx.state(system, nnx.Param))
    for path, leaf in flat:
        matrix = path[-1] == "kernel"
        around = 1.0 if path[-1] == "scale" and path[0] == "dit" else 0.0
        noise = rng.standard_normal(leaf.shape) * (leaf.shape[-2] ** -0.5 if matrix else 0.2)
        leaf.set_value(jnp.asarray(around + noise, leaf.dtype))
    nnx.update(system, nnx.from_flat_state(flat))
    return system


CONFIG = tiny_config()
CACHED = dataclasses.replace(
    CONFIG,
    model=dataclasses.replace(CONFIG.model, dit=dataclasses.replace(CONFIG.model.dit, reference_attention="cached")),
)
NO_ENCODERS = object.__new__(FeatureExtractor)  # `sample` starts behind them


def some_latents(*sizes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((height, width, 16)).astype(np.float32) for height, width in sizes]
