"""Stage 1 of the paper (arXiv 2605.26111, "Training"): the MLLM's condition alone, 25,000 steps.

    python -m squeeze_jax extract SOURCE --out FEATURES --config configs/flux_stage1.py
    python train.py configs/flux_stage1.py --data.features FEATURES --workdir runs/stage1

Licence of the weights: FLUX.1-dev Non-Commercial License. Hardware: a TPU pod slice. Fill in the
three folders below.
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

config = Config(
    name="flux_stage1",
    model=ModelConfig(
        dit_weights="FLUX.1-dev/transformer", autoencoder="FLUX.1-dev/vae", mllm="InternVL3-8B-hf"
    ),
    training=TrainingConfig(
        stages=(
            StageConfig(
                steps=25_000,
                references=False,
                dropout=ConditionDropout(both=0.0, mllm=0.9, vae=0.0, neither=0.1),
            ),
        )
    ),
    # Without reference tokens the MLLM stays on throughout.
    sampling=SamplingConfig(tau1=0.0, tau2=0.0),
    parallel=ParallelConfig(remat="save_attention"),
)
