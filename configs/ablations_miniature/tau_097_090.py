"""Thresholds: the paper's 0.97 / 0.90, carried to 64 tokens. Otherwise as `two_stages.py`.

    python train.py configs/ablations_miniature/tau_097_090.py
"""

import dataclasses
from pathlib import Path

from squeeze_jax.config import load_preset

base = load_preset(Path(__file__).with_name("two_stages.py"))
config = dataclasses.replace(
    base,
    name="tau_097_090",
    sampling=dataclasses.replace(base.sampling, tau1=0.89, tau2=0.69),
)
