"""The parts of FLUX.1's transformer: its two kinds of block, and the final layer. FLUX.2 takes
attention, norms and final layer from here, without biases.

Module names are FLUX.1's own, so that weight tables are literal.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from squeeze_jax.array_types import Array, Bool, DType, Float
from squeeze_jax.layers.linear import Linear
from squeeze_jax.layers.modulation import NORM_EPS, AdaLN, add_gated, modulate
from squeeze_jax.layers.norm import RMSNorm
from squeeze_jax.layers.rope import Rotation
from squeeze_jax.models.backbone import KeysValues, Modulated, joint_attention, split_heads
from squeeze_jax.sharding import constrain


class SelfAttention(nnx.Module):
    """Fused q/k/v projection, q/k RMSNorm and output projection of one stream."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        use_bias: bool = True,
        dtype: DType,
        param_dtype: DType,
        rngs: nnx.Rngs,
    ) -> None:
        kinds: Any = {"use_bias": use_bias, "dtype": dtype, "param_dtype": param_dtype}
        self.qkv = Linear(width, 3 * width, **kinds, rngs=rngs)
        self.norm = QKNorm(width // heads, param_dtype=param_dtype)
        self.proj = Linear(width, width, tensor_axis="in", **kinds, rngs=rngs)
        self.heads = heads

    def project(self, x: Float[Array, "B T C"]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q, k, v, each [B T H D], q and k normalised."""
        return self.norm(*split_heads(self.qkv.multiply((x,), (x.shape[-1],) * 3), self.heads))


class QKNorm(nnx.Module):
    """RMSNorm of each head's queries and keys, with one scale for all queries and one for all
    keys.
    """

    def __init__(self, head_width: int, *, param_dtype: DType) -> None:
        self.query_norm = RMSNorm(head_width, eps=NORM_EPS, param_dtype=param_dtype)
        self.key_norm = RMSNorm(head_width, eps=NORM_EPS, param_dtype=param_dtype)

    def __call__(
        self, q: jax.Array, k: jax.Array, v: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        return self.query_norm(q), self.key_norm(k), v


class MLP(nnx.Module):
    """Linear, GELU (tanh form, as FLUX.1 has it), linear."""

    def __init__(
        self, width: int, hidden: int, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs
    ) -> None:
        self.in_layer = Linear(width, hidden, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.out_layer = Linear(
            hidden, width, tensor_axis="in", dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )

    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
        return self.out_layer(constrain(jax.nn.gelu(self.in_layer(x), approximate=True), "hidden"))


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
        self.img_mod = AdaLN(width, 6, param_dtype=param_dtype, rngs=rngs)
        self.img_attn = SelfAttention(width, heads, **kinds)
        self.img_mlp = MLP(width, mlp_width, **kinds)
        self.txt_mod = AdaLN(width, 6, param_dtype=param_dtype, rngs=rngs)
        self.txt_attn = SelfAttention(width, heads, **kinds)
        self.txt_mlp = MLP(width, mlp_width, **kinds)

    def modulation(self, vec: Float[Array, "T C"]) -> tuple[Modulated, Modulated]:
        """Shift, scale and gate of attention, then of the feed-forward: of the image, of the
        context.
        """
        return self.img_mod(vec), self.txt_mod(vec)

    def __call__(
        self,
        txt: Float[Array, "B L C"],
        img: Float[Array, "B T C"],
        modulated: tuple[Modulated, Modulated],
        rope: Rotation,
        mask: Bool[Array, "B keys"] | None,
        cached_kv: KeysValues | None = None,
    ) -> tuple[tuple[Float[Array, "B L C"], Float[Array, "B T C"]], KeysValues]:
        """Both streams, and their keys and values.

        `cached_kv` are keys and values of further tokens, which have no queries here.
        """
        img_shift, img_scale, img_gate, img_shift_mlp, img_scale_mlp, img_gate_mlp = modulated[0]
        txt_shift, txt_scale, txt_gate, txt_shift_mlp, txt_scale_mlp, txt_gate_mlp = modulated[1]
        # Attention over both streams together, each with projections of its own.
        txt_qkv = self.txt_attn.project(modulate(txt, txt_shift, txt_scale))
        img_qkv = self.img_attn.project(modulate(img, img_shift, img_scale))
        q, k, v = (jnp.concatenate(pair, axis=1) for pair in zip(txt_qkv, img_qkv))
        mixed, kv = joint_attention(q, k, v, rope, mask, cached_kv)
        length = txt.shape[1]
        txt = add_gated(txt, txt_gate, self.txt_attn.proj(mixed[:, :length]))
        img = add_gated(img, img_gate, self.img_attn.proj(mixed[:, length:]))
        # A feed-forward each.
        txt = add_gated(
            txt, txt_gate_mlp, self.txt_mlp(modulate(txt, txt_shift_mlp, txt_scale_mlp))
        )
        img = add_gated(
            img, img_gate_mlp, self.img_mlp(modulate(img, img_shift_mlp, img_scale_mlp))
        )
        return (constrain(txt, "tokens"), constrain(img, "tokens")), kv


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
        kinds: Any = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.modulation = AdaLN(width, 3, param_dtype=param_dtype, rngs=rngs)
        self.linear1 = Linear(width, 3 * width + mlp_width, **kinds)
        self.linear2 = Linear(width + mlp_width, width, tensor_axis="in", **kinds)
        self.norm = QKNorm(width // heads, param_dtype=param_dtype)
        self.heads, self.widths = heads, (width, width, width, mlp_width)

    def __call__(
        self,
        x: Float[Array, "B T C"],
        modulated: Modulated,
        rope: Rotation,
        mask: Bool[Array, "B keys"] | None,
        cached_kv: KeysValues | None = None,
    ) -> tuple[Float[Array, "B T C"], KeysValues]:
        """The stream, and its keys and values; `cached_kv` as in `DoubleBlock`."""
        shift, scale, gate = modulated
        *qkv, hidden = self.linear1.multiply((modulate(x, shift, scale),), self.widths)
        mixed, kv = joint_attention(
            *self.norm(*split_heads(qkv, self.heads)), rope, mask, cached_kv
        )
        hidden = constrain(jax.nn.gelu(hidden, approximate=True), "hidden")
        [update] = self.linear2.multiply((mixed, hidden), x.shape[-1:])
        return constrain(add_gated(x, gate, update), "tokens"), kv


class FinalLayer(nnx.Module):
    """Modulated norm and the projection back to latent tokens."""

    def __init__(
        self,
        width: int,
        out_channels: int,
        *,
        use_bias: bool = True,
        dtype: DType,
        param_dtype: DType,
        rngs: nnx.Rngs,
    ) -> None:
        kinds: Any = {"use_bias": use_bias, "param_dtype": param_dtype, "rngs": rngs}
        self.adaLN_modulation = AdaLN(width, 2, **kinds)
        self.linear = Linear(width, out_channels, gain=0.0, dtype=dtype, **kinds)

    def __call__(self, x: Float[Array, "B N C"], modulated: Modulated) -> Float[Array, "B N c"]:
        shift, scale = modulated
        return self.linear(modulate(x, shift, scale))
