"""What reads a prompt and its references: our InternVL beside PyTorch's, and any other model of transformers."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from qwen_like import PROMPT, qwen_like
from small_internvl import INTERNVL, write_internvl
from tiny import tiny_config

from squeeze_jax.data.chat import IMAGE, IMAGENET_MEAN, IMAGENET_STD, image_tiles
from squeeze_jax.data.feature_extractor import FeatureExtractor, digest
from squeeze_jax.data.mllm import InternVLMLLM, TransformersMLLM
from squeeze_jax.errors import InputError

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% for c in m.content %}{% if c.type == 'image' %}PICTURE\n{% else %}{{ c.text }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}"
)


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


PROMPTS = [PROMPT, "one critter", "a critter and a critter in the city"]
PICTURES = [[picture(20, 30)], [], [picture(64, 16, 1), picture(32, 33, 2)]]


def close(ours, theirs, tolerance: float = 1e-5) -> None:
    """Two readers' states: the same tokens at the same places, and valid values that agree."""
    ours, theirs = jax.tree.map(np.asarray, (ours, theirs))
    for name in ("text", "image"):
        for field in (f"{name}_mask", f"{name}_positions"):
            np.testing.assert_array_equal(getattr(ours, field), getattr(theirs, field), err_msg=field)
        a, b = getattr(ours, name), getattr(theirs, name)
        assert a.shape == b.shape
        for layer in range(a.shape[1]):
            error, size = np.linalg.norm(a[:, layer] - b[:, layer]), np.linalg.norm(b[:, layer])
            assert error <= tolerance * size, (name, layer, error, size)  # no image tokens at all: 0 <= 0


# --- our InternVL beside PyTorch's, each with its own processing ----------------------------------------------------


class PublishedProcessor:
    """What the published processor does, by its own parts: its class cannot be made without video libraries."""

    def __init__(self, tokenizer, most: int) -> None:
        from transformers import PreTrainedTokenizerFast
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
            GotOcr2ImageProcessorPil,
        )

        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", padding_side="left", chat_template=TEMPLATE
        )
        self.images = GotOcr2ImageProcessorPil(
            size={"height": 16, "width": 16}, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD,
            crop_to_patches=True, max_patches=most,
        )  # fmt: skip

    def apply_chat_template(self, conversations, **options):
        texts, pixels = [], []
        for conversation in conversations:
            text = self.tokenizer.apply_chat_template(conversation, tokenize=False)
            for part in conversation[-1]["content"]:
                if part["type"] == "image":
                    found = self.images(images=part["image"], return_tensors="pt")
                    tokens = IMAGE * (INTERNVL.image_tokens * int(found["num_patches"][0]))
                    text = text.replace("PICTURE", f"<img>{tokens}</img>", 1)
                    pixels.append(found["pixel_values"])
            texts.append(text)
        batch = self.tokenizer(texts, padding=True, return_tensors="pt")
        if pixels:
            import torch

            batch["pixel_values"] = torch.cat(pixels)
        return batch


@pytest.fixture(scope="module")
def internvl_folder(tmp_path_factory):
    tokenizer = qwen_like()
    tokenizer.add_special_tokens(["<pad>"])
    config = dataclasses.replace(INTERNVL, image_token_id=tokenizer.token_to_id(IMAGE))
    folder = write_internvl(tmp_path_factory.mktemp("mllm") / "internvl", config)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize(("system", "tiles"), [(None, 1), ("You draw critters.", 1), (None, 4)])
def test_our_internvl_reads_as_pytorchs_does(internvl_folder, system, tiles):
    torch = pytest.importorskip("torch", reason="parity needs PyTorch")
    from transformers import InternVLForConditionalGeneration

    model = InternVLForConditionalGeneration.from_pretrained(internvl_folder, dtype=torch.float32)
    ours = InternVLMLLM(internvl_folder, system, tiles, jnp.float32)
    theirs = TransformersMLLM(PublishedProcessor(ours.tokenizer, tiles), model, system)
    assert (ours.width, ours.layers) == (theirs.width, theirs.layers) == (48, 3)
    expected = theirs.read(PROMPTS, PICTURES)
    counts = [sum(len(image_tiles(image, 16, tiles)) for image in row) for row in PICTURES]
    assert np.asarray(expected.image_mask).sum(axis=1).tolist() == [4 * count for count in counts]
    assert tiles == 1 or max(counts) > 2
    close(ours.read(PROMPTS, PICTURES), expected)
    close(ours.read(PROMPTS[:1], [[]]), theirs.read(PROMPTS[:1], [[]]))


def test_a_tokenizer_of_another_model_is_refused(internvl_folder, tmp_path):
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes((internvl_folder / name).read_bytes())
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"image_token_id": 3}))
    with pytest.raises(InputError, match=r"tokenizer\.json gives <IMG_CONTEXT> the id \d+, config\.json 3"):
        InternVLMLLM(tmp_path, None, 1, jnp.float32)
    larger = qwen_like()
    larger.add_tokens([f"<word {i}>" for i in range(400)])
    larger.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"the model embeds 600 tokens"):
        InternVLMLLM(tmp_path, None, 1, jnp.float32)


def test_tiles_are_part_of_what_decides_the_features(internvl_folder):
    one, four = (InternVLMLLM(internvl_folder, None, tiles, jnp.float32).settings for tiles in (1, 4))
    assert one == {"system_text": None}
    assert four == {"system_text": None, "max_tiles": 4}


# --- another model of transformers ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llava_folder(tmp_path_factory):
    """A small LLaVA: other vision tower, other language model, other processor, other template."""
    torch = pytest.importorskip("torch", reason="parity needs PyTorch")
    transformers = pytest.importorskip("transformers")
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = qwen_like()
    tokenizer.add_special_tokens(["<image>", "<pad>"])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", extra_special_tokens={"image_token": "<image>"}
    )
    processor = transformers.LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer=fast, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("PICTURE", "<image>"),
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=28,
            patch_size=14, projection_dim=32,
        ),
        text_config=transformers.LlamaConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            vocab_size=tokenizer.get_vocab_size(),
        ),
        image_token_index=tokenizer.token_to_id("<image>"), vision_feature_layer=-1,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("mllm") / "llava"
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_any_image_text_to_text_model_is_a_source(llava_folder):
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    reader = TransformersMLLM.load(llava_folder, "Draw.", "float32")
    assert (reader.width, reader.layers) == (16, 2)
    states = jax.tree.map(np.asarray, reader.read(PROMPTS, PICTURES))
    assert states.text.shape[:2] == (3, 3)
    processor = AutoProcessor.from_pretrained(llava_folder)
    model = LlavaForConditionalGeneration.from_pretrained(llava_folder, dtype=torch.float32).eval()
    for row, (prompt, images) in enumerate(zip(PROMPTS, PICTURES)):  # alone, without padding, the plain way
        pictures = "<image>\n" * len(images)
        said = f"<|im_start|>system\nDraw.<|im_end|>\n<|im_start|>user\n{pictures}{prompt}<|im_end|>\n"
        inputs = processor(images=images or None, text=said, return_tensors="pt")
        ids = inputs["input_ids"][0].numpy()
        is_image = ids == reader.image_token
        with torch.no_grad():
            hidden = torch.cat(model(**inputs, output_hidden_states=True).hidden_states).numpy()
        for name, which in (("text", ~is_image), ("image", is_image)):
            valid = getattr(states, f"{name}_mask")[row]
            np.testing.assert_array_equal(getattr(states, f"{name}_positions")[row, valid], np.flatnonzero(which))
            np.testing.assert_allclose(getattr(states, name)[row][:, valid], hidden[:, which], rtol=1e-4, atol=1e-5)
        assert is_image.sum() == 4 * len(images)


def test_encoders_of_a_config_with_that_source(llava_folder):
    config = tiny_config()
    model = dataclasses.replace(config.model, mllm=str(llava_folder), mllm_source="transformers", latent_pixels=4)
    model = dataclasses.replace(model, dit=dataclasses.replace(model.dit, in_channels=32))
    encoders = FeatureExtractor.of(dataclasses.replace(config, model=model))
    assert encoders.settings["source"] == "transformers"
    assert encoders.settings["mllm"] == digest(llava_folder)
    json.dumps(encoders.settings)
    (one, two) = encoders.hidden_states(PROMPTS[:2], PICTURES[:2])
    assert one.image.shape == (3, 4, 16)
    assert two.image.shape == (3, 0, 16)
    aggregator = dataclasses.replace(config.aggregator, layers=(0, 1, 3))
    with pytest.raises(InputError, match="asks for hidden state 3"):
        FeatureExtractor.of(dataclasses.replace(config, model=model, aggregator=aggregator))


@pytest.mark.parametrize("name", ["<image>", "<|im_end|>", "<tool_call>"])
def test_a_special_token_in_the_prompt_is_refused(llava_folder, name):
    reader = TransformersMLLM.load(llava_folder, None, "float32")
    with pytest.raises(InputError, match="special token of this model"):
        reader.read([f"a critter {name}"], [[]])
    with pytest.raises(InputError, match="the prompt is empty"):
        reader.read([" "], [[]])
    with pytest.raises(InputError, match="the limit is 256"):
        reader.read(["critter " * 400], [[]])


def test_a_folder_that_transformers_cannot_load_is_named(tmp_path):
    pytest.importorskip("torch", reason="parity needs PyTorch")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=f"{tmp_path}: transformers cannot load it"):
        TransformersMLLM.load(tmp_path, None, "float32")


def test_a_single_file_has_a_digest_of_its_own(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"one")
    (tmp_path / "b.safetensors").write_bytes(b"two")
    assert digest(tmp_path / "a.safetensors") != digest(tmp_path / "b.safetensors")
