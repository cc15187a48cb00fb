"""Judges against transformers' processor, torchvision's formulas, models that are called."""

import json

import numpy as np
import pytest
from PIL import Image
from skimage import data

from squeeze_jax.errors import InputError

torch = pytest.importorskip("torch")

from tiny_judges import save_clip, save_dino  # noqa: E402

from squeeze_jax.evaluation.judges import (  # noqa: E402
    CLIP,
    IMAGENET,
    load_clip,
    load_dino,
    preprocess,
)

SIZES = [(224, 224), (225, 301), (640, 427), (97, 500), (333, 333), (512, 300)]


def picture(width, height):
    """A photograph stretched to a size, with detail that resampling tells apart."""
    return Image.fromarray(data.astronaut()).resize((width, height), Image.Resampling.LANCZOS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("judges")


@pytest.fixture(scope="module")
def dino(folder):
    return save_dino(folder / "dino"), load_dino(folder / "dino")


@pytest.fixture(scope="module")
def clip(folder):
    return save_clip(folder / "clip"), load_clip(folder / "clip")


@pytest.mark.parametrize("size", SIZES)
def test_clips_preprocessing_is_transformers_to_the_pixel(size):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    image = picture(*size)
    theirs = CLIPImageProcessorPil()(image, return_tensors="np")["pixel_values"][0]
    mine = preprocess(image, 224, CLIP, int)
    mean, deviation = (np.asarray(value)[:, None, None] for value in CLIP)
    pixels = [np.rint((one * deviation + mean) * 255) for one in (mine, theirs)]
    assert np.array_equal(*pixels)
    np.testing.assert_allclose(mine, theirs, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_dinos_preprocessing_is_torchvisions_formula(size):
    """Resize(256, bicubic), CenterCrop(224), ToTensor, Normalize, as torchvision writes them for
    Pillow: the long side is int(256 · long / short), the border int(round(difference / 2))."""
    image = picture(*size)
    width, height = size
    if width <= height:
        resized = image.resize((256, int(256 * height / width)), Image.Resampling.BICUBIC)
    else:
        resized = image.resize((int(256 * width / height), 256), Image.Resampling.BICUBIC)
    top, left = round((resized.height - 224) / 2.0), round((resized.width - 224) / 2.0)
    tensor = torch.from_numpy(np.array(resized)[top : top + 224, left : left + 224])
    tensor = tensor.permute(2, 0, 1).to(torch.float32).div(255)
    mean, deviation = (torch.tensor(value)[:, None, None] for value in IMAGENET)
    wanted = tensor.sub_(mean).div_(deviation)
    assert np.array_equal(preprocess(image, 256, IMAGENET, round), wanted.numpy())


def test_the_two_ways_of_rounding_differ_where_a_border_is_odd():
    image = picture(227, 224)  # a border of 1.5 pixels
    one, other = (preprocess(image, 224, CLIP, middle) for middle in (int, round))
    assert np.array_equal(one[:, :, 1:], other[:, :, :-1])


def test_dinos_features_are_the_class_token(dino):
    model, judge = dino
    images = [picture(*size) for size in SIZES[:3]]
    pixels = np.stack([preprocess(image, 256, IMAGENET, round) for image in images])
    with torch.no_grad():
        tokens = model(torch.from_numpy(pixels)).last_hidden_state[:, 0]
    wanted = torch.nn.functional.normalize(tokens).numpy()
    np.testing.assert_allclose(judge.pictures(images), wanted, atol=1e-5)


def test_clips_similarities_are_transformers_own(clip, folder):
    """`logits_per_image` of the whole model, from its own processor and tokenizer."""
    from transformers import AutoTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    model, judge = clip
    images = [picture(*size) for size in SIZES[:3]]
    texts = ["a dog in the snow", "a red can", "word " * 60]
    tokens = AutoTokenizer.from_pretrained(folder / "clip")(
        texts, padding=True, truncation=True, max_length=77, return_tensors="pt"
    )
    pixels = CLIPImageProcessorPil()(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        output = model(pixel_values=pixels, **tokens)
        wanted = (output.logits_per_image / model.logit_scale.exp()).numpy()
    mine = judge.pictures(images) @ judge.texts(texts).T
    np.testing.assert_allclose(mine, wanted, atol=1e-5)
    assert np.ptp(wanted) > 1e-3  # else nothing was compared
    alone = np.concatenate([judge.texts([text]) for text in texts])
    np.testing.assert_allclose(judge.texts(texts), alone, atol=1e-5)  # padding changes nothing


def test_another_model_than_dreambenchs_is_said(dino, clip):
    assert "not DreamBench's" in dino[1].choices["model"]
    assert "not DreamBench's" in clip[1].choices["model"]


def test_a_digest_follows_the_weights(dino, folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / "dino" / name).read_bytes())
    assert load_dino(tmp_path).digest == dino[1].digest
    raw = bytearray((tmp_path / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(raw)
    assert load_dino(tmp_path).digest != dino[1].digest


def test_folders_that_are_no_judge_are_refused(dino, clip, folder, tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        load_dino(tmp_path / "nowhere")
    with pytest.raises(InputError, match="'clip'; 'vit' is wanted"):
        load_dino(folder / "clip")
    (tmp_path / "config.json").write_text((folder / "dino" / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(InputError, match="only safetensors are read"):
        load_dino(tmp_path)


def test_a_judge_without_all_its_weights_is_refused(dino, folder, tmp_path):
    """transformers fills them with random numbers and goes on."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "dino" / "model.safetensors")
    del tensors[next(name for name in tensors if name.endswith("layernorm.weight"))]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "dino" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="lacks 1 weights"):
        load_dino(tmp_path)
