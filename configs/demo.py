"""The whole path in under six minutes on two CPU cores: draws, extracts, trains both stages,
samples a grid, scores.

    python train.py configs/demo.py

The miniature of `demo_weights.py` on fewer pairs and for fewer steps: enough to see scenes appear,
not subjects.
"""

import dataclasses
from pathlib import Path

from squeeze_jax.config import (
    CheckpointConfig,
    CrittersConfig,
    LogConfig,
    StageConfig,
    TrainingConfig,
    load_preset,
)

long = load_preset(Path(__file__).with_name("demo_weights.py"))
config = dataclasses.replace(
    long,
    name="demo",
    data=dataclasses.replace(
        long.data, critters=CrittersConfig(train=5_120, held_out=128, size=64)
    ),
    training=TrainingConfig(
        stages=(StageConfig(steps=60, references=False), StageConfig(steps=100, references=True)),
        validate_every=80,
        sample_every=0,
    ),
    checkpoint=CheckpointConfig(every=80),
    log=LogConfig(every=10, grid=8, score=64),
)
