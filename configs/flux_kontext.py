r"""Stage 2 on FLUX.1-Kontext-dev (weights: black-forest-labs/FLUX.1-Kontext-dev).

    python train.py configs/flux_stage1.py --data.features FEATURES \
        --workdir runs/kontext_stage1 --model.dit-weights FLUX.1-Kontext-dev/transformer \
        --model.autoencoder FLUX.1-Kontext-dev/vae
    python train.py configs/flux_kontext.py --data.features FEATURES --workdir runs/kontext \
        --from runs/kontext_stage1

The first command is its stage 1: weights that were trained on another base are refused.

It shares the architecture of FLUX.1-dev and was trained with reference tokens already, at other
positions than ours. Licence of the weights: FLUX.1-dev Non-Commercial License. Hardware: a TPU pod
slice.
"""

import dataclasses
from pathlib import Path

from squeeze_jax.config import load_preset

stage2 = load_preset(Path(__file__).with_name("flux_stage2.py"))
config = dataclasses.replace(
    stage2,
    name="flux_kontext",
    model=dataclasses.replace(
        stage2.model,
        dit_weights="FLUX.1-Kontext-dev/transformer",
        autoencoder="FLUX.1-Kontext-dev/vae",
    ),
)
