"""InternVL: a vision tower and a Qwen2 language model that read pictures and a prompt together.

The system uses its hidden states, of every layer, and nothing else. They equal those of
`InternVLForConditionalGeneration` of transformers 5.24 with `output_hidden_states=True`.
"""

from dataclasses import dataclass, field

import jax
import jax.core as jax_core
import jax.numpy as jnp
from flax import nnx

from squeeze_jax.array_types import Array, Bool, DType, Float, Int
from squeeze_jax.batch import HiddenStates
from squeeze_jax.layers.attention import attention
from squeeze_jax.layers.linear import Linear, silu
from squeeze_jax.layers.norm import RMSNorm
from squeeze_jax.layers.stack import scan_blocks, stack_blocks
from squeeze_jax.models.internvl_vision import Projector, VisionConfig, VisionTower, pixel_shuffle

__all__ = [
    "InternVL",
    "InternVLConfig",
    "TextConfig",
    "VisionConfig",
    "pixel_shuffle",
    "split_hidden_states",
]


@dataclass(frozen=True)
class TextConfig:
    """The language model (Qwen2); defaults are InternVL3-8B's published values."""

    vocab_size: int = 151674
    hidden_size: int = 3584
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int = 4
    intermediate_size: int = 18944
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    max_position_embeddings: int = 32768
    """Longer sequences are refused: the published rotary scaling would begin beyond this."""
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} does not divide into "
                f"{self.num_attention_heads} heads"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_attention_heads} heads cannot share "
                f"{self.num_key_value_heads} key/value heads evenly"
            )

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class InternVLConfig:
    """Vision tower, language model, and how pictures enter the sequence."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    image_token_id: int = 151667
    """`<IMG_CONTEXT>`: one for every image token."""
    downsample: int = 2
    """Side of the neighbourhood of patches that becomes one image token (published as
    `downsample_ratio` 0.5)."""

    def __post_init__(self) -> None:
        if self.vision.patches % self.downsample:
            raise ValueError(
                f"{self.vision.patches} patches a side do not divide into "
                f"groups of {self.downsample}"
            )

    @property
    def image_tokens(self) -> int:
        """Image tokens of one picture: 256 for InternVL3 at 448 pixels."""
        return (self.vision.patches // self.downsample) ** 2

    @property
    def hidden_states(self) -> int:
        """M: one for the embeddings and one for every layer."""
        return self.text.num_hidden_layers + 1


INTERNVL3_2B = InternVLConfig(
    text=TextConfig(
        hidden_size=1536, num_attention_heads=12, num_key_value_heads=2, intermediate_size=8960
    )
)
"""InternVL3-2B's published sizes: the vision tower of 8B, and Qwen2.5-1.5B as the language model."""


class InternVL(nnx.Module):
    """Token ids and pictures in, every hidden state out.

    `dtype` is what products are computed in, `param_dtype` what is stored; norms, rotary phases
    and softmax are float32 whatever they are.
    """

    def __init__(
        self,
        config: InternVLConfig,
        *,
        dtype: DType = jnp.float32,
        param_dtype: DType = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        text, types = config.text, {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.vision_tower = VisionTower(config.vision, **types)
        self.projector = Projector(
            config.vision.hidden_size * config.downsample**2, text.hidden_size, **types
        )
        normal = nnx.initializers.normal(0.02)
        self.embedding = nnx.Param(
            normal(rngs.params(), (text.vocab_size, text.hidden_size), param_dtype)
        )
        self.blocks = stack_blocks(
            lambda rngs: DecoderBlock(text, dtype=dtype, param_dtype=param_dtype, rngs=rngs),
            text.num_hidden_layers,
            rngs,
        )
        self.norm = RMSNorm(text.hidden_size, eps=text.rms_norm_eps, param_dtype=param_dtype)
        self.head = (
            None
            if text.tie_word_embeddings
            else Linear(text.hidden_size, text.vocab_size, use_bias=False, **types)
        )
        self.config = config
        self.dtype = jnp.dtype(dtype)

    def __call__(
        self,
        input_ids: Int[Array, "B L"],
        pixel_values: Float[Array, "images height width 3"]
        | Float[Array, "B images height width 3"]
        | None = None,
        attention_mask: Bool[Array, "B L"] | Int[Array, "B L"] | None = None,
    ) -> Float[Array, "B M L C"]:
        """All hidden states: index 0 the embeddings with the image features in place, the last
        after the final norm.

        `pixel_values` are the pictures of the whole batch in order, sample by sample, or have an
        axis for samples in front. Unused pictures may stand at the end; an image token without a
        picture becomes NaN. `attention_mask` is True (1) at tokens that are no padding, which may
        stand on either side. Hidden states of padding are finite and have no meaning.
        """
        config, (B, L) = self.config, input_ids.shape
        if config.text.max_position_embeddings < L:
            raise ValueError(
                f"{L} tokens, but positions end at {config.text.max_position_embeddings}: "
                "shorten the input"
            )
        valid = jnp.ones((B, L), bool) if attention_mask is None else attention_mask.astype(bool)
        x = jnp.take(self.embedding[...], input_ids, axis=0, mode="clip").astype(self.dtype)
        if pixel_values is not None:
            is_image, index = image_slots(input_ids, valid, config.image_token_id)
            features = self.vision(pixel_values.reshape(-1, *pixel_values.shape[-3:]))
            if pixel_values.ndim == 5:  # rows stay apart, so that a mesh may split them
                within = jnp.maximum(jnp.cumsum(is_image, axis=1, dtype=jnp.int32) - 1, 0)
                placed = jax.vmap(_features_at)(
                    features.reshape(B, -1, config.text.hidden_size), within
                )
            else:
                placed = _features_at(features.reshape(-1, config.text.hidden_size), index)
            x = jnp.where(is_image[..., None], placed, x)

        # Positions count valid tokens alone, so that padding changes nothing. transformers counts
        # padding too, with the same result: rotary attention sees differences of positions only.
        positions = jnp.maximum(jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1, 0)
        rotation = rotary_phases(positions, config.text.head_dim, config.text.rope_theta)
        mask = jnp.tril(jnp.ones((L, L), bool))[None] & valid[:, None, :]

        def apply(block: DecoderBlock, x: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
            x = block(x, rotation, mask)
            return x, x

        last, layers = scan_blocks(self.blocks, apply, x)
        states = jnp.concatenate([x[None], layers[:-1], self.norm(last)[None]], axis=0)
        return states.transpose(1, 0, 2, 3)

    def vision_features(
        self, pixel_values: Float[Array, "images height width 3"]
    ) -> Float[Array, "images tokens FC"]:
        """The vision tower's features of every image token, neighbouring patches joined, before
        the projector.
        """
        return pixel_shuffle(self.vision_tower(pixel_values), self.config.downsample)

    def vision(
        self, pixel_values: Float[Array, "images height width 3"]
    ) -> Float[Array, "images tokens C"]:
        """What stands at a picture's image tokens among the embeddings."""
        return self.projector(self.vision_features(pixel_values))

    def logits(self, last_hidden: Float[Array, "*B C"]) -> Float[Array, "*B vocabulary"]:
        """Float32 scores of the next token, from the last hidden state (after the final norm)."""
        if self.head is not None:
            return self.head(last_hidden).astype(jnp.float32)
        return (last_hidden @ self.embedding[...].astype(last_hidden.dtype).T).astype(jnp.float32)


class DecoderBlock(nnx.Module):
    """Pre-norm causal attention with shared key/value heads, and a gated MLP."""

    def __init__(
        self, config: TextConfig, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs
    ) -> None:
        width, eps, kv_width = (
            config.hidden_size,
            config.rms_norm_eps,
            config.num_key_value_heads * config.head_dim,
        )

        def linear(features_in: int, features_out: int, use_bias: bool = False) -> Linear:
            return Linear(
                features_in,
                features_out,
                use_bias=use_bias,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )

        self.attention_norm = RMSNorm(width, eps=eps, param_dtype=param_dtype)
        self.query = linear(width, width, use_bias=True)
        self.key = linear(width, kv_width, use_bias=True)
        self.value = linear(width, kv_width, use_bias=True)
        self.attention_output = linear(width, width)
        self.mlp_norm = RMSNorm(width, eps=eps, param_dtype=param_dtype)
        self.gate = linear(width, config.intermediate_size)
        self.up = linear(width, config.intermediate_size)
        self.down = linear(config.intermediate_size, width)
        self.head_dim = config.head_dim

    def __call__(
        self,
        x: Float[Array, "B T C"],
        rotation: tuple[Float[Array, "B T 1 D2"], Float[Array, "B T 1 D2"]],
        mask: Bool[Array, "B T T"],
    ) -> Float[Array, "B T C"]:
        heads = (*x.shape[:2], -1, self.head_dim)
        y = self.attention_norm(x)
        query, key = (
            rotate(self.query(y).reshape(heads), rotation),
            rotate(self.key(y).reshape(heads), rotation),
        )
        y = attention(query, key, self.value(y).reshape(heads), mask=mask)
        x = x + self.attention_output(y.reshape(x.shape))
        y = self.mlp_norm(x)
        return x + self.down(silu(self.gate(y)) * self.up(y))


def rotary_phases(
    positions: Int[Array, "B T"], head_dim: int, theta: float
) -> tuple[Float[Array, "B T 1 D2"], Float[Array, "B T 1 D2"]]:
    """Cosine and sine, float32, of every position times every frequency theta^(-2i / head_dim)."""
    frequencies = 1.0 / theta ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies[None, None, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "B T H D"], rotation: tuple[Float[Array, "B T 1 D2"], Float[Array, "B T 1 D2"]]
) -> Float[Array, "B T H D"]:
    """Qwen2's rotary embedding: channel i turns with channel i + D/2, in float32."""
    cosine, sine = rotation
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate(
        [first * cosine - second * sine, second * cosine + first * sine], axis=-1
    )
    return turned.astype(x.dtype)


def _features_at(
    features: Float[Array, "slots C"], index: Int[Array, "*L"]
) -> Float[Array, "*L C"]:
    return jnp.take(features, index, axis=0, mode="fill", fill_value=jnp.nan)


def image_slots(
    input_ids: Int[Array, "B L"], valid: Bool[Array, "B L"], image_token_id: int
) -> tuple[Bool[Array, "B L"], Int[Array, "B L"]]:
    """Which tokens are image tokens, and each one's row among the features of all pictures of the
    batch.
    """
    is_image = (input_ids == image_token_id) & valid
    count = jnp.cumsum(is_image.reshape(-1), dtype=jnp.int32).reshape(is_image.shape)
    return is_image, jnp.where(is_image, count - 1, 0)


def split_hidden_states(
    hidden: Float[Array, "B M L C"],
    input_ids: Int[Array, "B L"],
    attention_mask: Bool[Array, "B L"] | Int[Array, "B L"],
    image_token_id: int,
    *,
    text_length: int,
    image_length: int,
) -> HiddenStates:
    """Splits hidden states into text and image tokens, each at the front of an axis of static
    length, then zeros.

    Image tokens are those at `image_token_id` (`<IMG_CONTEXT>`), every other valid token is text.
    Positions count valid tokens from 0, so that they do not depend on padding. Raises ValueError
    where a sample has more tokens than a length holds; inside `jit` this cannot be checked, and
    the caller has to (data.chat limits the text).
    """
    valid = jnp.asarray(attention_mask).astype(bool)
    is_image, _ = image_slots(jnp.asarray(input_ids), valid, image_token_id)
    is_text = valid & ~is_image
    for name, mask, length in (("text", is_text, text_length), ("image", is_image, image_length)):
        if not isinstance(mask, jax_core.Tracer) and (most := int(mask.sum(axis=1).max())) > length:
            raise ValueError(f"a sample has {most} {name} tokens, but {name}_length is {length}")
    places = jnp.maximum(jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1, 0)

    def front(mask: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
        """Indices [B, length] of the true ones in order, and which of them exist."""
        order = jnp.argsort(~mask, axis=1, stable=True)
        order = jnp.pad(order, ((0, 0), (0, max(0, length - mask.shape[1]))))[:, :length]
        return order, jnp.arange(length)[None] < mask.sum(axis=1, keepdims=True)

    def pick(order: jax.Array, exists: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        tokens = jnp.take_along_axis(hidden, order[:, None, :, None], axis=2)
        tokens = jnp.where(exists[:, None, :, None], tokens, jnp.zeros((), tokens.dtype))
        return tokens, exists, jnp.where(exists, jnp.take_along_axis(places, order, axis=1), 0)

    return HiddenStates(*pick(*front(is_text, text_length)), *pick(*front(is_image, image_length)))
