"""A small InternVL with random weights of every kind, as a module and as a published folder."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from squeeze_jax.interop.internvl import config_to_json, entries
from squeeze_jax.interop.mapping import export_entries, parameters_by_path
from squeeze_jax.models.internvl import InternVL, InternVLConfig, TextConfig, VisionConfig

INTERNVL = InternVLConfig(
    vision=VisionConfig(
        image_size=16, patch_size=4, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
        attention_bias=True,
    ),
    text=TextConfig(
        vocab_size=600, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=56, max_position_embeddings=128,
    ),
    image_token_id=590,
)  # fmt: skip


ORIGINAL_CONFIG = {
    "ps_version": "v2", "select_layer": -1, "downsample_ratio": 0.5, "force_image_size": 16,
    "vision_config": {
        "model_type": "intern_vit_6b", "image_size": 16, "patch_size": 4, "hidden_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 3, "intermediate_size": 40, "qkv_bias": True, "qk_normalization": False,
        "hidden_act": "gelu", "norm_type": "layer_norm", "initializer_factor": 0.1, "layer_norm_eps": 1e-6,
    },
    "llm_config": {
        "model_type": "qwen2", "vocab_size": 600, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 56, "max_position_embeddings": 128, "rope_theta": 1000000.0,
        "hidden_act": "silu", "rms_norm_eps": 1e-6,
    },
}  # fmt: skip
"""The same model's config as InternVL's own code writes it."""


def randomly(make):
    """A module with random parameters: norms around 1, kernels of scale in^-1/2, the rest of scale 0.3."""
    module, rng = nnx.eval_shape(make), np.random.default_rng(0)
    for path, leaf in parameters_by_path(module).items():
        noise = rng.standard_normal(leaf.shape) * (np.prod(leaf.shape[:-1]) ** -0.5 if path.endswith("kernel") else 0.3)
        leaf.set_value(jnp.asarray(noise + path.endswith("scale"), jnp.float32))
    return module


def random_internvl(config: InternVLConfig = INTERNVL) -> InternVL:
    return randomly(lambda: InternVL(config, rngs=nnx.Rngs(0)))


def write_internvl(folder: Path, config: InternVLConfig = INTERNVL) -> Path:
    """A transformers `-hf` folder of `random_internvl`, without a tokenizer."""
    folder.mkdir(exist_ok=True)
    tensors = export_entries(random_internvl(config), entries(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config_to_json(config)))
    return folder
