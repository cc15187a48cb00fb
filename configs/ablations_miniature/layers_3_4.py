"""Which of the five hidden states are pooled: the last two. Otherwise as `two_stages.py`.

    python train.py configs/ablations_miniature/layers_3_4.py
"""

import dataclasses
from pathlib import Path

from squeeze_jax.config import load_preset

base = load_preset(Path(__file__).with_name("two_stages.py"))
config = dataclasses.replace(
    base,
    name="layers_3_4",
    aggregator=dataclasses.replace(base.aggregator, layers=(3, 4)),
)
