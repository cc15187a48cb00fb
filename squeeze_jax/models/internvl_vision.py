"""InternVL's eye: the vision transformer (InternViT) and the pixel shuffle that turns patches
into image tokens.

The same numbers as `InternVLVisionModel` and `InternVLModel.pixel_shuffle` of transformers 5.24.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from squeeze_jax.array_types import Array, DType, Float
from squeeze_jax.layers.attention import attention
from squeeze_jax.layers.linear import Linear
from squeeze_jax.layers.norm import LayerNorm
from squeeze_jax.layers.stack import scan_blocks, stack_blocks


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower; defaults are InternVL3-8B's published values."""

    image_size: int = 448
    """Height and width of a picture (tile) in pixels."""
    patch_size: int = 14
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    attention_bias: bool = True
    """Biases on the query, key and value projections."""
    layer_norm_eps: float = 1e-6
    """Added to variances."""
    layer_scale_init_value: float = 0.1
    """What a block's residuals are multiplied by before training."""

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} does not divide into "
                f"{self.num_attention_heads} heads"
            )

    @property
    def patches(self) -> int:
        """Patches along one side of a picture."""
        return self.image_size // self.patch_size


class VisionTower(nnx.Module):
    """Patches, class token and positions, then blocks; no final norm, and the class token is
    dropped at the end.
    """

    def __init__(
        self, config: VisionConfig, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs
    ) -> None:
        width, patch = config.hidden_size, config.patch_size
        normal = nnx.initializers.normal(0.02)
        self.patch_embedding = nnx.Param(
            nnx.initializers.normal((3 * patch * patch) ** -0.5)(
                rngs.params(), (patch, patch, 3, width), param_dtype
            )
        )
        self.patch_bias = nnx.Param(jnp.zeros((width,), param_dtype))
        self.class_token = nnx.Param(normal(rngs.params(), (1, 1, width), param_dtype))
        self.position_embedding = nnx.Param(
            normal(rngs.params(), (1, config.patches**2 + 1, width), param_dtype)
        )
        self.blocks = stack_blocks(
            lambda rngs: VisionBlock(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs),
            config.num_hidden_layers,
            rngs,
        )
        self.config = config
        self.dtype = jnp.dtype(dtype)

    def __call__(
        self, pixel_values: Float[Array, "images height width 3"]
    ) -> Float[Array, "images h w C"]:
        """Features of every patch, on its grid. `pixel_values` are normalised by ImageNet's mean
        and deviation.
        """
        config = self.config
        if pixel_values.shape[1:3] != (config.image_size, config.image_size):
            raise ValueError(
                f"pictures are {pixel_values.shape[1]}x{pixel_values.shape[2]}, the vision tower "
                f"reads {config.image_size}x{config.image_size}: prepare them with "
                "data.chat.preprocess_image"
            )
        images, side, patch, width = (
            pixel_values.shape[0],
            config.patches,
            config.patch_size,
            config.hidden_size,
        )
        # A convolution whose stride is its size is a matrix product over cut-out patches, which
        # is faster on CPUs.
        x = pixel_values.astype(self.dtype).reshape(images, side, patch, side, patch, 3)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(images, side * side, patch * patch * 3)
        x = x @ self.patch_embedding[...].astype(self.dtype).reshape(patch * patch * 3, width)
        x = x + self.patch_bias[...].astype(self.dtype)[None, None]
        first = jnp.broadcast_to(self.class_token[...].astype(self.dtype), (images, 1, width))
        x = jnp.concatenate([first, x], axis=1) + self.position_embedding[...].astype(self.dtype)
        x, _ = scan_blocks(self.blocks, lambda block, x, _: (block(x), None), x)
        return x[:, 1:].reshape(images, side, side, width)


class VisionBlock(nnx.Module):
    """Pre-norm attention and MLP (exact GELU), each scaled per channel before it is added."""

    def __init__(
        self, config: VisionConfig, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs
    ) -> None:
        width, eps = config.hidden_size, config.layer_norm_eps

        def linear(features_in: int, features_out: int, use_bias: bool = True) -> Linear:
            return Linear(
                features_in,
                features_out,
                use_bias=use_bias,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )

        self.attention_norm = LayerNorm(width, eps=eps, param_dtype=param_dtype)
        self.query = linear(width, width, config.attention_bias)
        self.key = linear(width, width, config.attention_bias)
        self.value = linear(width, width, config.attention_bias)
        self.attention_output = linear(width, width)
        self.attention_scale = nnx.Param(
            jnp.full((width,), config.layer_scale_init_value, param_dtype)
        )
        self.mlp_norm = LayerNorm(width, eps=eps, param_dtype=param_dtype)
        self.mlp_in = linear(width, config.intermediate_size)
        self.mlp_out = linear(config.intermediate_size, width)
        self.mlp_scale = nnx.Param(jnp.full((width,), config.layer_scale_init_value, param_dtype))
        self.heads = config.num_attention_heads

    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
        heads = (*x.shape[:2], self.heads, -1)
        y = self.attention_norm(x)
        y = attention(
            self.query(y).reshape(heads), self.key(y).reshape(heads), self.value(y).reshape(heads)
        )
        x = (
            x
            + self.attention_output(y.reshape(x.shape))
            * self.attention_scale[...].astype(x.dtype)[None, None]
        )
        y = self.mlp_out(jax.nn.gelu(self.mlp_in(self.mlp_norm(x)), approximate=False))
        return x + y * self.mlp_scale[...].astype(x.dtype)[None, None]


def pixel_shuffle(
    features: Float[Array, "B h w C"], factor: int = 2
) -> Float[Array, "B tokens FC"]:
    """Joins neighbouring factor x factor patches into one token, row by row within the
    neighbourhood.

    A 4x4 grid of 0 .. 15 becomes [0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15].
    """
    B, h, w, C = features.shape
    x = features.reshape(B, h // factor, factor, w // factor, factor, C)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(
        B, (h // factor) * (w // factor), factor * factor * C
    )


class Projector(nnx.Module):
    """Image tokens to the language model's width: LayerNorm, linear, exact GELU, linear."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        dtype: DType,
        param_dtype: DType,
        rngs: nnx.Rngs,
    ) -> None:
        self.norm = LayerNorm(in_features, eps=1e-5, param_dtype=param_dtype)
        self.linear_1 = Linear(
            in_features, out_features, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.linear_2 = Linear(
            out_features, out_features, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )

    def __call__(self, x: Float[Array, "B T F"]) -> Float[Array, "B T C"]:
        return self.linear_2(jax.nn.gelu(self.linear_1(self.norm(x)), approximate=False))
