"""How many rows a shard gets: a killed extraction repeats at most one."""

import dataclasses
from pathlib import Path

from squeeze_jax.commands.features import MOST_BYTES, rows_of_shard
from squeeze_jax.config import load_preset

CONFIGS = Path(__file__).parents[2] / "configs"


def test_shards_of_large_records_have_fewer_rows():
    demo, full = (load_preset(CONFIGS / name) for name in ("demo.py", "flux_stage2.py"))
    assert rows_of_shard(demo, 5) == 1024
    assert rows_of_shard(full, 29) == MOST_BYTES // (29 * 320 * 3584 * 2) == 32
    int8 = dataclasses.replace(full, data=dataclasses.replace(full.data, codec="int8"))
    assert rows_of_shard(int8, 29) == 64
    assert rows_of_shard(full, 1) == 936
