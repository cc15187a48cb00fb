"""How the MLLM is connected: one pooling of all layers for all tokens. Otherwise as `two_stages.py`.

    python train.py configs/ablations_miniature/lap.py
"""

import dataclasses
from pathlib import Path

from squeeze_jax.config import load_preset

base = load_preset(Path(__file__).with_name("two_stages.py"))
config = dataclasses.replace(
    base,
    name="lap",
    aggregator=dataclasses.replace(base.aggregator, kind="lap"),
)
