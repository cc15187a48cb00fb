"""Judges with random weights, and a DreamBench of drawn subjects, written as they are published."""

from pathlib import Path

import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, ViTConfig, ViTModel

REFERENCES = Path(__file__).parents[1] / "squeeze_jax" / "demo" / "references"
PROMPTS_FILE = """Classes

subject_name,class
can,can
dog,dog

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in the jungle'.format(unique_token, class_token),
'a red {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} in the snow'.format(unique_token, class_token),
'a {0} {1} wearing a santa hat'.format(unique_token, class_token)
]
"""


def save_dino(folder: Path) -> ViTModel:
    """A ViT of patches of 16 pixels."""
    torch.manual_seed(0)
    model = ViTModel(
        ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64),
        add_pooling_layer=False,
    )
    _randomize(model)
    model.save_pretrained(folder)
    return model.eval()


def save_clip(folder: Path) -> CLIPModel:
    """A CLIP with a tokenizer of letters."""
    torch.manual_seed(1)
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocab = [*letters, *(f"{one}</w>" for one in letters), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={token: i for i, token in enumerate(vocab)}, merges=[]).save_pretrained(
        folder
    )
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    text = sizes | {"vocab_size": len(vocab), "num_attention_heads": 2}
    # 2 is what published configs say, and means: the token of the highest number ends a text.
    text |= {"bos_token_id": len(vocab) - 2, "eos_token_id": 2}
    vision = sizes | {"num_attention_heads": 2, "patch_size": 32, "image_size": 224}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    _randomize(model)
    model.save_pretrained(folder)
    return model.eval()


def _randomize(model: torch.nn.Module) -> None:
    """Biases, norms and projections that do something."""
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn_like(value))


def save_dreambench(folder: Path) -> Path:
    """Two subjects, two prompts each: `dog` has pictures 00 to 02 (the table shows 02), `can` 00
    and 01 (01)."""
    for subject, numbers in {"dog": (0, 1, 2), "can": (3, 4)}.items():
        place = folder / "dataset" / subject
        place.mkdir(parents=True)
        for i, number in enumerate(numbers):
            picture = Image.open(REFERENCES / f"critter-{number}.png").convert("RGB")
            picture.resize((120 + 10 * i, 96)).save(place / f"{i:02d}.jpg")
    (folder / "dataset" / "prompts_and_classes.txt").write_text(PROMPTS_FILE)
    return folder
