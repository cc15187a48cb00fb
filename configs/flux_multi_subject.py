"""A light fine-tune of stage 2 on pairs with several references (arXiv 2605.26111, "Training"):
2,000 steps.

    python train.py configs/flux_multi_subject.py --data.features FEATURES --workdir runs/multi --from runs/stage2

Licence of the weights: FLUX.1-dev Non-Commercial License. Hardware: a TPU pod slice.
The paper gives no number of steps; this one, and the smaller rate, are our decision.
"""

import dataclasses
from pathlib import Path

from squeeze_jax.config import StageConfig, TrainingConfig, load_preset

stage2 = load_preset(Path(__file__).with_name("flux_stage2.py"))
config = dataclasses.replace(
    stage2,
    name="flux_multi_subject",
    optimizer=dataclasses.replace(stage2.optimizer, learning_rate=5e-5),
    training=TrainingConfig(stages=(StageConfig(steps=2_000, references=True),)),
)
