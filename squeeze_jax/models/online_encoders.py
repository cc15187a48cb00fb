"""The frozen encoders as part of a program: from raw pictures and token ids to what a feature
record holds."""

import jax.numpy as jnp
from flax import nnx

from squeeze_jax.array_types import Array, Float, UInt8
from squeeze_jax.batch import HiddenStates, RawBatch, References, TrainingBatch
from squeeze_jax.diffusion.latents import ReferencePositions, latent_grid, pack
from squeeze_jax.layers.norm import per_channel
from squeeze_jax.models.autoencoder import Autoencoder
from squeeze_jax.models.backbone import join_references
from squeeze_jax.models.internvl import InternVL, split_hidden_states

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the published image processor; the same as in `data.chat`."""


class Encoders(nnx.Module):
    """InternVL and the autoencoder, never trained."""

    def __init__(self, mllm: InternVL, autoencoder: Autoencoder) -> None:
        mllm.head = None  # it predicts words, which nobody asks for
        self.mllm, self.autoencoder = mllm, autoencoder

    def __call__(
        self, raw: RawBatch, layers: tuple[int, ...], positions_of: ReferencePositions
    ) -> TrainingBatch:
        """Computes the batch that records of the same examples would give, in bfloat16 as there.

        `layers`: which hidden states. `positions_of`: the backbone's (`BackboneConfig`).
        """
        # Pictures to latents: targets, and all references of all samples at once.
        targets = self.latents(raw.target)
        count = raw.references.shape[1]
        each = self.latents(raw.references.reshape(-1, *raw.references.shape[2:]))
        tokens = pack(each)
        tokens = tokens.reshape(len(raw.target), count, *tokens.shape[1:])
        row = [(tokens[:, i], latent_grid(each)) for i in range(count)]
        references = join_references(row, latent_grid(targets), positions_of)
        # Samples with fewer references than the batch's most: the rest is padding.
        exists = jnp.arange(count)[None] < raw.reference_count[:, None]
        mask = jnp.repeat(exists, tokens.shape[2], axis=1)
        kept = jnp.where(mask[..., None], references.tokens, 0.0)
        references = References(kept, mask, references.positions)
        return TrainingBatch(pack(targets), self.hidden_states(raw, layers), references, raw.index)

    def latents(self, pixels: UInt8[Array, "B height width 3"]) -> Float[Array, "B h w c"]:
        """Latents of pictures 0 .. 255, after shift and scale, float32."""
        return self.autoencoder.encode_unpacked(pixels.astype(jnp.float32) / 127.5 - 1.0)

    def hidden_states(self, raw: RawBatch, layers: tuple[int, ...]) -> HiddenStates:
        """Some of the MLLM's hidden states, text and image tokens apart."""
        unit = raw.tiles.astype(jnp.float32) / 255.0
        mean, deviation = (
            per_channel(jnp.array(values), unit) for values in (IMAGENET_MEAN, IMAGENET_STD)
        )
        tiles = (unit - mean) / deviation
        hidden = self.mllm(raw.ids, tiles, raw.valid)[:, jnp.array(layers)].astype(jnp.bfloat16)
        image = raw.tiles.shape[1] * self.mllm.config.image_tokens
        return split_hidden_states(
            hidden, raw.ids, raw.valid, self.mllm.config.image_token_id,
            text_length=raw.ids.shape[1] - image, image_length=image,
        )  # fmt: skip
