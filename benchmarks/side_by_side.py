"""The shipped miniature in JAX and, exported, in a PyTorch process without JAX, on the same noise: docs/export.png.

    python benchmarks/side_by_side.py [--out docs/export.png]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import load_file, save_file

from squeeze_jax.commands import export
from squeeze_jax.data.images import load_image, to_uint8
from squeeze_jax.interop.load import DEMO
from squeeze_jax.sampling.pipeline import Pipeline, Settings
from squeeze_jax.sampling.schedule import noise_for

CASES = [
    (0, "a big critter jumping on the beach at sunset, with a red balloon, on the left"),
    (1, "a small critter running on the beach at night, with a blue flag, on the right"),
    (3, "a big critter jumping on the beach at night, with a red balloon, on the right"),
    (5, "a small critter running on the beach at sunset, with a blue flag, on the left"),
]
USER = """
import json, sys
import numpy as np, torch
from PIL import Image
from safetensors.torch import load_file, save_file
from squeeze_pipeline import SqueezePipeline

pipe = SqueezePipeline.load(".", torch_dtype=torch.float32)
pipe.set_progress_bar_config(disable=True)
drawn = []
for case, noise in zip(json.loads(sys.argv[1]), load_file(sys.argv[2])["noise"]):
    drawn.append(pipe(case[1], [Image.open(case[0])], latents=noise[None])[0])
assert not any(name.split(".")[0] in ("jax", "squeeze_jax") for name in sys.modules)
save_file({"drawn": torch.tensor(np.stack([np.asarray(picture) for picture in drawn]))}, sys.argv[3])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/export.png"))
    out = parser.parse_args().out
    pipeline = Pipeline.load()
    cases = [(DEMO / "references" / f"critter-{i}.png", prompt) for i, prompt in CASES]
    references = [load_image(path) for path, _ in cases]
    ours = [
        to_uint8(pipeline(prompt, [reference], Settings(seed=seed)))[0]
        for seed, (reference, (_, prompt)) in enumerate(zip(references, cases))
    ]
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "exported"
        if export.main(["demo", "--out", str(folder), "--no-check"]):
            sys.exit("the export failed")
        rows, columns = pipeline.config.target_grid
        noise = np.array(noise_for(list(range(len(cases))), rows * columns, pipeline.config.model.dit.in_channels))
        save_file({"noise": noise}, f"{work}/noise.safetensors")
        named = json.dumps([(str(path.resolve()), prompt) for path, prompt in cases])
        arguments = [sys.executable, "-c", USER, named, f"{work}/noise.safetensors", f"{work}/drawn.safetensors"]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        subprocess.run(arguments, cwd=folder, check=True, env=environment)
        theirs = load_file(f"{work}/drawn.safetensors")["drawn"]
    differences = np.abs(np.stack(ours).astype(int) - theirs)
    print(f"largest difference {differences.max()} grey levels; {np.mean(differences > 0):.4%} of values differ at all")
    lines = [np.concatenate([np.asarray(picture) for picture in line], axis=1) for line in (references, ours, theirs)]
    picture = Image.fromarray(np.concatenate(lines).astype(np.uint8))
    picture.resize((picture.width * 3, picture.height * 3), Image.Resampling.NEAREST).save(out)
    print(f"picture: {out}")


if __name__ == "__main__":
    main()
