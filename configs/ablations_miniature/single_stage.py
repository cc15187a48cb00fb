"""One stage with both conditions, sampled with both throughout. Otherwise as `two_stages.py`.

    python train.py configs/ablations_miniature/single_stage.py
"""

import dataclasses
from pathlib import Path

from squeeze_jax.config import StageConfig, load_preset

base = load_preset(Path(__file__).with_name("two_stages.py"))
config = dataclasses.replace(
    base,
    name="single_stage",
    training=dataclasses.replace(
        base.training, stages=(StageConfig(steps=1_200, references=True),)
    ),
    sampling=dataclasses.replace(base.sampling, tau1=1.1, tau2=0.0),
)
