"""Thresholds: the MLLM alone throughout. Otherwise as `two_stages.py`.

    python train.py configs/ablations_miniature/tau_0_0.py
"""

import dataclasses
from pathlib import Path

from squeeze_jax.config import load_preset

base = load_preset(Path(__file__).with_name("two_stages.py"))
config = dataclasses.replace(
    base,
    name="tau_0_0",
    sampling=dataclasses.replace(base.sampling, tau1=0.0, tau2=0.0),
)
