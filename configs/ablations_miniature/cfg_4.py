"""Guidance 4 in place of 2.5. Otherwise as `two_stages.py`.

    python train.py configs/ablations_miniature/cfg_4.py
"""

import dataclasses
from pathlib import Path

from squeeze_jax.config import load_preset

base = load_preset(Path(__file__).with_name("two_stages.py"))
config = dataclasses.replace(
    base,
    name="cfg_4",
    sampling=dataclasses.replace(base.sampling, cfg_scale=4.0),
)
