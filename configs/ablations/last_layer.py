"""How the MLLM is connected: its last layer alone. Both stages in one run.

    python train.py configs/ablations/last_layer.py --data.features FEATURES --workdir runs/last_layer

DreamBench in the paper (DINO-I / CLIP-I / CLIP-T): 0.6566 / 0.8128 / 0.2893. Hardware: a TPU pod
slice.
"""

import dataclasses
from pathlib import Path

from squeeze_jax.config import TrainingConfig, load_preset

stage1 = load_preset(Path(__file__).parents[1] / "flux_stage1.py")
stage2 = load_preset(Path(__file__).parents[1] / "flux_stage2.py")
config = dataclasses.replace(
    stage2,
    name="last_layer",
    aggregator=dataclasses.replace(stage2.aggregator, kind="last_layer"),
    training=TrainingConfig(stages=(*stage1.training.stages, *stage2.training.stages)),
)
