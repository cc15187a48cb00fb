"""From all hidden states of the MLLM to the transformer's context: LAP, DLA, and the simpler ways
of the ablation.

Layerwise attention pooling (LAP, from UniFusion, arXiv 2510.12789) lets every token attend across
the layers of its own hidden states, then pools them to one vector. The Dual Layer Aggregator
(DLA, arXiv 2605.26111) has one LAP for text tokens and one for image tokens. The blocks inside
follow Krea 2's `text_fusion` (docs/decisions.md, "Inside the aggregator").
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from squeeze_jax.array_types import Array, Bool, DType, Float
from squeeze_jax.batch import Context, HiddenStates
from squeeze_jax.layers.attention import attention
from squeeze_jax.layers.linear import Linear, silu
from squeeze_jax.layers.norm import RMSNorm, scaled
from squeeze_jax.layers.stack import ATTENTION, Remat, scan_blocks, stack_blocks
from squeeze_jax.sharding import constrain

Kind = Literal["last_layer", "last_layer_vit", "lap", "dla"]
KINDS = get_args(Kind)


@dataclass(frozen=True)
class AggregatorConfig:
    """How hidden states become context tokens; the defaults are for InternVL3-8B.

    Source: docs/decisions.md, "Inside the aggregator".
    """

    kind: Kind = "dla"
    """`dla`: a LAP each for text and image tokens; `lap`: one for all; `last_layer`: the last
    hidden state; `last_layer_vit`: the same, image tokens blended with the vision tower's
    features by one learned weight (the weight is our decision: docs/decisions.md, "Inside the
    aggregator")."""
    layers: tuple[int, ...] = tuple(range(29))
    """Which hidden states the pooling sees, 0 = input embeddings; `last_layer` and
    `last_layer_vit` take the last one."""
    width: int = 3584
    """Width of the MLLM's hidden states."""
    out_width: int = 4096
    """Width of a context token: the transformer's `context_width`."""
    heads: int = 28
    mlp_width: int = 9728
    layer_blocks: int = 1
    """Attention blocks over the layer axis in each LAP."""
    refiner_blocks: int = 2
    """Attention blocks over the token axis after the join; they undo the MLLM's causal bias."""
    norm_eps: float = 1e-5
    """Epsilon of every RMSNorm, added to the mean square: Krea 2's (docs/decisions.md, "Inside the
    aggregator")."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"aggregator.kind is {self.kind!r}; choose one of {', '.join(KINDS)}")
        if self.width % self.heads:
            raise ValueError(
                f"aggregator.width {self.width} must be a multiple of aggregator.heads {self.heads}"
            )
        if not self.layers or sorted(set(self.layers)) != list(self.layers) or self.layers[0] < 0:
            raise ValueError(
                f"aggregator.layers {self.layers} must be distinct, ascending and not negative"
            )
        if not self.norm_eps > 0:
            raise ValueError(f"aggregator.norm_eps is {self.norm_eps}; it must be larger than 0")

    @property
    def reads(self) -> tuple[int, ...]:
        """The hidden states that are looked at, ascending: a record needs no others."""
        by_kind = {
            "last_layer": self.layers[-1:],
            "last_layer_vit": tuple(sorted({0, self.layers[-1]})),
        }
        return by_kind.get(self.kind, self.layers)

    @property
    def pools(self) -> tuple[str, ...]:
        """The names of the poolings: one each for text and image tokens, one for all, or none."""
        return {"dla": ("text", "image"), "lap": ("shared",)}.get(self.kind, ())


class Aggregator(nnx.Module):
    """Pools the MLLM's hidden states into context tokens, in the order of its sequence."""

    def __init__(
        self,
        config: AggregatorConfig,
        *,
        dtype: DType = jnp.float32,
        param_dtype: DType = jnp.float32,
        remat: Remat = "none",
        unroll: int | bool = 1,
        rngs: nnx.Rngs,
    ) -> None:
        kinds: Any = {"dtype": dtype, "param_dtype": param_dtype}
        self.config, self.dtype, self.unroll = config, jnp.dtype(dtype), unroll
        self.remat: Remat = remat
        self.pools = nnx.Dict(
            {name: LayerPool(config, **kinds, remat=remat, rngs=rngs) for name in config.pools}
        )
        if config.kind == "last_layer_vit":
            # The vision tower's share is the sigmoid of this: a half at the start (our decision).
            self.vision_weight = nnx.Param(jnp.zeros((), param_dtype))
        refiner = config.refiner_blocks
        self.refiner_blocks = (
            stack_blocks(lambda r: FusionBlock(config, **kinds, rngs=r), refiner, rngs)
            if refiner
            else None
        )
        self.out = Linear(config.width, config.out_width, tensor_axis="in", **kinds, rngs=rngs)

    def __call__(self, states: HiddenStates) -> Context:
        """Context tokens [B, Lt + Li, out_width]; padding comes last and is masked out.

        The states are all of the MLLM's (sampling), or exactly those of `config.reads`
        (training). Raises ValueError where a layer that is read is missing.
        """
        text, image = self._pool(states)
        # Join text and image tokens in the order of the MLLM's sequence, padding behind.
        mask = jnp.concatenate([states.text_mask, states.image_mask], axis=1)
        position = jnp.concatenate([states.text_positions, states.image_positions], axis=1)
        order = jnp.argsort(jnp.where(mask, position, jnp.iinfo(position.dtype).max), axis=1)
        tokens = jnp.take_along_axis(
            jnp.concatenate([text, image], axis=1), order[..., None], axis=1
        )
        mask = jnp.take_along_axis(mask, order, axis=1)
        return Context(self.out(self.refine(tokens, mask)), mask)

    def refine(
        self, tokens: Float[Array, "B L C"], mask: Bool[Array, "B L"]
    ) -> Float[Array, "B L C"]:
        """Attention over the token axis, in both directions."""
        if self.refiner_blocks is None:
            return tokens
        tokens, _ = scan_blocks(
            self.refiner_blocks,
            lambda block, x, _: (block(x, mask), None),
            tokens,
            remat=self.remat,
            unroll=self.unroll,
        )
        return tokens

    def _pool(self, states: HiddenStates) -> tuple[Float[Array, "B Lt C"], Float[Array, "B Li C"]]:
        reads, available = self.config.reads, states.text.shape[1]
        # Records hold exactly the layers in `reads`; other callers pass all layers, to be indexed.
        exact = available == len(reads)
        if not exact and reads[-1] >= available:
            raise ValueError(
                f"aggregator.layers asks for layer {reads[-1]}, the hidden states have {available}"
            )
        text, image = (
            (x if exact else x[:, jnp.array(reads)]).astype(self.dtype)
            for x in (states.text, states.image)
        )
        match self.config.kind:
            case "dla":
                return self.pools["text"](text), self.pools["image"](image)
            case "lap":
                both = self.pools["shared"](jnp.concatenate([text, image], axis=2))
                return both[:, : text.shape[2]], both[:, text.shape[2] :]
            case "last_layer":
                return text[:, -1], image[:, -1]
            case "last_layer_vit":
                weight = jax.nn.sigmoid(self.vision_weight[...].astype(jnp.float32))
                # At image tokens, layer 0 (input embeddings) is the tower's projected features.
                last, vision = (image[:, i].astype(jnp.float32) for i in (-1, 0))
                return text[:, -1], (last * (1 - weight) + vision * weight).astype(self.dtype)


class LayerPool(nnx.Module):
    """LAP: attention across the layer axis of every token, then a learned, bias-free mix of the
    layers.
    """

    def __init__(
        self,
        config: AggregatorConfig,
        *,
        dtype: DType,
        param_dtype: DType,
        remat: Remat = "none",
        rngs: nnx.Rngs,
    ) -> None:
        kinds: Any = {"dtype": dtype, "param_dtype": param_dtype}
        count = config.layer_blocks
        self.remat: Remat = remat
        self.layer_blocks = (
            stack_blocks(lambda r: FusionBlock(config, **kinds, rngs=r), count, rngs)
            if count
            else None
        )
        # The weights start equal, so that no layer is preferred.
        self.projector = nnx.Param(
            jnp.full((len(config.layers),), 1.0 / len(config.layers), param_dtype)
        )
        self.dtype = jnp.dtype(dtype)

    def __call__(self, states: Float[Array, "B M L C"]) -> Float[Array, "B L C"]:
        batch, layers, length, width = states.shape
        x = states.swapaxes(1, 2).reshape(batch * length, layers, width)
        if self.layer_blocks is not None:
            x, _ = scan_blocks(
                self.layer_blocks, lambda block, x, _: (block(x), None), x, remat=self.remat
            )
        pooled = jnp.einsum("TMC,M->TC", x, self.projector[...].astype(self.dtype))
        return pooled.reshape(batch, length, width)


class FusionBlock(nnx.Module):
    """Pre-norm transformer block: q/k-normed attention with a sigmoid output gate, then SwiGLU;
    no biases.
    """

    def __init__(
        self, config: AggregatorConfig, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs
    ) -> None:
        width = config.width
        kinds: Any = {"use_bias": False, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        norm: Any = {"eps": config.norm_eps, "zero_centred": True, "param_dtype": param_dtype}
        self.norm1, self.norm2 = RMSNorm(width, **norm), RMSNorm(width, **norm)
        self.norm_q, self.norm_k = (RMSNorm(width // config.heads, **norm) for _ in "qk")
        self.to_qkv = Linear(width, 3 * width, **kinds)
        self.to_gate = Linear(width, width, **kinds)
        self.to_out = Linear(width, width, tensor_axis="in", **kinds)
        self.ff_gate = Linear(width, config.mlp_width, **kinds)
        self.ff_up = Linear(width, config.mlp_width, **kinds)
        self.ff_down = Linear(config.mlp_width, width, tensor_axis="in", **kinds)
        self.heads = config.heads

    def project(self, y: Float[Array, "B T C"]) -> tuple[Float[Array, "B T H D"], ...]:
        """Normalised queries and keys, and values, of normed tokens."""
        shape = (
            *y.shape[:2],
            self.heads,
            y.shape[-1] // self.heads,
        )  # no -1: there may be no tokens at all
        q, k, v = (part.reshape(shape) for part in jnp.split(self.to_qkv(y), 3, axis=-1))
        normed = (self.norm_q(q), self.norm_k(k), v)
        return tuple(constrain(part, "heads") for part in normed)

    def __call__(
        self, x: Float[Array, "B T C"], mask: Bool[Array, "B T"] | None = None
    ) -> Float[Array, "B T C"]:
        y = self.norm1(x)
        q, k, v = self.project(y)
        mixed = attention(q, k, v, mask=mask, name=ATTENTION).reshape(y.shape)
        gate = jax.nn.sigmoid(self.to_gate(y).astype(jnp.float32))
        x = constrain(x + self.to_out(scaled(mixed, gate)), "tokens")
        y = self.norm2(x)
        return constrain(
            x + self.ff_down(constrain(silu(self.ff_gate(y)) * self.ff_up(y), "hidden")), "tokens"
        )
