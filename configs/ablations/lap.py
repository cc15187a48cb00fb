"""How the MLLM is connected: one pooling of all layers for all tokens. Both stages in one run.

    python train.py configs/ablations/lap.py --data.features FEATURES --workdir runs/lap

DreamBench in the paper (DINO-I / CLIP-I / CLIP-T): 0.7524 / 0.8502 / 0.2878. Hardware: a TPU pod
slice.
"""

import dataclasses
from pathlib import Path

from squeeze_jax.config import TrainingConfig, load_preset

stage1 = load_preset(Path(__file__).parents[1] / "flux_stage1.py")
stage2 = load_preset(Path(__file__).parents[1] / "flux_stage2.py")
config = dataclasses.replace(
    stage2,
    name="lap",
    aggregator=dataclasses.replace(stage2.aggregator, kind="lap"),
    training=TrainingConfig(stages=(*stage1.training.stages, *stage2.training.stages)),
)
