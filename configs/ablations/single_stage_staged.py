"""One stage of 35,000 steps with both conditions, sampled in three stages.

    python train.py configs/ablations/single_stage_staged.py --data.features FEATURES --workdir runs/single_stage_staged

DreamBench in the paper (DINO-I / CLIP-I / CLIP-T): 0.5763 / 0.7686 / 0.2995. Hardware: a TPU pod
slice.
"""

import dataclasses
from pathlib import Path

from squeeze_jax.config import StageConfig, TrainingConfig, load_preset

stage2 = load_preset(Path(__file__).parents[1] / "flux_stage2.py")
config = dataclasses.replace(
    stage2,
    name="single_stage_staged",
    training=TrainingConfig(stages=(StageConfig(steps=35_000, references=True),)),
)
