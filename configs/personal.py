"""Some three minutes for a handful of your own pictures: goes on from the shipped miniature of emoji.

    python train.py configs/personal.py --data.source mine.json --from emoji --workdir runs/mine
    python sample.py --checkpoint runs/mine --reference mine.png --prompt "…" --out out.png

`mine.json` lists prompts with references and targets (docs/data.md); five rows are enough to see
a difference, at 64 x 64 pixels. Small steps (our decision), since few pictures say little.
"""

import dataclasses
from pathlib import Path

from squeeze_jax.config import CheckpointConfig, LogConfig, StageConfig, load_preset

emoji = load_preset(Path(__file__).with_name("emoji_multi_subject.py"))
config = dataclasses.replace(
    emoji,
    name="personal",
    data=dataclasses.replace(emoji.data, emoji=None, buckets=(), batch_per_chip=8),
    optimizer=dataclasses.replace(
        emoji.optimizer,
        learning_rate=0.003,
        vector_learning_rate=4e-4,
        warmup_steps=10,
        ema=0.98,
    ),
    training=dataclasses.replace(
        emoji.training,
        stages=(StageConfig(steps=150, references=True),),
        validate_every=50,
        sample_every=0,
    ),
    checkpoint=CheckpointConfig(every=50),
    log=LogConfig(every=10, grid=4, score=0),
)
