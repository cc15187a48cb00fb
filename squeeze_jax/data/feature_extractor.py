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
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image

from squeeze_jax.batch import HiddenStates
from squeeze_jax.checkpoints.build import DTYPES
from squeeze_jax.config import Config
from squeeze_jax.data.mllm import MLLM, InternVLMLLM, TransformersMLLM
from squeeze_jax.data.placement import shard_inputs
from squeeze_jax.errors import InputError
from squeeze_jax.interop.load import (
    autoencoder_source,
    check_autoencoder,
    encoder_folder,
    load_autoencoder,
)
from squeeze_jax.models.autoencoder import Autoencoder
from squeeze_jax.models.tiled_decoding import TILE, decode_tiles
from squeeze_jax.processes import to_host
from squeeze_jax.sharding import compiler_options, use_mesh

if TYPE_CHECKING:
    from squeeze_jax.data.record_writer import EncodedPrompt


class FeatureExtractor:
    """The MLLM and the autoencoder of a config."""

    mesh: Mesh | None = None
    """What their weights lie on; None is one device."""

    def __init__(
        self,
        load_reader: Callable[[], MLLM],
        autoencoder: Autoencoder,
        settings: dict[str, Any],
        mesh: Mesh | None = None,
    ) -> None:
        """`load_reader` reads the MLLM from its folder where a prompt comes and it is not there."""
        self._load_reader, self._reader = load_reader, None
        self.autoencoder, self.settings, self.mesh = autoencoder, settings, mesh
        self._encode = _compiled(autoencoder, lambda module, *x: module.encode_unpacked(*x), mesh)
        self._decode = _compiled(autoencoder, lambda module, x: module.decode_unpacked(x), mesh)

    @classmethod
    def of(cls, config: Config, mesh: Mesh | None = None) -> "FeatureExtractor":
        """A config's encoders, on a mesh as the sharding table says.

        Raises InputError where they do not fit the config's transformer and aggregator.
        """
        model, data = config.model, config.data
        folders = [
            encoder_folder(model.autoencoder, "autoencoder"),
            encoder_folder(model.mllm, "mllm"),
        ]

        of_latents = autoencoder_source(folders[0]).config
        check_autoencoder(model.autoencoder, of_latents, model.dit)  # before anything is loaded

        def load_reader() -> MLLM:
            if model.mllm_source == "transformers":
                return TransformersMLLM.load(
                    folders[1], data.system_text, model.dtype, data.max_text_tokens
                )
            return InternVLMLLM(
                folders[1],
                data.system_text,
                data.max_tiles,
                DTYPES[model.dtype],
                data.max_text_tokens,
                mesh=mesh,
            )

        reader = load_reader()
        autoencoder = load_autoencoder(folders[0], jnp.float32, mesh)
        for name, ours, theirs, folder in (
            (
                "model.latent_pixels",
                model.latent_pixels,
                of_latents.latent_pixels,
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
        encoders = cls(load_reader, autoencoder, reader.settings | digests, mesh)
        encoders._reader = reader
        return encoders

    def forget_reader(self) -> None:
        """Frees the MLLM's memory; the next prompt has it read from its folder again."""
        self._reader = None

    @property
    def reader(self) -> MLLM:
        """The MLLM with its tokenizer and processor."""
        if self._reader is None:
            self._reader = self._load_reader()
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

    def latents(
        self, images: list[np.ndarray], canvas: tuple[int, int] | None = None
    ) -> list[np.ndarray]:
        """Latents [h, w, c] of pictures [height, width, 3] in [−1, 1]: of one size, or of any
        sizes on a canvas that holds them."""
        sizes = np.array([image.shape[:2] for image in images], np.int32)
        if canvas is None or (sizes == canvas).all():
            return list(to_host(self._encode(np.stack(images))))
        whole = np.zeros((len(images), *canvas, 3), np.float32)
        for place, image in zip(whole, images):
            place[: image.shape[0], : image.shape[1]] = image
        cut = sizes // self.autoencoder.config.latent_pixels
        latents = to_host(self._encode(whole, sizes))
        return [one[:height, :width] for one, (height, width) in zip(latents, cut)]

    def decode(self, latents: np.ndarray | jax.Array) -> np.ndarray:
        """Pictures [B, height, width, 3] in [−1, 1] of latents [B, h, w, c]; large ones in
        tiles."""
        return self.decode_later(latents)()

    def decode_later(self, latents: np.ndarray | jax.Array) -> Callable[[], np.ndarray]:
        """`decode` of latents [B, h, w, c] in two: what is returned waits for the pictures, and
        until then the caller may have others drawn."""
        if max(latents.shape[1:3]) > TILE:
            return lambda: decode_tiles(
                lambda part: to_host(self._decode(part)), np.asarray(latents)
            )
        pictures = self._decode(latents)
        return lambda: to_host(pictures)


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


def _compiled(
    module: Autoencoder, function: Callable[..., jax.Array], mesh: Mesh | None
) -> Callable[..., jax.Array]:
    graph, state = nnx.split(module)

    def run(state: nnx.State, *x: jax.Array) -> jax.Array:
        if mesh is not None:  # small weights: gathered, so that no product is cut
            whole = NamedSharding(mesh, PartitionSpec())
            state = jax.lax.with_sharding_constraint(state, whole)
        with use_mesh(mesh):
            return function(nnx.merge(graph, state), *x)

    compiled = jax.jit(run, compiler_options=compiler_options(mesh))
    return lambda *x: compiled(state, *shard_inputs(mesh, x))
