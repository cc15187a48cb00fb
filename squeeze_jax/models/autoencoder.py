"""The autoencoder: AutoencoderKL as FLUX.1 uses it (diffusers 0.42.1), channels last.

Pictures [B, height, width, 3] in [-1, 1] become latents [B, h, w, c] and back. Latents leave
`encode` shifted and scaled, (z − shift_factor) · scaling_factor, so that they have about zero
mean and unit variance; `decode` undoes it. There are no convolutions between the moments and the
latents (`use_quant_conv` is false in FLUX's file).

Pictures of several sizes may lie on one canvas, each in its upper left corner: with their `sizes`,
convolutions, norms and attention see of each what they see of it alone.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from squeeze_jax.array_types import Array, DType, Float, Int, Key
from squeeze_jax.layers.attention import attention
from squeeze_jax.layers.convolution import Conv, GroupNorm, Inside, inside_of, upsample, within
from squeeze_jax.layers.linear import FLOAT32, Linear, silu

LOG_VARIANCE = (-30.0, 20.0)
"""diffusers' limits on the posterior's log variance."""
ATTENTION_TOKENS = 4096
"""Up to this many latents attend all at once: 512 x 512 pixels, 64 MB of float32 scores for each
picture. More than that go one row of the grid after the other, so that 1024 x 1024 takes 8 MB at
a time, not 1 GB (our decision)."""


@dataclass(frozen=True)
class AutoencoderConfig:
    """FLUX.1's autoencoder by default; the field names are those of diffusers' `config.json`."""

    in_channels: int = 3
    latent_channels: int = 16
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    """Width of each resolution, from the pictures' to the latents'; each step halves height and
    width."""
    layers_per_block: int = 2
    """Residual blocks a resolution in the encoder; the decoder has one more."""
    norm_groups: int = 32
    """Of channels, in every group norm."""
    scaling_factor: float = 0.3611
    shift_factor: float = 0.1159
    """What brings latents near mean 0 and variance 1: see `Autoencoder.normalise`."""

    def __post_init__(self) -> None:
        if not self.block_out_channels or self.layers_per_block < 1:
            raise ValueError(
                "the autoencoder needs at least one width and one residual block a resolution"
            )
        for width in self.block_out_channels:
            if width % self.norm_groups:
                raise ValueError(
                    f"width {width} does not divide into {self.norm_groups} groups (norm_groups)"
                )
        if self.scaling_factor <= 0:
            raise ValueError(f"scaling_factor is {self.scaling_factor}; it must be positive")

    @property
    def downsampling(self) -> int:
        """Pixels a latent stands for, along one side (8 for FLUX)."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def latent_pixels(self) -> int:
        """Pixels that an unpacked latent stands for, along one side: the same."""
        return self.downsampling


class Autoencoder(nnx.Module):
    """Encoder, decoder, and the shift and scale between them.

    `dtype` is what convolutions are computed in, `param_dtype` what is stored; with a `dtype` of
    float32, products are float32 on every device. Group norms and the softmax are always float32;
    moments and latents come out as float32.
    """

    def __init__(
        self,
        config: AutoencoderConfig,
        *,
        dtype: DType = jnp.float32,
        param_dtype: DType = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.config = config
        self.encoder = Encoder(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.decoder = Decoder(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def posterior(
        self, images: Float[Array, "B height width 3"], sizes: Int[Array, "B 2"] | None = None
    ) -> tuple[Float[Array, "B h w C"], Float[Array, "B h w C"]]:
        """Mean and log variance of q(z | image) as the encoder gives them: neither shifted nor
        scaled.
        """
        self._check_size(images.shape[1], images.shape[2])
        moments = self.encoder(images, sizes).astype(jnp.float32)
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(log_variance, *LOG_VARIANCE)

    def encode(
        self, images: Float[Array, "B height width 3"], sizes: Int[Array, "B 2"] | None = None
    ) -> Float[Array, "B h w C"]:
        """The shifted and scaled mean of the posterior: what features and references are made
        of.

        sizes: height and width of each picture on the canvas `images`, multiples of `downsampling`;
        what lies beyond a picture has no meaning in its latents. None: pictures fill the canvas.
        """
        return self.normalise(self.posterior(images, sizes)[0])

    def sample(self, images: Float[Array, "B height width 3"], key: Key) -> Float[Array, "B h w C"]:
        """A draw from the posterior, shifted and scaled."""
        mean, log_variance = self.posterior(images)
        noise = jax.random.normal(key, mean.shape, mean.dtype)
        return self.normalise(mean + jnp.exp(0.5 * log_variance) * noise)

    def decode(self, latents: Float[Array, "B h w C"]) -> Float[Array, "B height width 3"]:
        """Pictures of shifted and scaled latents; about [-1, 1], not clipped."""
        return self.decoder(self.denormalise(latents.astype(jnp.float32))).astype(jnp.float32)

    def encode_unpacked(
        self, images: Float[Array, "B height width 3"], sizes: Int[Array, "B 2"] | None = None
    ) -> Float[Array, "B h w c"]:
        """`encode`'s latents before packing, as records keep them: each stands for `latent_pixels`."""
        return self.encode(images, sizes)

    def decode_unpacked(self, latents: Float[Array, "B h w c"]) -> Float[Array, "B height width 3"]:
        """`decode` of what `encode_unpacked` gives."""
        return self.decode(latents)

    def normalise(self, raw: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        """(z − shift_factor) · scaling_factor, as diffusers' pipelines do it."""
        return (raw - self.config.shift_factor) * self.config.scaling_factor

    def denormalise(self, latents: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        """The inverse of `normalise`."""
        return latents / self.config.scaling_factor + self.config.shift_factor

    def _check_size(self, height: int, width: int) -> None:
        factor = self.config.downsampling
        if height % factor or width % factor or not height or not width:
            raise ValueError(
                f"the autoencoder got pictures of {height} x {width} (height x width); both sides "
                f"must be multiples of {factor}: resize them before encoding, for instance to "
                f"{_nearest(height, factor)} x {_nearest(width, factor)}"
            )


class Encoder(nnx.Module):
    """Pictures to moments (mean and log variance side by side on the last axis)."""

    def __init__(
        self, config: AutoencoderConfig, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs
    ) -> None:
        how = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        widths, groups = config.block_out_channels, config.norm_groups
        self.conv_in = Conv(config.in_channels, widths[0], **how)
        blocks = []
        for level, width in enumerate(widths):
            widths_in = [widths[max(level - 1, 0)]] + [width] * (config.layers_per_block - 1)
            last = level == len(widths) - 1
            blocks.append(Level(widths_in, width, groups, resample=None if last else "down", **how))
        self.down_blocks = nnx.List(blocks)
        self.mid_block = MidBlock(widths[-1], groups, **how)
        self.conv_norm_out = GroupNorm(widths[-1], groups, param_dtype=param_dtype)
        self.conv_out = Conv(widths[-1], 2 * config.latent_channels, **how)

    def __call__(
        self, images: Float[Array, "B height width 3"], sizes: Int[Array, "B 2"] | None = None
    ) -> Float[Array, "B h w C"]:
        inside = None if sizes is None else inside_of(sizes, images.shape[1], images.shape[2])
        x = self.conv_in(within(images, inside))
        for block in self.down_blocks:
            x = block(x, inside)
            if inside is not None and block.conv is not None:
                inside = inside[:, ::2, ::2]
        x = self.mid_block(x, inside)
        return self.conv_out(within(silu(self.conv_norm_out(x, inside)), inside))


class Decoder(nnx.Module):
    """Raw latents to pictures."""

    def __init__(
        self, config: AutoencoderConfig, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs
    ) -> None:
        how = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        widths, groups = config.block_out_channels[::-1], config.norm_groups
        self.conv_in = Conv(config.latent_channels, widths[0], **how)
        self.mid_block = MidBlock(widths[0], groups, **how)
        blocks = []
        for level, width in enumerate(widths):
            widths_in = [widths[max(level - 1, 0)]] + [width] * config.layers_per_block
            last = level == len(widths) - 1
            blocks.append(Level(widths_in, width, groups, resample=None if last else "up", **how))
        self.up_blocks = nnx.List(blocks)
        self.conv_norm_out = GroupNorm(widths[-1], groups, param_dtype=param_dtype)
        self.conv_out = Conv(widths[-1], config.in_channels, **how)

    def __call__(self, raw: Float[Array, "B h w C"]) -> Float[Array, "B height width 3"]:
        x = self.mid_block(self.conv_in(raw))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(silu(self.conv_norm_out(x)))


class Level(nnx.Module):
    """The residual blocks of one resolution, then half or twice the size."""

    def __init__(
        self,
        widths_in: list[int],
        width: int,
        groups: int,
        *,
        resample: str | None,
        dtype: DType,
        param_dtype: DType,
        rngs: nnx.Rngs,
    ) -> None:
        how = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.resnets = nnx.List(
            [ResidualBlock(before, width, groups, **how) for before in widths_in]
        )
        self.resample = resample
        self.conv = (
            Conv(width, width, stride=2 if resample == "down" else 1, **how) if resample else None
        )

    def __call__(
        self, x: Float[Array, "B h w C"], inside: Inside = None
    ) -> Float[Array, "B h2 w2 F"]:
        for block in self.resnets:
            x = block(x, inside)
        if self.resample == "up":
            x = upsample(x)
        return x if self.conv is None else self.conv(within(x, inside))


class MidBlock(nnx.Module):
    """Residual block, attention over all latents, residual block."""

    def __init__(
        self, width: int, groups: int, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs
    ) -> None:
        how = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.resnets = nnx.List([ResidualBlock(width, width, groups, **how) for _ in range(2)])
        self.attention = SpatialAttention(width, groups, **how)

    def __call__(
        self, x: Float[Array, "B h w C"], inside: Inside = None
    ) -> Float[Array, "B h w C"]:
        x = self.attention(self.resnets[0](x, inside), inside)
        return self.resnets[1](x, inside)


class ResidualBlock(nnx.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 shortcut where the width changes.

    The second convolution starts at zero: a fresh autoencoder is almost linear and learns quickly
    (our decision).
    """

    def __init__(
        self,
        width_in: int,
        width: int,
        groups: int,
        *,
        dtype: DType,
        param_dtype: DType,
        rngs: nnx.Rngs,
    ) -> None:
        how = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.norm1 = GroupNorm(width_in, groups, param_dtype=param_dtype)
        self.conv1 = Conv(width_in, width, **how)
        self.norm2 = GroupNorm(width, groups, param_dtype=param_dtype)
        self.conv2 = Conv(width, width, gain=0.0, **how)
        self.conv_shortcut = Conv(width_in, width, size=1, **how) if width_in != width else None

    def __call__(
        self, x: Float[Array, "B h w C"], inside: Inside = None
    ) -> Float[Array, "B h w F"]:
        y = self.conv1(within(silu(self.norm1(x, inside)), inside))
        y = self.conv2(within(silu(self.norm2(y, inside)), inside))
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class SpatialAttention(nnx.Module):
    """x + single-head attention over all places of the grid."""

    def __init__(
        self, width: int, groups: int, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs
    ) -> None:
        how = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.group_norm = GroupNorm(width, groups, param_dtype=param_dtype)
        self.to_q, self.to_k, self.to_v, self.to_out = (
            Linear(width, width, precision=FLOAT32, **how) for _ in range(4)
        )
        # Of bfloat16, products are exact in any case, and attention may use a kernel.
        self.precision = FLOAT32 if jnp.dtype(dtype) == jnp.float32 else None

    def __call__(
        self, x: Float[Array, "B h w C"], inside: Inside = None
    ) -> Float[Array, "B h w C"]:
        batch, height, width, channels = x.shape
        mask = None if inside is None else inside.reshape(batch, height * width)
        y = self.group_norm(x, inside)
        query = self.to_q(y)
        key, value = (
            to(y).reshape(batch, height * width, 1, channels) for to in (self.to_k, self.to_v)
        )
        if height * width <= ATTENTION_TOKENS:
            query = query.reshape(batch, height * width, 1, channels)
            y = attention(query, key, value, mask=mask, precision=self.precision)
        else:
            rows = query.swapaxes(0, 1)[:, :, :, None, :]

            def attend(row: Float[Array, "B w 1 C"]) -> Float[Array, "B w 1 C"]:
                return attention(row, key, value, mask=mask, precision=self.precision)

            y = jax.lax.map(attend, rows).swapaxes(0, 1)
        return x + self.to_out(y.reshape(x.shape))


def _nearest(size: int, factor: int) -> int:
    return max(round(size / factor), 1) * factor
