"""Stage 1 of the paper (arXiv 2605.26111, "Training") on FLUX.2 [klein]: the MLLM's condition
alone.

    python -m squeeze_jax extract SOURCE --out FEATURES --config configs/klein_stage1.py
    python train.py configs/klein_stage1.py --data.features FEATURES --workdir runs/stage1

Licence of the weights: Apache-2.0 (FLUX.2 [klein] base 4B, the undistilled one). Hardware: ask
`python -m squeeze_jax plan configs/klein_stage1.py --topology v5e:2x2`. Fill in the three folders
below.
"""

from squeeze_jax.config import (
    Config,
    ModelConfig,
    ParallelConfig,
    SamplingConfig,
    StageConfig,
    TrainingConfig,
)
from squeeze_jax.diffusion.stages import ConditionDropout
from squeeze_jax.models.aggregator import AggregatorConfig
from squeeze_jax.models.flux2 import Flux2Config

BASE = "FLUX.2-klein-base-4B"
config = Config(
    name="klein_stage1",
    model=ModelConfig(
        dit=Flux2Config(),
        dit_weights=f"{BASE}/transformer",
        autoencoder=f"{BASE}/vae",
        mllm="InternVL3-8B-hf",
    ),
    aggregator=AggregatorConfig(out_width=Flux2Config().context_width),
    training=TrainingConfig(
        stages=(
            StageConfig(
                steps=25_000,
                references=False,
                dropout=ConditionDropout(both=0.0, mllm=0.9, vae=0.0, neither=0.1),
            ),
        )
    ),
    # The base's own 50 steps and guidance 4.0. Without reference tokens the MLLM stays on
    # throughout.
    sampling=SamplingConfig(steps=50, cfg_scale=4.0, tau1=0.0, tau2=0.0),
    parallel=ParallelConfig(remat="save_attention"),
)
