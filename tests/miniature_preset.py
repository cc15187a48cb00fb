"""A preset that trains in seconds with the shipped encoders, for commands in own processes."""

import os
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PRESET = """
from squeeze_jax.config import *
from squeeze_jax.models.aggregator import AggregatorConfig
from squeeze_jax.models.dit import DiTConfig

config = Config(
    name="NAME",
    model=ModelConfig(
        dit=DiTConfig(
            in_channels=32, context_width=32, pooled_width=8, heads=2, head_width=16,
            num_double_blocks=1, num_single_blocks=1, rope_axes=(4, 6, 6), guidance=False,
        ),
        latent_pixels=4, dtype="float32", frozen_dtype="float32",
    ),
    aggregator=AggregatorConfig(
        kind="KIND", layers=tuple(range(5)), width=128, out_width=32, heads=4, mlp_width=32,
        refiner_blocks=1,
    ),
    lora=None,
    data=DataConfig(height=64, width=64, reference_long_side=64, batch_per_chip=4, DATA),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
    training=TrainingConfig(
        stages=(StageConfig(steps=4, references=True),), validate_every=4, sample_every=0
    ),
    sampling=SamplingConfig(steps=3, tau1=TAU1, tau2=0.0),
    checkpoint=CheckpointConfig(every=2),
    log=LogConfig(every=1, tensorboard=False, grid=2, score=SCORE),
)
"""


def write_preset(
    path, data="critters=CrittersConfig(train=8, held_out=4)", kind="dla", tau1=0.8, score=0
):
    values = {
        "NAME": path.stem,
        "KIND": kind,
        "DATA": data,
        "TAU1": repr(tau1),
        "SCORE": str(score),
    }
    text = PRESET
    for name, value in values.items():
        text = text.replace(name, value)
    path.write_text(text)
    return path


def environment(cache=None):
    """One device, quickly compiled."""
    flags = "--xla_llvm_disable_expensive_passes=true --xla_backend_optimization_level=0"
    cache = cache or os.environ.get("SQUEEZE_TEST_CACHE") or tempfile.mkdtemp()
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    changes = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags,
        "SQUEEZE_JAX_CACHE": str(cache),
        "PYTHONPATH": paths,
    }
    return os.environ | changes
