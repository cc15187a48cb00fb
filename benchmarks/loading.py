"""Peak host memory of loading a large checkpoint, beside what is kept and the largest tensor.

    python benchmarks/loading.py [--single-blocks 14] [--folder DIR]

Writes a synthetic transformer of FLUX.1's full width (bfloat16, 2 double blocks and as many single ones as asked for;
5 GB by default), loads it in a fresh process and prints the peak of that process's own (anonymous) memory above where it
stood before. Pages of the mapped file are not counted: the system takes them back at will.
"""

import argparse
import dataclasses
import json
import multiprocessing
import tempfile
import threading
import time
from pathlib import Path


def anonymous() -> int:
    """Bytes of this process's memory that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no RssAnon in /proc/self/status")


def write(folder: Path, single_blocks: int) -> None:
    """Shards of random bits, one a block, and the index."""
    import ml_dtypes
    import numpy as np
    from flax import nnx
    from safetensors.numpy import save_file

    from squeeze_jax.interop.flux import config_to_json, diffusers_entries
    from squeeze_jax.interop.mapping import parameters_by_path
    from squeeze_jax.models.dit import DiT, DiTConfig

    config = dataclasses.replace(DiTConfig(), num_double_blocks=2, num_single_blocks=single_blocks)
    parameters = parameters_by_path(nnx.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0))))
    rng, shards = np.random.default_rng(0), {}
    for entry in diffusers_entries(config):
        shape = parameters[entry.path].shape[entry.layer is not None :]
        sizes = entry.sizes or (shape[-1],)
        for name, size in zip(entry.sources, sizes):
            shard = ".".join(name.split(".")[:2]) if "blocks" in name else "rest"
            shards.setdefault(shard, {})[name] = (size, *shape[:-1])
    weight_map = {}
    for shard, tensors in shards.items():
        bits = {name: rng.integers(0, 0x3F80, shape, np.uint16) for name, shape in tensors.items()}
        arrays = {name: value.view(ml_dtypes.bfloat16) for name, value in bits.items()}
        save_file(arrays, folder / f"{shard}.safetensors")
        weight_map |= dict.fromkeys(arrays, f"{shard}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config_to_json(config)))


def load(folder: Path, queue: multiprocessing.Queue) -> None:
    import jax
    from flax import nnx

    from squeeze_jax.interop import load_dit
    from squeeze_jax.interop.tensors import TensorFolder

    jax.devices()
    start, peak, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    dit = load_dit(folder)
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(dit, nnx.Param)))
    tensors = TensorFolder(folder)
    largest = max(2 * int.__mul__(*shape) for name in tensors.names() if len(shape := tensors.shape(name)) == 2)
    queue.put({"kept": kept, "largest": largest, "peak": peak[0] - start, "seconds": seconds})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--single-blocks", type=int, default=14)
    parser.add_argument("--folder", type=Path, help="where the checkpoint is written (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        write(Path(folder), args.single_blocks)
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        process = context.Process(target=load, args=(Path(folder), queue))
        process.start()
        row = queue.get()
        process.join()
    over = (row["peak"] - row["kept"]) / row["largest"]
    print(f"kept {row['kept'] / 1e9:.2f} GB, largest tensor {row['largest'] / 1e6:.0f} MB, {row['seconds']:.0f} s")
    print(f"peak {row['peak'] / 1e9:.2f} GB = kept + {over:.2f} x the largest tensor (aim: at most 1.5)")


if __name__ == "__main__":
    main()
