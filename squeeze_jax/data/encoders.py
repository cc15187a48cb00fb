"""The frozen encoders as extraction and sampling use them: prompts and pictures in, hidden states and latents out."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from squeeze_jax.array_types import DType
from squeeze_jax.batch import HiddenStates
from squeeze_jax.config import Config
from squeeze_jax.data.chat import MAX_TEXT_TOKENS, build_input, load_tokenizer, pad_inputs, preprocess_image
from squeeze_jax.errors import InputError
from squeeze_jax.interop.build import DTYPES
from squeeze_jax.interop.load import encoder_folder, load_autoencoder, load_internvl
from squeeze_jax.models.internvl import split_hidden_states

if TYPE_CHECKING:
    from squeeze_jax.data.extract import EncodedPrompt

TEXT_BUCKET = 32
"""Text tokens are padded to a multiple of this, so that a new prompt compiles nothing new."""


class FrozenEncoders:
    """InternVL and the autoencoder, compiled per shape."""

    def __init__(
        self,
        autoencoder: str | Path,
        mllm: str | Path,
        *,
        system_text: str | None = None,
        dtype: DType = jnp.float32,
    ) -> None:
        """Loads both folders (`demo`: the shipped miniature) and computes in `dtype`."""
        folders = [encoder_folder(autoencoder, "autoencoder"), encoder_folder(mllm, "mllm")]
        self.autoencoder = load_autoencoder(folders[0], jnp.float32)
        self.mllm = load_internvl(folders[1], dtype)
        self.tokenizer = load_tokenizer(folders[1])
        self.system_text = system_text
        self._folders = folders
        self._encode = _compiled(self.autoencoder, lambda module, x: module.encode(x))
        self._decode = _compiled(self.autoencoder, lambda module, x: module.decode(x))
        self._read = _compiled(self.mllm, self._states)

    @classmethod
    def of(cls, config: Config) -> "FrozenEncoders":
        """A config's encoders. Raises InputError where they do not fit its transformer and aggregator."""
        encoders = cls(
            config.model.autoencoder,
            config.model.mllm,
            system_text=config.data.system_text,
            dtype=DTYPES[config.model.dtype],
        )
        autoencoder, text = encoders.autoencoder.config, encoders.mllm.config.text
        wanted = (
            ("model.latent_pixels", config.model.latent_pixels, autoencoder.downsampling, config.model.autoencoder),
            (
                "model.dit.in_channels",
                config.model.dit.in_channels,
                4 * autoencoder.latent_channels,
                config.model.autoencoder,
            ),
            ("aggregator.width", config.aggregator.width, text.hidden_size, config.model.mllm),
        )
        for name, ours, theirs, folder in wanted:
            if ours != theirs:
                raise InputError(f"{name} is {ours}, but {folder!r} makes it {theirs}; change one of them")
        most = text.num_hidden_layers
        if config.aggregator.layers[-1] > most:
            raise InputError(
                f"aggregator.layers asks for hidden state {config.aggregator.layers[-1]}; "
                f"{config.model.mllm!r} has 0 to {most}"
            )
        return encoders

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the features: digests of both folders' weights and the system text."""
        names = ("autoencoder", "mllm")
        return {"system_text": self.system_text} | {n: digest(f) for n, f in zip(names, self._folders)}

    def _states(self, mllm: Any, ids: jax.Array, pixels: jax.Array, mask: jax.Array) -> HiddenStates:
        """All hidden states, text and image tokens apart: both lengths follow from the shapes."""
        hidden = mllm(ids, pixels if pixels.shape[0] else None, mask)
        image = mllm.config.image_tokens * (pixels.shape[0] // ids.shape[0])
        return split_hidden_states(
            hidden, ids, mask, mllm.config, text_length=ids.shape[1] - image, image_length=image
        )

    def read(self, prompts: list[str], images: list[list[Image.Image]]) -> HiddenStates:
        """Hidden states of prompts with their references, padded to buckets of static shape.

        Raises InputError for an empty or too long prompt.
        """
        config = self.mllm.config
        per_image, tile = config.image_tokens, config.vision.image_size
        sequences = [
            build_input(self.tokenizer, prompt, [per_image] * len(row), self.system_text)
            for prompt, row in zip(prompts, images, strict=True)
        ]
        most_images = max(map(len, images))
        text = max(len(s) - per_image * len(row) for s, row in zip(sequences, images))
        text = min(-(-text // TEXT_BUCKET) * TEXT_BUCKET, MAX_TEXT_TOKENS)
        ids, mask = pad_inputs(sequences, text + per_image * most_images)
        tiles = [preprocess_image(image, tile) for row in images for image in row]
        tiles += [np.zeros((tile, tile, 3), np.float32)] * (most_images * len(prompts) - len(tiles))
        pixels = np.stack(tiles) if tiles else np.zeros((0, tile, tile, 3), np.float32)
        return self._read(ids, pixels, mask)

    def hidden_states(self, prompts: list[str], images: list[list[Image.Image]]) -> list["EncodedPrompt"]:
        """The same, one unpadded result a sample: what a feature record keeps."""
        from squeeze_jax.data.extract import EncodedPrompt  # brings TFDS along, which sampling has no use for

        states = jax.tree.map(np.asarray, self.read(prompts, images))
        return [
            EncodedPrompt(
                states.text[i, :, states.text_mask[i]].swapaxes(0, 1),
                states.text_positions[i, states.text_mask[i]],
                states.image[i, :, states.image_mask[i]].swapaxes(0, 1),
                states.image_positions[i, states.image_mask[i]],
            )
            for i in range(len(prompts))
        ]

    def latents(self, images: list[np.ndarray]) -> list[np.ndarray]:
        """Latents [h, w, c] of pictures [height, width, 3] in [−1, 1] of one size."""
        return list(np.asarray(self._encode(np.stack(images))))

    def decode(self, latents: np.ndarray | jax.Array) -> np.ndarray:
        """Pictures [B, height, width, 3] in [−1, 1] of latents [B, h, w, c]."""
        return np.asarray(self._decode(latents))


def digest(folder: Path) -> str:
    """SHA-256 (16 hex digits) over a folder's JSON and safetensors files."""
    sha = hashlib.sha256()
    for file in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")]):
        with file.open("rb") as stream:
            sha.update(hashlib.file_digest(stream, "sha256").digest())
    return sha.hexdigest()[:16]


def _compiled(module: nnx.Module, function: Any) -> Any:
    graph, state = nnx.split(module)
    compiled = jax.jit(lambda state, *inputs: function(nnx.merge(graph, state), *inputs))
    return lambda *inputs: compiled(state, *inputs)
