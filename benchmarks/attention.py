"""Attention on this machine's CPUs: in blocks of queries, as one product of all scores, and PyTorch's fused kernel.

    python benchmarks/attention.py                        (needs the `parity` extra)

One example, 4 heads x 64, float32, no mask; medians of 7 runs, ms.
"""

import os
import statistics
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import torch

from squeeze_jax.layers import attention as module

BLOCKS = (128, 256, 512)


def main() -> None:
    print("| tokens | " + " | ".join(f"blocks of {size}" for size in BLOCKS) + " | whole | PyTorch |")
    print("|---" * (len(BLOCKS) + 3) + "|")
    for tokens in (1024, 1344, 2048, 2368):
        rng = np.random.default_rng(0)
        arrays = [rng.standard_normal((1, tokens, 4, 64)).astype(np.float32) for _ in range(3)]
        ours, theirs = [jnp.asarray(x) for x in arrays], [torch.from_numpy(x).transpose(1, 2) for x in arrays]
        cells = []
        for size in (*BLOCKS, tokens):

            def attend(q, k, v, size=size):
                module.QUERIES = size
                return module.plain_attention(q, k, v, None)

            function = jax.jit(attend)
            cells.append(median(lambda function=function, x=ours: function(*x).block_until_ready()))
        cells.append(median(lambda x=theirs: torch.nn.functional.scaled_dot_product_attention(*x)))
        print(f"| {tokens} | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |", flush=True)


def median(run) -> float:
    run()
    times = []
    for _ in range(7):
        start = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


if __name__ == "__main__":
    main()
