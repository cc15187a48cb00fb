"""Stands in for the frozen encoders: features that depend on the input in a way a test can foresee."""

import ml_dtypes
import numpy as np
from PIL import Image

from squeeze_jax.data.record_writer import EncodedPrompt, Example

LAYERS, WIDTH, IMAGE_TOKENS = 3, 8, 4


class FakeEncoders:
    """A text token a letter, four image tokens a reference; a latent is the picture's mean of 8x8 patches, repeated."""

    def __init__(self, name="fake"):
        self.settings = {"mllm": name, "system_text": None}
        self.prompts = []
        self.picture_batches = []

    def hidden_states(self, prompts, images):
        self.prompts += prompts
        return [self._encode(prompt, pictures) for prompt, pictures in zip(prompts, images, strict=True)]

    def _encode(self, prompt, pictures):
        letters = np.frombuffer(prompt.encode(), np.uint8).astype(np.float32)
        image = np.repeat([np.asarray(p, np.float32).mean() for p in pictures], IMAGE_TOKENS)
        positions = np.arange(len(image) + len(letters), dtype=np.int32)
        return EncodedPrompt(
            text=_stack(letters),
            text_positions=positions[len(image) :],
            image=_stack(image),
            image_positions=positions[: len(image)],
        )

    def latents(self, images, canvas=None):
        assert canvas or len({image.shape for image in images}) == 1, "one size a call"
        self.picture_batches.append(len(images))
        return [_latent(image) for image in images]


def _stack(values):
    """[L] to [M, L, C]: value + layer in every channel."""
    stacked = values[None, :, None] + np.arange(LAYERS)[:, None, None] + np.zeros(WIDTH)
    return stacked.astype(ml_dtypes.bfloat16)


def _latent(image):
    height, width, _ = image.shape
    grey = image.reshape(height // 8, 8, width // 8, 8, 3).mean(axis=(1, 3, 4))
    return np.repeat(grey[..., None], 16, axis=-1).astype(np.float32)


def some_examples(count, reference_sizes=((64, 64), (32, 64), (48, 16))):
    """Examples with 0, 1, 2, 3, 0 … references of several sizes (width, height) and prompts of several lengths."""
    return [
        Example(
            prompt=f"number {i}" + "!" * (i % 3),
            references=[Image.new("RGB", size, (i % 256, 9, 9)) for size in reference_sizes[: i % 4]],
            target=Image.new("RGB", (64, 64), (0, i % 256, 0)),
        )
        for i in range(count)
    ]
