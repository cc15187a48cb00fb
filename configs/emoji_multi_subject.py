"""The miniature of emoji goes on with up to two subjects and other sizes, after stage 2.

    python train.py configs/emoji_multi_subject.py --from runs/emoji

Every second example has two subjects and two references (arXiv 2605.26111, "Training": a light
fine-tune, here a long one), and targets have four sizes. The rate falls to a twentieth. The
shipped weights were trained by this preset on two devices, 8 examples each, in 76 minutes on two
CPU cores.
"""

import dataclasses
from pathlib import Path

from squeeze_jax.config import StageConfig, load_preset

single = load_preset(Path(__file__).with_name("emoji.py"))
assert single.data.emoji is not None
config = dataclasses.replace(
    single,
    name="emoji_multi_subject",
    data=dataclasses.replace(
        single.data,
        emoji=dataclasses.replace(single.data.emoji, train=20_000, near=0.25, subjects=2, seed=4),
        buckets=((64, 64), (48, 80), (80, 48), (64, 96)),
    ),
    optimizer=dataclasses.replace(single.optimizer, decay="cosine"),
    training=dataclasses.replace(
        single.training, stages=(StageConfig(steps=5_500, references=True),)
    ),
)
