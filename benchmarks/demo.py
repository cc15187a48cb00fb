"""The miniature's train step and sampler, on this machine's CPUs.

    python benchmarks/demo.py
"""

import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from flax import nnx

from squeeze_jax.batch import HiddenStates, References, TrainingBatch
from squeeze_jax.checkpoints.build import build_system
from squeeze_jax.config import Config, load_preset
from squeeze_jax.diffusion.latents import reference_positions
from squeeze_jax.sampling.sampler import make_sampler
from squeeze_jax.sampling.schedule import make_schedule, noise_for
from squeeze_jax.training.optimizer import make_optimizer
from squeeze_jax.training.state import initial_state, split_system
from squeeze_jax.training.step import make_train_step

TEXT, IMAGE = 26, 4


def random_batch(config: Config, rows: int) -> TrainingBatch:
    """Records of the miniature's sizes with random values: one reference, as large as the target."""
    layers, width = len(config.aggregator.layers), config.aggregator.width
    grid, channels = config.target_grid, config.model.dit.in_channels
    tokens = grid[0] * grid[1]
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    def positions(first, count):
        return np.tile(np.arange(first, first + count, dtype=np.int32), (rows, 1))

    references = np.tile(reference_positions(grid, [grid]), (rows, 1, 1))
    return TrainingBatch(
        normal(rows, tokens, channels),
        HiddenStates(
            normal(rows, layers, TEXT, width), np.ones((rows, TEXT), bool), positions(0, TEXT),
            normal(rows, layers, IMAGE, width), np.ones((rows, IMAGE), bool), positions(TEXT, IMAGE),
        ),
        References(normal(rows, tokens, channels), np.ones((rows, tokens), bool), references),
        np.arange(rows, dtype=np.int32),
    )  # fmt: skip


def median(function, rounds: int) -> float:
    function()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    config = load_preset(Path(__file__).parent.parent / "configs" / "demo_weights.py")
    system = build_system(config)
    graph, leaves = nnx.split(system)
    trained, split = split_system(system, config)
    optimizer = make_optimizer(config)
    batch = random_batch(config, config.data.batch_per_chip)
    print(f"{sum(x.size for x in trained.values()):,} values, batch {config.data.batch_per_chip}, float32")
    print("| | ms | |\n|---|---|---|")
    for number, stage in enumerate(config.training.stages, 1):
        step = make_train_step(split, optimizer, config, stage)
        state = [initial_state(jax.tree.map(jax.numpy.copy, trained), optimizer, config)]

        def train(step=step, state=state):
            state[0], metrics = step(state[0], split.frozen, batch)
            jax.block_until_ready(metrics)

        seconds = median(train, 7)
        speed = config.data.batch_per_chip / seconds
        print(f"| train step, stage {number} | {1000 * seconds:.0f} | {speed:.0f} examples/s |")
    tokens = batch.target.shape[1]
    one = jax.tree.map(lambda x: x[:1], batch)
    program = make_sampler(graph, target_grid=config.target_grid, guided=(True,) * 3, guidance=1.0)
    own = config.sampling
    for name, tau1, tau2 in (("the demo's τ", own.tau1, own.tau2), ("both throughout", 1.1, 0.0)):
        schedule = make_schedule(config.sampling.steps, tokens, tau1, tau2, references=True)
        for images in (1, 16):
            noise = noise_for(list(range(images)), tokens, config.model.dit.in_channels)

            def sample(noise=noise, schedule=schedule):
                scale = np.full(3, config.sampling.cfg_scale, np.float32)
                jax.block_until_ready(program((leaves,), noise, one.hidden_states, one.references, schedule, scale))

            seconds = median(sample, 5)
            steps = config.sampling.steps
            figures = f"{1000 * seconds / steps:.1f} | {seconds:.2f} s for {steps} steps"
            print(f"| sampler step, {images} images, {name} | {figures} |")


if __name__ == "__main__":
    main()
