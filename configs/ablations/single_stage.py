"""One stage of 35,000 steps with both conditions, sampled with both throughout.

    python train.py configs/ablations/single_stage.py --data.features FEATURES --workdir runs/single_stage

DreamBench in the paper (DINO-I / CLIP-I / CLIP-T): 0.7184 / 0.8245 / 0.2971. Hardware: a TPU pod
slice.
"""

import dataclasses
from pathlib import Path

from squeeze_jax.config import SamplingConfig, StageConfig, TrainingConfig, load_preset

stage2 = load_preset(Path(__file__).parents[1] / "flux_stage2.py")
config = dataclasses.replace(
    stage2,
    name="single_stage",
    training=TrainingConfig(stages=(StageConfig(steps=35_000, references=True),)),
    sampling=SamplingConfig(tau1=1.1, tau2=0.0),
)
