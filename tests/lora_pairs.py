"""Pairs of a LoRA file, and what an adapter adds to each tensor of a checkpoint."""

import numpy as np
from safetensors.numpy import save_file
from small_dit import CONFIG, random_dit

from squeeze_jax.interop.flux import diffusers_entries, original_entries
from squeeze_jax.interop.mapping import export_entries
from squeeze_jax.layers.lora import linears, merge_lora

WIDTH = CONFIG.width
A, B, DOWN, UP = "lora_A.weight", "lora_B.weight", "lora_down.weight", "lora_up.weight"


def weights(dit, names="diffusers"):
    table = diffusers_entries if names == "diffusers" else original_entries
    return export_entries(dit, table(dit.config))


def deltas(dit, names="diffusers"):
    """What the adapters add to each tensor of a checkpoint; tensors that they leave alone are not in it."""
    base = random_dit()
    before, after = weights(base, names), {}
    for path, linear in linears(base):
        linear.adapter = dict(linears(dit))[path].adapter
    merge_lora(base)
    after = weights(base, names)
    return {name: after[name] - before[name] for name in before if not np.array_equal(after[name], before[name])}


def pair(rng, rank, fan_in, fan_out):
    return rng.standard_normal((rank, fan_in)).astype(np.float32), rng.standard_normal((fan_out, rank)).astype(np.float32)


def write(path, tensors, **metadata):
    save_file({name: np.asarray(tensor, np.float32) for name, tensor in tensors.items()}, path, metadata or None)
    return path
