"""Stage 1 on FLUX.2 [klein] with InternVL3-2B as the reader: the whole method in some six billion
values.

    python -m squeeze_jax extract SOURCE --out FEATURES --config configs/klein_small_stage1.py
    python train.py configs/klein_small_stage1.py --data.features FEATURES --workdir runs/stage1

Licence of klein: Apache-2.0; InternVL3-2B has its own card. Hardware: ask
`python -m squeeze_jax plan configs/klein_small_stage1.py --topology v5e:2x2`.
The choice of the smaller reader is ours; the paper's is InternVL3-8B.
"""

import dataclasses
from pathlib import Path

from squeeze_jax.config import load_preset

large = load_preset(Path(__file__).with_name("klein_stage1.py"))
config = dataclasses.replace(
    large,
    name="klein_small_stage1",
    model=dataclasses.replace(large.model, mllm="InternVL3-2B-hf"),
    # InternVL3-2B: 28 layers of width 1,536, so 29 hidden states; heads of 128 channels, as in
    # 8B's.
    aggregator=dataclasses.replace(large.aggregator, width=1536, heads=12, mlp_width=4096),
)
