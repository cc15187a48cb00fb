"""How the MLLM is connected: its last layer blended with the vision tower's features. Both stages
in one run.

    python train.py configs/ablations/last_layer_vit.py --data.features FEATURES --workdir runs/last_layer_vit

DreamBench in the paper (DINO-I / CLIP-I / CLIP-T): 0.7118 / 0.8286 / 0.2850. Hardware: a TPU pod
slice.
"""

import dataclasses
from pathlib import Path

from squeeze_jax.config import TrainingConfig, load_preset

stage1 = load_preset(Path(__file__).parents[1] / "flux_stage1.py")
stage2 = load_preset(Path(__file__).parents[1] / "flux_stage2.py")
config = dataclasses.replace(
    stage2,
    name="last_layer_vit",
    aggregator=dataclasses.replace(stage2.aggregator, kind="last_layer_vit"),
    training=TrainingConfig(stages=(*stage1.training.stages, *stage2.training.stages)),
)
