"""How stage 2 is sampled: τ1 = 0.97, τ2 = 0.9, guidance 2.5. No training of its own:

    python sample.py --checkpoint runs/stage2 --tau1 0.97 --tau2 0.9 --cfg-scale 2.5 --prompt … --reference … --out …

`train.py configs/ablations/tau_097_090.py` trains stage 2 with these as the checkpoint's own
values. DreamBench in the paper (DINO-I / CLIP-I / CLIP-T): 0.7490 / 0.8466 / 0.2963. Hardware: a
TPU pod slice.
"""

import dataclasses
from pathlib import Path

from squeeze_jax.config import SamplingConfig, load_preset

stage2 = load_preset(Path(__file__).parents[1] / "flux_stage2.py")
config = dataclasses.replace(
    stage2, name="tau_097_090", sampling=SamplingConfig(tau1=0.97, tau2=0.9, cfg_scale=2.5)
)
