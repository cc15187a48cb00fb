"""How the MLLM is connected: its last layer blended with the vision tower's
features. Otherwise as `two_stages.py`.

    python train.py configs/ablations_miniature/last_layer_vit.py
"""

import dataclasses
from pathlib import Path

from squeeze_jax.config import load_preset

base = load_preset(Path(__file__).with_name("two_stages.py"))
config = dataclasses.replace(
    base,
    name="last_layer_vit",
    aggregator=dataclasses.replace(base.aggregator, kind="last_layer_vit"),
)
