"""FLUX.2's autoencoder (diffusers 0.42.1's `AutoencoderKLFlux2`), channels last.

It is FLUX.1's with 32 latent channels, a 1x1 convolution at the encoder's end and at the decoder's
start, and another way to normalise: raw latents are packed 2 x 2 to 128 channels; each channel then
loses its stored mean and is divided by its stored deviation. So a latent that `encode` gives is a
token of the transformer, and stands for 16 x 16 pixels.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx

from squeeze_jax.array_types import Array, DType, Float, Int
from squeeze_jax.diffusion.latents import PATCH, pack, unpack
from squeeze_jax.errors import InputError
from squeeze_jax.layers.convolution import Conv
from squeeze_jax.layers.norm import per_channel
from squeeze_jax.models.autoencoder import Autoencoder, AutoencoderConfig, Decoder, Encoder
from squeeze_jax.models.tiled_decoding import TILE as TILE_OF_UNPACKED

TILE = TILE_OF_UNPACKED // PATCH
"""Latents along a tile's side for `tiled_decoding.decode_tiles`: 1,024 pixels, as for FLUX.1."""


@dataclass(frozen=True)
class Flux2AutoencoderConfig:
    """FLUX.2's autoencoder by default; the field names are those of diffusers' `config.json`."""

    in_channels: int = 3
    latent_channels: int = 32
    """Channels before packing; `encode` gives four times as many."""
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    """Width of each resolution, from the pictures' to the latents'; each step halves the size."""
    decoder_block_out_channels: tuple[int, ...] | None = None
    """The decoder's widths, in the same order; None: the encoder's."""
    layers_per_block: int = 2
    norm_groups: int = 32
    batch_norm_eps: float = 1e-4
    """Added to the stored variances."""

    def __post_init__(self) -> None:
        if len(self.decoder.block_out_channels) != len(self.encoder.block_out_channels):
            raise InputError(
                f"the autoencoder's decoder_block_out_channels {self.decoder_block_out_channels} "
                f"must be as many as block_out_channels {self.block_out_channels}"
            )
        if self.batch_norm_eps <= 0:
            raise InputError(f"batch_norm_eps is {self.batch_norm_eps}; it must be positive")

    @property
    def encoder(self) -> AutoencoderConfig:
        """Sizes of the encoder without its last convolution."""
        return self._sizes(self.block_out_channels)

    @property
    def decoder(self) -> AutoencoderConfig:
        """Sizes of the decoder without its first convolution."""
        return self._sizes(self.decoder_block_out_channels or self.block_out_channels)

    @property
    def downsampling(self) -> int:
        """Pixels that a packed latent stands for, along one side (16)."""
        return self.encoder.downsampling * PATCH

    @property
    def latent_pixels(self) -> int:
        """Pixels that an unpacked latent stands for, along one side (8)."""
        return self.encoder.downsampling

    def _sizes(self, widths: tuple[int, ...]) -> AutoencoderConfig:
        return AutoencoderConfig(
            in_channels=self.in_channels,
            latent_channels=self.latent_channels,
            block_out_channels=widths,
            layers_per_block=self.layers_per_block,
            norm_groups=self.norm_groups,
        )


class Flux2Autoencoder(Autoencoder):
    """Encoder, decoder, and the packing and normalisation between them.

    `encode` and `sample` give latents [B, height/16, width/16, 128], and `decode` takes them.
    `posterior` is that of the raw latents [B, height/8, width/8, 32].
    """

    def __init__(
        self,
        config: Flux2AutoencoderConfig,
        *,
        dtype: DType = jnp.float32,
        param_dtype: DType = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        kinds: Any = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.config = config
        self.encoder = Flux2Encoder(config.encoder, **kinds)
        self.decoder = Flux2Decoder(config.decoder, **kinds)
        self.bn = ChannelStatistics(
            config.latent_channels * PATCH**2, config.batch_norm_eps, param_dtype=param_dtype
        )

    def encode_unpacked(
        self, images: Float[Array, "B height width 3"], sizes: Int[Array, "B 2"] | None = None
    ) -> Float[Array, "B h w c"]:
        """Normalised latents [B, height/8, width/8, 32]: `encode`'s, taken apart again."""
        return self._unpack(self.encode(images, sizes))

    def decode_unpacked(self, latents: Float[Array, "B h w c"]) -> Float[Array, "B height width 3"]:
        """`decode` of what `encode_unpacked` gives."""
        return self.decode(self._pack(latents))

    def normalise(self, raw: Float[Array, "B h w c"]) -> Float[Array, "B h2 w2 C"]:
        """Packs 2 x 2 raw latents to one of four times the channels, then normalises these."""
        return self.bn.normalise(self._pack(raw))

    def denormalise(self, latents: Float[Array, "B h w C"]) -> Float[Array, "B h2 w2 c"]:
        """The inverse of `normalise`."""
        return self._unpack(self.bn.denormalise(latents))

    @staticmethod
    def _pack(x: Float[Array, "B h w c"]) -> Float[Array, "B h2 w2 C"]:
        batch, height, width, _ = x.shape
        return pack(x).reshape(batch, height // PATCH, width // PATCH, -1)

    @staticmethod
    def _unpack(x: Float[Array, "B h w C"]) -> Float[Array, "B h2 w2 c"]:
        batch, rows, columns, channels = x.shape
        return unpack(x.reshape(batch, rows * columns, channels), (rows, columns))


class Flux2Encoder(Encoder):
    """FLUX.1's encoder, then a 1x1 convolution on the moments."""

    def __init__(
        self, config: AutoencoderConfig, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs
    ) -> None:
        kinds: Any = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        super().__init__(config, **kinds)
        channels = 2 * config.latent_channels
        self.quant_conv = Conv(channels, channels, size=1, **kinds)

    def __call__(
        self, images: Float[Array, "B height width 3"], sizes: Int[Array, "B 2"] | None = None
    ) -> Float[Array, "B h w C"]:
        return self.quant_conv(super().__call__(images, sizes))


class Flux2Decoder(Decoder):
    """A 1x1 convolution on the raw latents, then FLUX.1's decoder."""

    def __init__(
        self, config: AutoencoderConfig, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs
    ) -> None:
        kinds: Any = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        super().__init__(config, **kinds)
        self.post_quant_conv = Conv(config.latent_channels, config.latent_channels, size=1, **kinds)

    def __call__(self, raw: Float[Array, "B h w C"]) -> Float[Array, "B height width 3"]:
        return super().__call__(self.post_quant_conv(raw))


class ChannelStatistics(nnx.Module):
    """Every channel's mean and variance over the training pictures: a batch norm at rest."""

    def __init__(self, channels: int, eps: float, *, param_dtype: DType) -> None:
        self.running_mean = nnx.Param(jnp.zeros((channels,), param_dtype))
        self.running_var = nnx.Param(jnp.ones((channels,), param_dtype))
        self.eps = eps

    def normalise(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        """(x − mean) / sqrt(variance + eps), in float32."""
        mean, deviation = self._moments(x)
        return (x - mean) / deviation

    def denormalise(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        """The inverse of `normalise`."""
        mean, deviation = self._moments(x)
        return x * deviation + mean

    def _moments(self, like: Array) -> tuple[Float[Array, "1 1 1 C"], Float[Array, "1 1 1 C"]]:
        mean, variance = (
            per_channel(leaf[...].astype(jnp.float32), like)
            for leaf in (self.running_mean, self.running_var)
        )
        return mean, jnp.sqrt(variance + self.eps)
