"""Thresholds: the paper's 0.85 / 0.70, carried to 64 tokens. Otherwise as `two_stages.py`.

    python train.py configs/ablations_miniature/tau_085_070.py
"""

import dataclasses
from pathlib import Path

from squeeze_jax.config import load_preset

base = load_preset(Path(__file__).with_name("two_stages.py"))
config = dataclasses.replace(
    base,
    name="tau_085_070",
    sampling=dataclasses.replace(base.sampling, tau1=0.59, tau2=0.37),
)
