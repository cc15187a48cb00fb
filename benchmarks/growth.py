"""What a train step costs as one thing grows: tokens, references, layers that are read, rank, examples, depth.

    python benchmarks/growth.py

A small stage 2 (joint width 256, 2 + 4 blocks, DLA over 29 layers, LoRA of rank 32, float32) on random features; one
thing is changed at a time. Beside the seconds (least of interleaved rounds) stand the model FLOPs, counted from the
traced program (`planning/flops.py`): time should grow as they do, and no faster. Compiling should not take longer
for more blocks: they are one scan.
"""

import argparse
import dataclasses
import os
import time
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from squeeze_jax.checkpoints.build import build_system
from squeeze_jax.config import (
    Config,
    DataConfig,
    ModelConfig,
    StageConfig,
    TrainingConfig,
)
from squeeze_jax.layers.lora import LoRAConfig
from squeeze_jax.models.aggregator import AggregatorConfig
from squeeze_jax.models.dit import DiTConfig
from squeeze_jax.planning.train_program import abstract_batch, step_flops
from squeeze_jax.training.optimizer import make_optimizer
from squeeze_jax.training.state import initial_state, split_system
from squeeze_jax.training.step import make_train_step

STAGE = StageConfig(steps=1_000, references=True)
BASE = Config(
    name="growth",
    model=ModelConfig(
        dit=DiTConfig(
            context_width=256, pooled_width=64, heads=4, head_width=64,
            num_double_blocks=2, num_single_blocks=4, rope_axes=(16, 24, 24),
        ),
        dtype="float32",
        frozen_dtype="float32",
    ),
    aggregator=AggregatorConfig(
        layers=tuple(range(29)), width=256, out_width=256, heads=4, mlp_width=512, layer_blocks=2, refiner_blocks=2
    ),
    lora=LoRAConfig(rank=32),
    data=DataConfig(features="random", height=256, width=256, reference_long_side=256, max_text_tokens=64),
    training=TrainingConfig(stages=(STAGE,)),
)  # fmt: skip


def changed(section: str, **values: Any) -> Config:
    return dataclasses.replace(BASE, **{section: dataclasses.replace(getattr(BASE, section), **values)})


def deeper(blocks: int) -> Config:
    return changed("model", dit=dataclasses.replace(BASE.model.dit, num_single_blocks=blocks))


# What grows → the base's value, and (value, config, examples, references) of each row.
GROWTH: dict[str, tuple[int, list[tuple[int, Config, int, int]]]] = {
    "target tokens": (
        256,
        [((side // 16) ** 2, changed("data", height=side, width=side), 2, 1) for side in (128, 256, 384, 512)],
    ),
    "references": (1, [(n, BASE, 2, n) for n in (1, 2, 4, 8)]),
    "layers read": (29, [(n, changed("aggregator", layers=tuple(range(n))), 2, 1) for n in (1, 8, 15, 29)]),
    "rank": (32, [(n, changed("lora", rank=n), 2, 1) for n in (8, 32, 128, 256)]),
    "examples": (2, [(n, BASE, n, 1) for n in (1, 2, 4, 8)]),
    "single blocks": (4, [(n, deeper(n), 2, 1) for n in (4, 8, 16, 32)]),
}


class Step:
    """A compiled step, its state, and how long compiling took."""

    def __init__(self, config: Config, rows: int, references: int) -> None:
        rng = np.random.default_rng(0)

        def fill(x: jax.ShapeDtypeStruct) -> jax.Array:
            if x.dtype == jnp.bool_:
                return jnp.ones(x.shape, bool)
            if x.dtype == jnp.int32:  # positions, counted along the tokens
                count = np.arange(x.shape[min(1, len(x.shape) - 1)])
                return jnp.broadcast_to(count.reshape(-1, *[1] * (len(x.shape) - 2)), x.shape)
            return jnp.asarray(rng.standard_normal(x.shape, np.float32), x.dtype)

        self.batch = jax.tree.map(fill, abstract_batch(config, rows, references))
        params, split = split_system(build_system(config), config)
        optimizer = make_optimizer(config)
        self.state, self.frozen = initial_state(params, optimizer, config), split.frozen
        step = make_train_step(split, optimizer, config, STAGE)
        began = time.perf_counter()
        self.run: Any = step.lower(self.state, self.frozen, self.batch).compile()  # pyright: ignore[reportFunctionMemberAccess]
        self.compiled = time.perf_counter() - began
        self.gflop = step_flops(config, STAGE, rows, references) / 1e9

    def seconds(self) -> float:
        began = time.perf_counter()
        self.state, metrics = self.run(self.state, self.frozen, self.batch)
        jax.block_until_ready(metrics)
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=list(GROWTH), choices=list(GROWTH))
    given = parser.parse_args()
    print("| | value | s a step | of the base's | GFLOP | of the base's | compiled in, s |\n|---|---|---|---|---|---|---|")
    for what in given.only:
        base, rows = GROWTH[what]
        steps = {value: Step(config, examples, references) for value, config, examples, references in rows}
        times = {value: [] for value in steps}
        for step in steps.values():
            step.seconds()
        for _ in range(given.rounds):
            for value, step in steps.items():
                times[value].append(step.seconds())
        least = {value: min(found) for value, found in times.items()}
        for value, step in steps.items():
            print(
                f"| {what} | {value} | {least[value]:.3f} | {least[value] / least[base]:.2f} | {step.gflop:.0f} "
                f"| {step.gflop / steps[base].gflop:.2f} | {step.compiled:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
