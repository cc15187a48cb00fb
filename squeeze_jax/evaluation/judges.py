"""Learned judges of pictures: DINO and CLIP, as PyTorch models of transformers, from a folder.

Preprocessing is written here, since a score depends on it and libraries disagree: resize and crop
with Pillow, antialiased bicubic, on 8-bit values; then statistics of the judge's training.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float32
from PIL import Image

from squeeze_jax.errors import InputError
from squeeze_jax.interop.tensors import read_json

if TYPE_CHECKING:
    from torch import Tensor

CROP = 224
"""Pixels a side that DINO and CLIP see."""
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""Mean and standard deviation of the channels, of values in [0, 1]."""
Features = Float32[np.ndarray, "_ _"]
"""[n, width]: one row a picture or text, of length 1, so that products are cosines."""


@dataclass(frozen=True)
class Judge:
    """What turns pictures, and of CLIP texts too, into features."""

    name: str
    digest: str
    """16 hex digits of its files: features of another judge are never taken for its own."""
    choices: dict[str, str]
    """For the report: what it is and how it is used."""
    pictures: Callable[[Sequence[Image.Image]], Features]
    texts: Callable[[Sequence[str]], Features] | None = None


def preprocess(
    image: Image.Image,
    short_side: int,
    statistics: tuple[Sequence[float], Sequence[float]],
    middle: Callable[[float], int],
) -> Float32[np.ndarray, "3 224 224"]:
    """Short side resized to `short_side` (the other side rounded down), the middle 224² cut out,
    normalised.

    middle: how the half pixel at the border of an odd cut is rounded: `round` as torchvision does,
    `int` as transformers does.
    """
    short = min(image.size)
    size = (
        int(short_side * image.width / short) if image.width > short else short_side,
        int(short_side * image.height / short) if image.height > short else short_side,
    )
    resized = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    left, top = (middle((side - CROP) / 2) for side in size)
    pixels = np.asarray(resized.crop((left, top, left + CROP, top + CROP)), np.float32) / 255
    mean, deviation = (np.asarray(value, np.float32) for value in statistics)
    return ((pixels - mean) / deviation).transpose(2, 0, 1)


def load_dino(folder: Path) -> Judge:
    """DINO's ViT-S/16 (`facebook/dino-vits16`): its class token after the last norm.

    Raises InputError for a folder that is no ViT, or lacks a weight.
    """
    config = _config(folder, "--dino", "vit")
    model = _load(folder, "--dino", "ViTModel", add_pooling_layer=False)

    def pictures(images: Sequence[Image.Image]) -> Features:
        pixels = np.stack([preprocess(image, 256, IMAGENET, round) for image in images])
        return _run(lambda torch: model(torch.from_numpy(pixels)).last_hidden_state[:, 0])

    size = (config.get("hidden_size"), config.get("patch_size"))
    return Judge(
        "DINO",
        _digest(folder),
        {
            "folder": str(folder),
            "model": "ViT-S/16" if size == (384, 16) else
            f"not DreamBench's: width {size[0]}, patches of {size[1]} pixels, not ViT-S/16",
            "feature": "class token, after the last norm",
            "preprocessing": "short side 256, bicubic and antialiased (Pillow), middle 224 "
            "(rounded as torchvision does), ImageNet's mean and deviation",
        },
        pictures,
    )  # fmt: skip


def load_clip(folder: Path) -> Judge:
    """CLIP's ViT-B/32 (`openai/clip-vit-base-patch32`): projected picture and text features.

    Raises InputError for a folder that is no CLIP, or lacks a weight or its tokenizer.
    """
    config = _config(folder, "--clip", "clip")
    model = _load(folder, "--clip", "CLIPModel")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(f"--clip {folder}: no tokenizer in it ({_first_line(error)})") from None
    longest = model.config.text_config.max_position_embeddings

    def pictures(images: Sequence[Image.Image]) -> Features:
        pixels = np.stack([preprocess(image, 224, CLIP, int) for image in images])
        return _run(lambda torch: _pooled(model.get_image_features(torch.from_numpy(pixels))))

    def texts(prompts: Sequence[str]) -> Features:
        def run(_: Any) -> "Tensor":
            tokens = tokenizer(
                list(prompts), padding=True, truncation=True, max_length=longest,
                return_tensors="pt",
            )  # fmt: skip
            return _pooled(
                model.get_text_features(tokens["input_ids"], tokens.get("attention_mask"))
            )

        return _run(run)

    vision = config.get("vision_config") or {}
    size = (vision.get("hidden_size", 768), vision.get("patch_size", 32))
    return Judge(
        "CLIP",
        _digest(folder),
        {
            "folder": str(folder),
            "model": "ViT-B/32" if size == (768, 32) else
            f"not DreamBench's: width {size[0]}, patches of {size[1]} pixels, not ViT-B/32",
            "feature": "projected picture and text",
            "preprocessing": "short side 224, bicubic and antialiased (Pillow), middle 224 "
            "(rounded as transformers does), CLIP's mean and deviation",
            "text": f"the prompt as it is, no prefix, cut at {longest} tokens",
        },
        pictures,
        texts,
    )  # fmt: skip


def _run(forward: Callable[[Any], "Tensor"]) -> Features:
    """Features of length 1, computed in float32 on the CPU."""
    import torch

    with torch.inference_mode():
        features = forward(torch).float().numpy()
    return (features / np.linalg.norm(features, axis=-1, keepdims=True)).astype(np.float32)


def _pooled(output: Any) -> "Tensor":
    """Older versions of transformers give the features themselves."""
    return output if not hasattr(output, "pooler_output") else output.pooler_output


def _config(folder: Path, flag: str, kind: str) -> dict[str, Any]:
    if not folder.is_dir():
        raise InputError(f"{flag} {folder}: no such folder; give the folder of a downloaded model")
    config = read_json(folder / "config.json")
    if config.get("model_type") != kind:
        raise InputError(
            f"{flag} {folder}: a model of type {config.get('model_type')!r}; {kind!r} is wanted"
        )
    return config


def _load(folder: Path, flag: str, name: str, **options: Any) -> Any:
    try:
        import torch
        import transformers
    except ImportError:
        raise InputError(
            'judges run in PyTorch, which is not installed: pip install "squeeze-jax[evaluate]"'
        ) from None
    try:
        model, info = getattr(transformers, name).from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32,
            output_loading_info=True, **options,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{flag} {folder}: cannot be loaded ({_first_line(error)}); only safetensors are read: "
            f"transformers' {name}.from_pretrained(…).save_pretrained(DIR) writes them"
        ) from None
    if absent := sorted(info["missing_keys"]):
        raise InputError(f"{flag} {folder}: lacks {len(absent)} weights, such as {absent[0]}")
    return model.eval()


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]


def _digest(folder: Path) -> str:
    """Of the files that decide what a judge computes."""
    digest = hashlib.sha256()
    names = ("*.safetensors", "config.json", "tokenizer*.json", "vocab.json", "merges.txt")
    for path in sorted({path for name in names for path in folder.glob(name)}):
        with path.open("rb") as file:
            digest.update(json.dumps([path.name, path.stat().st_size]).encode())
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
