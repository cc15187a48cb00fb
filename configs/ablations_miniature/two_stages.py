"""The paper's ablations in miniature, on critters: the method as it is, both stages in one run.

    python train.py configs/ablations_miniature/two_stages.py
    python -m squeeze_jax ablate configs/ablations_miniature --seeds 0,1,2 --workdir runs/ablation

A small budget, the same for all (our decision): 8,000 pairs, 200 and 1,000 steps of 16. The other
presets of this folder each change one thing. An estimate: ten minutes each on two CPU cores.
"""

import dataclasses
from pathlib import Path

from squeeze_jax.config import CrittersConfig, StageConfig, load_preset

critters = load_preset(Path(__file__).parents[1] / "demo_weights.py")
config = dataclasses.replace(
    critters,
    name="two_stages",
    data=dataclasses.replace(
        critters.data,
        critters=CrittersConfig(train=8_000, held_out=512),
        batch_per_chip=16,
    ),
    training=dataclasses.replace(
        critters.training,
        stages=(
            StageConfig(steps=200, references=False),
            StageConfig(steps=1_000, references=True),
        ),
        validate_every=600,
        sample_every=0,
    ),
    log=dataclasses.replace(critters.log, score=256),
)
