"""A light fine-tune of stage 2 on pairs with several references, on FLUX.2 [klein]: 2,000 steps.

    python train.py configs/klein_multi_subject.py --data.features FEATURES --workdir runs/multi --from runs/stage2

Licence of the weights: Apache-2.0. Hardware: ask
`python -m squeeze_jax plan configs/klein_multi_subject.py --topology v5e:2x2`.
The paper gives no number of steps; this one, and the smaller rate, are our decision.
"""

import dataclasses
from pathlib import Path

from squeeze_jax.config import StageConfig, TrainingConfig, load_preset

stage2 = load_preset(Path(__file__).with_name("klein_stage2.py"))
config = dataclasses.replace(
    stage2,
    name="klein_multi_subject",
    optimizer=dataclasses.replace(stage2.optimizer, learning_rate=5e-5),
    training=TrainingConfig(stages=(StageConfig(steps=2_000, references=True),)),
)
