"""More steps for the miniature of `demo_weights.py`, from its weights: the patterns come last.

    XLA_FLAGS=--xla_force_host_platform_device_count=2 python train.py configs/demo_weights_more.py --from WORKDIR \
        --data.batch-per-chip 16

Patterns are decided where noise hides everything; uniform times look there three times as often.
"""

import dataclasses
from pathlib import Path

from squeeze_jax.config import DiffusionConfig, StageConfig, TrainingConfig, load_preset

first = load_preset(Path(__file__).with_name("demo_weights.py"))
config = dataclasses.replace(
    first,
    diffusion=DiffusionConfig(time_sampling="shifted_uniform"),
    training=TrainingConfig(
        stages=(StageConfig(steps=4_500, references=True),), validate_every=500, sample_every=500
    ),
)
