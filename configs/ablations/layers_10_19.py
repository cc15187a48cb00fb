"""Which layers are pooled: 10 to 19. Both stages in one run.

    python train.py configs/ablations/layers_10_19.py --data.features FEATURES --workdir runs/layers_10_19

DreamBench in the paper (DINO-I / CLIP-I / CLIP-T): not given as numbers. Hardware: a TPU pod slice.
"""

import dataclasses
from pathlib import Path

from squeeze_jax.config import TrainingConfig, load_preset

stage1 = load_preset(Path(__file__).parents[1] / "flux_stage1.py")
stage2 = load_preset(Path(__file__).parents[1] / "flux_stage2.py")
config = dataclasses.replace(
    stage2,
    name="layers_10_19",
    aggregator=dataclasses.replace(stage2.aggregator, layers=tuple(range(10, 20))),
    training=TrainingConfig(stages=(*stage1.training.stages, *stage2.training.stages)),
)
