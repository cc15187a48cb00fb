"""The frozen encoders as extraction and sampling use them: prompts and pictures in, hidden states
and latents out."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from squeeze_jax.batch import HiddenStates
from squeeze_jax.checkpoints.build import DTYPES
from squeeze_jax.config import Config
from squeeze_jax.data.mllm import MLLM, InternVLMLLM, TransformersMLLM
from squeeze_jax.errors import InputError
from squeeze_jax.interop.load import encoder_folder, load_autoencoder
from squeeze_jax.models.autoencoder import Autoencoder
from squeeze_jax.models.tiled_decoding import TILE, decode_tiles

if TYPE_CHECKING:
    from squeeze_jax.data.record_writer import EncodedPrompt


class FeatureExtractor:
    """The MLLM and the autoencoder of a config."""

    def __init__(self, reader: MLLM, autoencoder: Autoencoder, settings: dict[str, Any]) -> None:
        self._reader: MLLM | None = reader
        self.autoencoder, self.settings = autoencoder, settings
        self._encode = _compiled(autoencoder, lambda module, x: module.encode(x))
        self._decode = _compiled(autoencoder, lambda module, x: module.decode(x))

    @classmethod
    def of(cls, config: Config) -> "FeatureExtractor":
        """A config's encoders. Raises InputError where they do not fit its transformer and
        aggregator."""
        model, data = config.model, config.data
        folders = [
            encoder_folder(model.autoencoder, "autoencoder"),
            encoder_folder(model.mllm, "mllm"),
        ]
        reader: MLLM
        if model.mllm_source == "transformers":
            reader = TransformersMLLM.load(
                folders[1], data.system_text, model.dtype, data.max_text_tokens
            )
        else:
            reader = InternVLMLLM(
                folders[1],
                data.system_text,
                data.max_tiles,
                DTYPES[model.dtype],
                data.max_text_tokens,
            )
        autoencoder = load_autoencoder(folders[0], jnp.float32)
        of_latents = autoencoder.config
        for name, ours, theirs, folder in (
            (
                "model.latent_pixels",
                model.latent_pixels,
                of_latents.downsampling,
                model.autoencoder,
            ),
            (
                "model.dit.in_channels",
                model.dit.in_channels,
                4 * of_latents.latent_channels,
                model.autoencoder,
            ),
            ("aggregator.width", config.aggregator.width, reader.width, model.mllm),
        ):
            if ours != theirs:
                raise InputError(
                    f"{name} is {ours}, but {folder!r} makes it {theirs}; change one of them"
                )
        if config.aggregator.layers[-1] > reader.layers:
            raise InputError(
                f"aggregator.layers asks for hidden state {config.aggregator.layers[-1]}; "
                f"{model.mllm!r} has 0 to {reader.layers}"
            )
        # What decides the features: digests of both folders' weights, and how the MLLM is spoken
        # to.
        digests = {name: digest(folder) for name, folder in zip(("autoencoder", "mllm"), folders)}
        return cls(reader, autoencoder, reader.settings | digests)

    def forget_reader(self) -> None:
        """Frees the MLLM's memory; no prompt can be read any more."""
        self._reader = None

    @property
    def reader(self) -> MLLM:
        """The MLLM with its tokenizer and processor."""
        if self._reader is None:
            raise RuntimeError("the MLLM is gone: forget_reader was called")
        return self._reader

    def read(self, prompts: list[str], images: list[list[Image.Image]]) -> HiddenStates:
        """Hidden states of prompts with their references, padded. Raises InputError for an empty or
        too long prompt."""
        return self.reader.read(prompts, images)

    def hidden_states(
        self, prompts: list[str], images: list[list[Image.Image]]
    ) -> list["EncodedPrompt"]:
        """The same, one unpadded result a sample: what a feature record keeps."""
        from squeeze_jax.data.record_writer import (
            EncodedPrompt,
        )  # brings TFDS along, which sampling has no use for

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
        """Pictures [B, height, width, 3] in [−1, 1] of latents [B, h, w, c]; large ones in
        tiles."""
        return self.decode_later(latents)()

    def decode_later(self, latents: np.ndarray | jax.Array) -> Callable[[], np.ndarray]:
        """`decode` in two: what is returned waits for the pictures, and until then the caller may
        have others drawn."""
        if max(latents.shape[1:3]) > TILE:
            return lambda: decode_tiles(
                lambda part: np.asarray(self._decode(part)), np.asarray(latents)
            )
        pictures = self._decode(latents)
        return lambda: np.asarray(pictures)


def digest(folder: Path) -> str:
    """SHA-256 (16 hex digits) over a folder's JSON and safetensors files, or over the one file."""
    sha = hashlib.sha256()
    files = (
        [folder]
        if folder.is_file()
        else sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")])
    )
    for file in files:
        with file.open("rb") as stream:
            sha.update(hashlib.file_digest(stream, "sha256").digest())
    return sha.hexdigest()[:16]


def _compiled(module: nnx.Module, function: Any) -> Any:
    graph, state = nnx.split(module)
    compiled = jax.jit(lambda state, *inputs: function(nnx.merge(graph, state), *inputs))
    return lambda *inputs: compiled(state, *inputs)
