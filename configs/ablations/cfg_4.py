"""How stage 2 is sampled: τ1 = 0.95, τ2 = 0.85, guidance 4. No training of its own:

    python sample.py --checkpoint runs/stage2 --tau1 0.95 --tau2 0.85 --cfg-scale 4 --prompt … --reference … --out …

`train.py configs/ablations/cfg_4.py` trains stage 2 with these as the checkpoint's own values.
DreamBench in the paper (DINO-I / CLIP-I / CLIP-T): 0.7431 / 0.8381 / 0.3012. Hardware: a TPU pod
slice.
"""

import dataclasses
from pathlib import Path

from squeeze_jax.config import SamplingConfig, load_preset

stage2 = load_preset(Path(__file__).parents[1] / "flux_stage2.py")
config = dataclasses.replace(
    stage2, name="cfg_4", sampling=SamplingConfig(tau1=0.95, tau2=0.85, cfg_scale=4.0)
)
