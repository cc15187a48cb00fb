"""How far an exported pipeline's pictures in bfloat16 are from those in float32, in grey levels.

    python benchmarks/export_precision.py

Exports the shipped miniature, draws its three shipped prompts in both types by PyTorch from the
same seed, and compares the pictures. A minute on two CPU cores; needs the `parity` extra.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from squeeze_jax.commands import export
from squeeze_jax.interop.load import DEMO

REFERENCES = DEMO / "references"


def main() -> None:
    rows = json.loads((REFERENCES / "prompts.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "exported"
        if export.main([str(DEMO / "system"), "--out", str(out)]):
            raise SystemExit(1)
        sys.path.insert(0, str(out))
        from squeeze_pipeline import SqueezePipeline  # pyright: ignore[reportMissingImports]

        drawn = []
        for dtype in (torch.float32, torch.bfloat16):
            pipe = SqueezePipeline.load(str(out), torch_dtype=dtype)
            pipe.set_progress_bar_config(disable=True)
            drawn.append([])
            for row in rows:
                shown = [Image.open(REFERENCES / name) for name in row["image_paths"]]
                seed = torch.Generator().manual_seed(0)
                drawn[-1].append(np.asarray(pipe(row["prompt"], shown, generator=seed)[0], float))
    print("| prompt | grey levels apart: mean | 99th percentile | largest |\n|---|---|---|---|")
    for row, exact, rounded in zip(rows, *drawn):
        apart = np.abs(exact - rounded)
        figures = apart.mean(), np.percentile(apart, 99), apart.max()
        print("| {} | {:.2f} | {:.0f} | {:.0f} |".format(row["prompt"], *figures))


if __name__ == "__main__":
    main()
