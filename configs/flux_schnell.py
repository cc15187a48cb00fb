r"""Stage 2 on FLUX.1-schnell (weights: black-forest-labs/FLUX.1-schnell).

    python train.py configs/flux_stage1.py --data.features FEATURES \
        --workdir runs/schnell_stage1 --model.dit-weights FLUX.1-schnell/transformer \
        --model.autoencoder FLUX.1-schnell/vae \
        --model.dit.no-guidance --sampling.no-shifted --sampling.steps 4 --sampling.cfg-scale 1
    python train.py configs/flux_schnell.py --data.features FEATURES --workdir runs/schnell \
        --from runs/schnell_stage1

The first command is its stage 1: weights that were trained on another base are refused.

It takes no distilled guidance and samples in 4 steps on the unshifted schedule: one with the MLLM
alone, one with both conditions and two with the references alone (docs/decisions.md, "τ on few
steps"). Training's times are unshifted, too.
Licence of the weights: Apache-2.0, the only one of the family free for commercial use. Hardware: a
TPU pod slice.
"""

import dataclasses
from pathlib import Path

from squeeze_jax.config import load_preset

stage2 = load_preset(Path(__file__).with_name("flux_stage2.py"))
config = dataclasses.replace(
    stage2,
    name="flux_schnell",
    model=dataclasses.replace(
        stage2.model,
        dit=dataclasses.replace(stage2.model.dit, guidance=False),
        dit_weights="FLUX.1-schnell/transformer",
        autoencoder="FLUX.1-schnell/vae",
    ),
    sampling=dataclasses.replace(
        stage2.sampling, steps=4, tau1=0.91, tau2=0.75, shifted=False, cfg_scale=1.0
    ),
)
