"""Which of the five hidden states are pooled: those in the middle. Otherwise as `two_stages.py`.

    python train.py configs/ablations_miniature/layers_2_3.py
"""

import dataclasses
from pathlib import Path

from squeeze_jax.config import load_preset

base = load_preset(Path(__file__).with_name("two_stages.py"))
config = dataclasses.replace(
    base,
    name="layers_2_3",
    aggregator=dataclasses.replace(base.aggregator, layers=(2, 3)),
)
