"""Model FLOPs of a running step, and the peak of its devices: their ratio to the time is the
utilisation."""

from typing import Any

import jax

from squeeze_jax.config import Config, StageConfig
from squeeze_jax.planning.chips import CHIPS
from squeeze_jax.planning.train_program import example_flops
from squeeze_jax.training.step import Batch

# Beginning of JAX's name for a device → peak dense bfloat16 FLOP/s (the makers' data sheets).
PEAKS = {
    "TPU v4": CHIPS["v4"].flops,
    "TPU v5 lite": CHIPS["v5e"].flops,
    "TPU v5e": CHIPS["v5e"].flops,
    "TPU v5": CHIPS["v5p"].flops,
    "TPU v6 lite": CHIPS["v6e"].flops,
    "TPU v6e": CHIPS["v6e"].flops,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100": 312e12,
}


def peak_of(kind: str) -> float | None:
    """Peak FLOP/s of a device by its `device_kind`; None where the table has none (CPUs)."""
    fitting = [name for name in PEAKS if kind.startswith(name)]
    return PEAKS[max(fitting, key=len)] if fitting else None


def step_work(config: Config, stage: StageConfig, batch: Batch) -> tuple[float, float | None]:
    """Model FLOPs of a step on this batch (nothing twice for being rematerialised), and all
    devices' peak FLOP/s."""
    rows = batch.target.shape[0]
    one: Any = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), batch)
    peak = peak_of(jax.devices()[0].device_kind)
    return rows * example_flops(
        config, stage, one
    ), None if peak is None else peak * jax.device_count()
