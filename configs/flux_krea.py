r"""Stage 2 on FLUX.1-Krea-dev (weights: black-forest-labs/FLUX.1-Krea-dev).

    python train.py configs/flux_stage1.py --data.features FEATURES \
        --workdir runs/krea_stage1 --model.dit-weights FLUX.1-Krea-dev/transformer \
        --model.autoencoder FLUX.1-Krea-dev/vae
    python train.py configs/flux_krea.py --data.features FEATURES --workdir runs/krea \
        --from runs/krea_stage1

The first command is its stage 1: weights that were trained on another base are refused.

It shares the architecture of FLUX.1-dev in every shape.
Licence of the weights: FLUX.1-dev Non-Commercial License. Hardware: a TPU pod slice.
"""

import dataclasses
from pathlib import Path

from squeeze_jax.config import load_preset

stage2 = load_preset(Path(__file__).with_name("flux_stage2.py"))
config = dataclasses.replace(
    stage2,
    name="flux_krea",
    model=dataclasses.replace(
        stage2.model, dit_weights="FLUX.1-Krea-dev/transformer", autoencoder="FLUX.1-Krea-dev/vae"
    ),
)
