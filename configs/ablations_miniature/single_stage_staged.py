"""One stage with both conditions, sampled in three stages. Otherwise as `two_stages.py`.

    python train.py configs/ablations_miniature/single_stage_staged.py
"""

import dataclasses
from pathlib import Path

from squeeze_jax.config import StageConfig, load_preset

base = load_preset(Path(__file__).with_name("two_stages.py"))
config = dataclasses.replace(
    base,
    name="single_stage_staged",
    training=dataclasses.replace(
        base.training, stages=(StageConfig(steps=1_200, references=True),)
    ),
)
