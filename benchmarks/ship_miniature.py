"""A run's averaged weights, rounded to bfloat16, as the package ships them.

    python benchmarks/ship_miniature.py runs/emoji_multi_subject squeeze_jax/demo_emoji/system

Thresholds and guidance are those of --sampling's preset where it is given, else the run's own.
"""

import argparse
import dataclasses
from pathlib import Path

from squeeze_jax.checkpoints.manager import read_weights, write_weights
from squeeze_jax.config import load_preset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sampling", type=Path, metavar="PRESET")
    given = parser.parse_args()
    config, leaves, step = read_weights(given.run)
    if given.sampling is not None:
        config = dataclasses.replace(config, sampling=load_preset(given.sampling).sampling)
    write_weights(given.out, config, leaves)
    files = sum(path.stat().st_size for path in given.out.iterdir())
    print(f"{given.out}: step {step}, {files / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
