"""A small FLUX, ours beside diffusers' in one run on the same threads: forward, and gradients of all parameters.

    python benchmarks/flux_small.py            (needs the `parity` extra)

2 double + 4 single blocks, 4 heads x 64, joint width 256, pooled 64, RoPE (16, 24, 24), guidance on, 256 image + 128
context tokens, batch 4, float32. Medians of interleaved rounds, so that both meet the same machine.
"""

import os
import statistics
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from squeeze_jax.diffusion.latents import grid_positions
from squeeze_jax.interop.flux import config_to_json, diffusers_entries
from squeeze_jax.interop.mapping import load_entries
from squeeze_jax.models.dit import DiT, DiTConfig

CONFIG = DiTConfig(
    context_width=256, pooled_width=64, heads=4, head_width=64,
    num_double_blocks=2, num_single_blocks=4, rope_axes=(16, 24, 24)
)
BATCH, GRID, CONTEXT, ROUNDS = 4, (16, 16), 128, 15


def main() -> None:
    torch.set_num_threads(os.cpu_count() or 1)
    twin = diffusers.FluxTransformer2DModel(**{k: v for k, v in config_to_json(CONFIG).items() if k[0] != "_"})
    weights = {name: tensor.detach().numpy() for name, tensor in twin.state_dict().items()}
    dit = DiT(CONFIG, unroll=4, rngs=nnx.Rngs(0))
    load_entries(dit, diffusers_entries(CONFIG), weights)
    rng = np.random.default_rng(0)
    shapes = ((BATCH, GRID[0] * GRID[1], 64), (BATCH, CONTEXT, 256), (BATCH, 64), (BATCH, GRID[0] * GRID[1], 64))
    target, context, pooled, truth = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    t, guidance = np.linspace(0.2, 0.8, BATCH).astype(np.float32), np.full(BATCH, 3.5, np.float32)
    ids = torch.from_numpy(np.pad(grid_positions(*GRID), ((0, 0), (1, 0))).astype(np.float32))
    ours_in = tuple(map(jnp.asarray, (target, context, t, guidance, pooled)))
    theirs_in = {
        "hidden_states": torch.from_numpy(target),
        "encoder_hidden_states": torch.from_numpy(context),
        "timestep": torch.from_numpy(t),
        "guidance": torch.from_numpy(guidance),
        "pooled_projections": torch.from_numpy(pooled),
        "img_ids": ids,
        "txt_ids": torch.zeros(CONTEXT, 3),
    }
    graph, leaves = nnx.split(dit)

    def velocity(leaves):
        *arrays, pooled = ours_in
        return nnx.merge(graph, leaves)(*arrays, pooled=pooled, target_grid=GRID)

    forward = jax.jit(velocity)
    gradient = jax.jit(jax.value_and_grad(lambda leaves: jnp.mean(jnp.square(velocity(leaves) - truth))))

    def their_forward():
        with torch.no_grad():
            return twin(**theirs_in).sample

    def their_gradient():
        twin.zero_grad()
        torch.mean(torch.square(twin(**theirs_in).sample - torch.from_numpy(truth))).backward()

    difference = np.linalg.norm(forward(leaves) - their_forward().numpy()) / np.linalg.norm(their_forward().numpy())
    print(f"{sum(x.size for x in jax.tree.leaves(leaves)):,} parameters; outputs differ by {difference:.1e} (relative)")
    print("| | ours ms | diffusers eager ms | ratio |\n|---|---|---|---|")
    for name, ours, theirs in (
        ("forward", lambda: jax.block_until_ready(forward(leaves)), their_forward),
        ("train (MSE and gradients)", lambda: jax.block_until_ready(gradient(leaves)), their_gradient),
    ):
        ours(), theirs()
        times = {"ours": [], "theirs": []}
        for _ in range(ROUNDS):
            for who, function in (("ours", ours), ("theirs", theirs)):
                start = time.perf_counter()
                function()
                times[who].append(1000 * (time.perf_counter() - start))
        a, b = statistics.median(times["ours"]), statistics.median(times["theirs"])
        print(f"| {name} | {a:.0f} | {b:.0f} | {a / b:.2f} |", flush=True)


if __name__ == "__main__":
    main()
