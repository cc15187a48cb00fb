"""FLUX.2's blocks: as FLUX.1's, but modulated from outside, with SwiGLU and without biases.

Source: diffusers 0.42.1, `Flux2TransformerBlock` and `Flux2SingleTransformerBlock`.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from squeeze_jax.array_types import Array, Bool, DType, Float
from squeeze_jax.layers.linear import Linear, silu
from squeeze_jax.layers.modulation import add_gated, modulate
from squeeze_jax.layers.rope import Rotation
from squeeze_jax.models.backbone import KeysValues, Modulated, Streams, joint_attention, split_heads
from squeeze_jax.models.dit_blocks import QKNorm, SelfAttention
from squeeze_jax.sharding import constrain


class DoubleBlock(nnx.Module):
    """Context and image stream with weights of their own, joined in attention."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_width: int,
        *,
        dtype: DType,
        param_dtype: DType,
        rngs: nnx.Rngs,
    ) -> None:
        kinds: Any = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.img_attn = SelfAttention(width, heads, use_bias=False, **kinds)
        self.img_mlp = MLP(width, mlp_width, **kinds)
        self.txt_attn = SelfAttention(width, heads, use_bias=False, **kinds)
        self.txt_mlp = MLP(width, mlp_width, **kinds)

    def __call__(
        self,
        streams: Streams,
        modulated: tuple[Modulated, Modulated],
        rope: Rotation,
        mask: Bool[Array, "B keys"] | None,
        cached_kv: KeysValues | None = None,
    ) -> tuple[Streams, KeysValues]:
        """Both streams, and their keys and values.

        `modulated` are those of the image stream and of the context stream: shift, scale and gate
        of the attention, then of the feed-forward. `cached_kv` are keys and values of tokens that
        have no queries here.
        """
        txt, img = streams
        parts = (
            (txt, self.txt_attn, self.txt_mlp, modulated[1]),
            (img, self.img_attn, self.img_mlp, modulated[0]),
        )
        qkv = [attn.project(modulate(x, shift, scale)) for x, attn, _, (shift, scale, *_) in parts]
        q, k, v = (jnp.concatenate(pair, axis=1) for pair in zip(*qkv))
        mixed, kv = joint_attention(q, k, v, rope, mask, cached_kv)
        out = []
        for (x, attn, mlp, (_, _, gate, shift, scale, mlp_gate)), own in zip(
            parts, jnp.split(mixed, [txt.shape[1]], axis=1)
        ):
            x = add_gated(x, gate, attn.proj(own))
            x = add_gated(x, mlp_gate, mlp(modulate(x, shift, scale)))
            out.append(constrain(x, "tokens"))
        return (out[0], out[1]), kv


class SingleBlock(nnx.Module):
    """One stream; attention and feed-forward in parallel, between two fused linear layers."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_width: int,
        *,
        dtype: DType,
        param_dtype: DType,
        rngs: nnx.Rngs,
    ) -> None:
        kinds: Any = {"use_bias": False, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.linear1 = Linear(width, 3 * width + 2 * mlp_width, **kinds)
        self.linear2 = Linear(width + mlp_width, width, tensor_axis="in", **kinds)
        self.norm = QKNorm(width // heads, param_dtype=param_dtype)
        self.heads, self.widths = heads, (width, width, width, mlp_width, mlp_width)

    def __call__(
        self,
        x: Float[Array, "B T C"],
        modulated: Modulated,
        rope: Rotation,
        mask: Bool[Array, "B keys"] | None,
        cached_kv: KeysValues | None = None,
    ) -> tuple[Float[Array, "B T C"], KeysValues]:
        """As `DoubleBlock`, of one stream; `modulated` are shift, scale and gate."""
        shift, scale, gate = modulated
        *qkv, mlp_gate, value = self.linear1.multiply((modulate(x, shift, scale),), self.widths)
        mixed, kv = joint_attention(
            *self.norm(*split_heads(qkv, self.heads)), rope, mask, cached_kv
        )
        [update] = self.linear2.multiply((mixed, swiglu(mlp_gate, value)), x.shape[-1:])
        return constrain(add_gated(x, gate, update), "tokens"), kv


class MLP(nnx.Module):
    """Linear to gate and value side by side, SwiGLU, linear."""

    def __init__(
        self, width: int, hidden: int, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs
    ) -> None:
        kinds: Any = {"use_bias": False, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.in_layer = Linear(width, 2 * hidden, **kinds)
        self.out_layer = Linear(hidden, width, tensor_axis="in", **kinds)

    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
        hidden = self.out_layer.kernel.shape[-2]
        gate, value = self.in_layer.multiply((x,), (hidden, hidden))
        return self.out_layer(swiglu(gate, value))


def swiglu(gate: Float[Array, "B T F"], value: Float[Array, "B T F"]) -> Float[Array, "B T F"]:
    """SiLU of the gate, times the value."""
    return constrain(silu(gate) * value, "hidden")
