"""Stage 2 of the paper (arXiv 2605.26111, "Training"): both conditions, 10,000 steps from stage 1's
weights.

    python train.py configs/flux_stage2.py --data.features FEATURES --workdir runs/stage2 --from runs/stage1

Licence of the weights: FLUX.1-dev Non-Commercial License. Hardware: a TPU pod slice.
To expect at full scale: DreamBench DINO-I 0.748, CLIP-I 0.844, CLIP-T 0.301 (the paper's).
"""

import dataclasses
from pathlib import Path

from squeeze_jax.config import SamplingConfig, StageConfig, TrainingConfig, load_preset

stage1 = load_preset(Path(__file__).with_name("flux_stage1.py"))
config = dataclasses.replace(
    stage1,
    name="flux_stage2",
    training=TrainingConfig(stages=(StageConfig(steps=10_000, references=True),)),
    sampling=SamplingConfig(),
)
