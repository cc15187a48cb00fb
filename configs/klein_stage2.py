"""Stage 2 of the paper (arXiv 2605.26111, "Training") on FLUX.2 [klein]: both conditions, from
stage 1's weights.

    python train.py configs/klein_stage2.py --data.features FEATURES --workdir runs/stage2 --from runs/stage1

Licence of the weights: Apache-2.0. Hardware: ask
`python -m squeeze_jax plan configs/klein_stage2.py --topology v5e:2x2`. The
LoRA stands where FLUX.1's preset has it, at rank 512: on q, k, v and the projections behind
attention.
"""

import dataclasses
from pathlib import Path

from squeeze_jax.config import SamplingConfig, StageConfig, TrainingConfig, load_preset

stage1 = load_preset(Path(__file__).with_name("klein_stage1.py"))
config = dataclasses.replace(
    stage1,
    name="klein_stage2",
    training=TrainingConfig(stages=(StageConfig(steps=10_000, references=True),)),
    sampling=SamplingConfig(steps=50, cfg_scale=4.0),
)
