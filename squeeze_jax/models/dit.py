"""FLUX.1's diffusion transformer with a context stream, target tokens and reference tokens.

The context (aggregated MLLM tokens) and the image stream (target tokens, then reference tokens) meet in the attention
of double-stream blocks and flow as one sequence through single-stream blocks. Module names are FLUX.1's own.
Source: the published FLUX.1 architecture; references follow UNO (arXiv 2504.02160).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from squeeze_jax.array_types import Array, Bool, DType, Float, Int
from squeeze_jax.batch import References
from squeeze_jax.diffusion.latents import grid_positions, reference_origins
from squeeze_jax.layers.attention import attention, heads_first
from squeeze_jax.layers.linear import Linear
from squeeze_jax.layers.modulation import NORM_EPS, AdaLN, Embedder, gated, modulate, sinusoidal
from squeeze_jax.layers.norm import RMSNorm
from squeeze_jax.layers.rope import Rotation, rotate, rotation
from squeeze_jax.layers.stack import ATTENTION, Remat, scan_blocks, stacked
from squeeze_jax.sharding import constrain


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of the transformer; the defaults are FLUX.1-dev's."""

    in_channels: int = 64
    """Channels of a packed latent token: 2 x 2 latents of 16 channels."""
    context_width: int = 4096
    """Width of a context token (the aggregator's output takes the place of the T5 features)."""
    pooled_width: int = 768
    """Width of the pooled text vector; this system feeds zeros (PAPER, decision 2)."""
    heads: int = 24
    head_width: int = 128
    double_blocks: int = 19
    single_blocks: int = 38
    mlp_ratio: int = 4
    rope_axes: tuple[int, int, int] = (16, 56, 56)
    """Channels of a head that turn with (unused index, row, column)."""
    guidance: bool = True
    """Whether the model takes the distilled guidance value (dev: yes, schnell: no)."""
    reference_attention: Literal["joint", "cached"] = "joint"
    """`joint`: every token sees every token (UNO). `cached`: reference tokens see each other alone and are modulated at
    t = 0, so that their keys and values are the same in every step of sampling. Chosen before training (our decision)."""

    @property
    def width(self) -> int:
        return self.heads * self.head_width

    def __post_init__(self) -> None:
        if sum(self.rope_axes) != self.head_width:
            raise ValueError(f"dit.rope_axes {self.rope_axes} must sum to dit.head_width {self.head_width}")
        if any(axis % 2 for axis in self.rope_axes):
            raise ValueError(f"dit.rope_axes {self.rope_axes} must be even: channels turn in pairs")


STACKS = ("double_blocks", "single_blocks")
"""The transformer's stacks of blocks, by their names in it."""
Modulated = tuple[Float[Array, "*T 1 C"], ...]
"""Shifts, scales and gates of a block at some times."""
KeysValues = tuple[Float[Array, "*depth _ _ H D"], Float[Array, "*depth _ _ H D"]]
"""Rotated keys, and values, of tokens in a block [B, R, H, D]; with a leading axis: in every block of a stack."""


class Modulation(NamedTuple):
    """What noise levels do to every block: `DiT.modulation`. All are float32."""

    double: tuple[Modulated, Modulated]
    """Of the image and the context stream, six arrays [depth, T, 1, C] each."""
    single: Modulated
    """Three arrays [depth, T, 1, C]."""
    final: Modulated
    """Two arrays [T, 1, C]."""

    def at(self, i: int | Int[Array, ""]) -> "Modulation":
        """Of time i alone, T = 1."""

        def pick(axis: int) -> Any:
            return lambda x: jax.lax.dynamic_slice_in_dim(x, i, 1, axis)

        double, single = jax.tree.map(pick(1), (self.double, self.single))
        return Modulation(double, single, jax.tree.map(pick(0), self.final))


class CachedReferences(NamedTuple):
    """Reference tokens as the other tokens see them under `reference_attention="cached"`: once a prompt."""

    double: KeysValues
    single: KeysValues
    mask: Bool[Array, "B R"]


class FirstBlock(NamedTuple):
    """What a first-block cache keeps of the last velocity for which all blocks were run, of the target's tokens."""

    residual: Float[Array, "B N C"]
    """What the first block added."""
    rest: Float[Array, "B N C"]
    """What all others added."""
    known: Bool[Array, ""]
    """Whether there was one."""


class _Seen(NamedTuple):
    """What all blocks of a velocity read."""

    at: Float[Array, "B C"] | Modulation
    by: Rotation
    mask: Bool[Array, "B S"] | None
    cache: CachedReferences | None


class DiT(nnx.Module):
    """Predicts the velocity ε − x_0 of the target tokens."""

    def __init__(
        self,
        config: DiTConfig,
        *,
        dtype: DType = jnp.float32,
        param_dtype: DType = jnp.float32,
        remat: Remat = "none",
        unroll: int | bool = 1,
        rngs: nnx.Rngs,
    ) -> None:
        width = config.width
        kinds: Any = {"dtype": dtype, "param_dtype": param_dtype}
        self.config, self.dtype, self.unroll = config, jnp.dtype(dtype), unroll
        self.remat: Remat = remat
        self.img_in = Linear(config.in_channels, width, **kinds, rngs=rngs)
        self.txt_in = Linear(config.context_width, width, **kinds, rngs=rngs)
        self.time_in = Embedder(256, width, param_dtype=param_dtype, rngs=rngs)
        self.vector_in = Embedder(config.pooled_width, width, param_dtype=param_dtype, rngs=rngs)
        self.guidance_in = Embedder(256, width, param_dtype=param_dtype, rngs=rngs) if config.guidance else None
        self.double_blocks = stacked(lambda r: DoubleBlock(config, **kinds, rngs=r), config.double_blocks, rngs)
        self.single_blocks = stacked(lambda r: SingleBlock(config, **kinds, rngs=r), config.single_blocks, rngs)
        self.final_layer = FinalLayer(config, **kinds, rngs=rngs)

    def __call__(
        self,
        target: Float[Array, "B N c"],
        context: Float[Array, "B L C"],
        t: Float[Array, " B"],
        guidance: Float[Array, " B"] | None = None,
        pooled: Float[Array, "B P"] | None = None,
        *,
        target_grid: tuple[int, int],
        references: Sequence[tuple[Float[Array, "B _ c"], tuple[int, int]]] = (),
        context_mask: Bool[Array, "B L"] | None = None,
    ) -> Float[Array, "B N c"]:
        """The velocity of noisy `target` tokens at time `t`, with references of known sizes.

        `target_grid` and each reference's grid are (rows, columns) of tokens. `guidance` is the distilled guidance
        value as a user gives it (3.5, say), needed where the model takes one. `pooled=None` means zeros. The context
        may have length 0.
        """
        origins = reference_origins(target_grid, [grid for _, grid in references])
        rows = [grid_positions(*grid, origin=origin) for (_, grid), origin in zip(references, origins)]
        batch = None
        if references:
            tokens = jnp.concatenate([tokens for tokens, _ in references], axis=1)
            positions = jnp.broadcast_to(jnp.concatenate(rows)[None], (*tokens.shape[:2], 2))
            batch = References(tokens, jnp.ones(tokens.shape[:2], bool), positions)
        vec = self.vector(t, guidance, pooled)
        shown: Any = batch
        if batch is not None and self.config.reference_attention == "cached":
            shown = self.cached(batch, self.vector(jnp.zeros_like(t), guidance, pooled))
        return self.velocity(target, target_grid, vec, context, context_mask, shown, references_full=True)

    def vector(
        self,
        t: Float[Array, " B"],
        guidance: Float[Array, " B"] | None = None,
        pooled: Float[Array, "B P"] | None = None,
    ) -> Float[Array, "B C"]:
        """What modulates every block: embedded time, guidance and pooled vector, summed, in float32."""
        if (guidance is None) == self.config.guidance:
            raise ValueError(
                "this transformer takes a guidance value: pass guidance=[B]"
                if self.config.guidance
                else "this transformer takes no guidance value: leave guidance out"
            )
        vec = self.time_in(sinusoidal(t))
        if self.guidance_in is not None:
            vec = vec + self.guidance_in(sinusoidal(guidance))
        if pooled is None:
            pooled = jnp.zeros((t.shape[0], self.config.pooled_width), jnp.float32)
        return vec + self.vector_in(pooled)

    def modulation(self, vec: Float[Array, "T C"]) -> Modulation:
        """What conditioning vectors do to every block, for programs that know their times beforehand: samplers."""
        _, double = scan_blocks(self.double_blocks, lambda block, carry, _: (carry, block.modulation(vec)), None)
        _, single = scan_blocks(self.single_blocks, lambda block, carry, _: (carry, block.modulation(vec)), None)
        return Modulation(double, single, self.final_layer.adaLN_modulation(vec))

    def cached(self, references: References, at: Float[Array, "B C"]) -> CachedReferences:
        """Keys and values of reference tokens, which see each other alone; `at` is the conditioning vector of t = 0."""
        seen = _Seen(at, self._rotation(references.positions, 0), references.mask, None)
        img = constrain(self.img_in(references.tokens), "tokens")
        (_, img), double = self._double(img[:, :0], img, seen, keep=True)
        _, single = self._single(img, seen, keep=True)
        return CachedReferences(double, single, references.mask)

    def velocity(
        self,
        target: Float[Array, "B N c"],
        target_grid: tuple[int, int] | Int[Array, "B 2"],
        at: Float[Array, "B C"] | Modulation,
        context: Float[Array, "B L W"],
        context_mask: Bool[Array, "B L"] | None = None,
        references: References | CachedReferences | None = None,
        *,
        references_full: bool = False,
    ) -> Float[Array, "B N c"]:
        """The velocity with references as one padded, masked row of tokens; the form that training and sampling use.

        `target_grid` is (rows, columns) of tokens, one for all or one a row of the batch: a batch of one number of tokens
        may hold portraits and landscapes. `at` is the conditioning vector of each sample's time, or what `modulation` made
        of one for all. `references_full` says that no reference token is padding, so that no mask is needed.
        """
        (txt, img), seen = self._entered(
            target, target_grid, at, context, context_mask, references, references_full=references_full
        )
        return self._velocity_of(self._through(txt, img, seen, target.shape[1]), seen)

    def velocity_after_first(
        self,
        target: Float[Array, "B N c"],
        target_grid: tuple[int, int],
        at: Float[Array, "B C"] | Modulation,
        context: Float[Array, "B L W"],
        context_mask: Bool[Array, "B L"] | None,
        references: References | CachedReferences | None,
        kept: FirstBlock,
        threshold: float,
    ) -> tuple[Float[Array, "B N c"], FirstBlock]:
        """`velocity`, but where the first block adds almost what it added to `kept`, the others are taken to do so, too.

        Almost: mean |difference| at most `threshold` · mean |what was added then|, over all of the batch (diffusers'
        `FirstBlockCacheConfig`, which looks at every image token; here at the target's, as references come and go).
        """
        (txt, img), seen = self._entered(target, target_grid, at, context, context_mask, references)
        length, depth = target.shape[1], self.config.double_blocks
        (txt, first), _ = self._double(txt, img, seen, range(1))
        begun = first[:, :length].astype(jnp.float32)
        residual = begun - img[:, :length].astype(jnp.float32)
        change = jnp.abs(residual - kept.residual).mean() / jnp.abs(kept.residual).mean()
        again = ~kept.known | (change > threshold)

        def run() -> tuple[jax.Array, FirstBlock]:
            x = self._through(txt, first, seen, length, range(1, depth))
            return x, FirstBlock(residual, x.astype(jnp.float32) - begun, jnp.ones((), bool))

        x, kept = jax.lax.cond(again, run, lambda: ((begun + kept.rest).astype(first.dtype), kept))
        return self._velocity_of(x, seen), kept

    def _entered(
        self,
        target: Array,
        target_grid: tuple[int, int] | Array,
        at: Any,
        context: Array,
        context_mask: Array | None,
        references: References | CachedReferences | None,
        *,
        references_full: bool = False,
    ) -> tuple[tuple[jax.Array, jax.Array], _Seen]:
        """Context and image tokens as the first block sees them."""
        batch, length = target.shape[0], target.shape[1]
        positions = target_positions(target_grid, length)
        tokens, image_mask, cache = target, None, None
        if isinstance(references, CachedReferences):
            cache = references
        elif references is not None:
            tokens = jnp.concatenate([target, references.tokens.astype(target.dtype)], axis=1)
            positions = jnp.broadcast_to(positions, (batch, length, 2))
            positions = jnp.concatenate([positions, references.positions], axis=1)
        if references is not None and not references_full:
            image_mask = jnp.concatenate([jnp.ones((batch, length), bool), references.mask], axis=1)
        seen = tokens.shape[1] + (0 if cache is None else cache.mask.shape[1])
        mask = _join_masks(context_mask, image_mask, (batch, context.shape[1], seen))
        by = self._rotation(positions, context.shape[1])

        txt, img = constrain(self.txt_in(context), "tokens"), constrain(self.img_in(tokens), "tokens")
        return (txt, img), _Seen(at, by, mask, cache)

    def _through(
        self, txt: jax.Array, img: jax.Array, seen: _Seen, length: int, among: range | None = None
    ) -> Float[Array, "B N C"]:
        """The target's tokens after the double blocks (`among` them) and all single blocks."""
        (txt, img), _ = self._double(txt, img, seen, among)
        x, _ = self._single(jnp.concatenate([txt, img], axis=1), seen)
        return x[:, txt.shape[1] : txt.shape[1] + length]

    def _velocity_of(self, x: Float[Array, "B N C"], seen: _Seen) -> Float[Array, "B N c"]:
        at = seen.at
        return self.final_layer(x, at.final if isinstance(at, Modulation) else self.final_layer.adaLN_modulation(at))

    def _double(self, txt: Any, img: Any, seen: _Seen, among: range | None = None, *, keep: bool = False) -> Any:
        """Both streams through all double blocks or those `among` them; `keep`: and every block's keys and values."""
        at, by, mask, cache = seen
        known = at.double if isinstance(at, Modulation) else None

        def apply(block: DoubleBlock, streams: Any, inputs: Any) -> Any:
            (txt, img), (modulated, shown) = streams, inputs
            streams, own = block(txt, img, block.modulation(at) if modulated is None else modulated, by, mask, shown)
            return streams, own if keep else None

        how: Any = {"remat": self.remat, "unroll": self.unroll, "among": among}
        return scan_blocks(self.double_blocks, apply, (txt, img), (known, cache and cache.double), **how)

    def _single(self, x: Any, seen: _Seen, *, keep: bool = False) -> Any:
        """The joint stream through all single blocks; `keep`: and every block's keys and values."""
        at, by, mask, cache = seen
        known = at.single if isinstance(at, Modulation) else None

        def apply(block: SingleBlock, x: Any, inputs: Any) -> Any:
            modulated, shown = inputs
            x, own = block(x, block.modulation(at) if modulated is None else modulated, by, mask, shown)
            return x, own if keep else None

        how: Any = {"remat": self.remat, "unroll": self.unroll}
        return scan_blocks(self.single_blocks, apply, x, (known, cache and cache.single), **how)

    def _rotation(self, positions: Int[Array, "#B _ 2"], context_length: int) -> Rotation:
        """Angles of the joint sequence: context tokens at (0, 0, 0), image tokens at (0, row, column)."""
        positions = jnp.pad(positions, ((0, 0), (context_length, 0), (1, 0)))
        return rotation(positions, self.config.rope_axes)


def target_positions(grid: tuple[int, int] | Int[Array, "B 2"], length: int) -> Int[Array, "#B N 2"]:
    """`grid_positions` of one grid, or of one a row of the batch, each with `length` tokens."""
    if isinstance(grid, tuple):
        return jnp.asarray(grid_positions(grid[0], grid[1]))[None]
    place, columns = jnp.arange(length)[None], jnp.asarray(grid)[:, 1:]
    return jnp.stack([place // columns, place % columns], axis=-1)


def _join_masks(
    context: jax.Array | None, image: jax.Array | None, sizes: tuple[int, int, int]
) -> Bool[Array, "B S"] | None:
    if context is None and image is None:
        return None
    batch, context_length, image_length = sizes
    context = jnp.ones((batch, context_length), bool) if context is None else context
    image = jnp.ones((batch, image_length), bool) if image is None else image
    return jnp.concatenate([context, image], axis=1)


class SelfAttention(nnx.Module):
    """Fused q/k/v projection, q/k RMSNorm and output projection of one stream."""

    def __init__(self, config: DiTConfig, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs) -> None:
        width = config.width
        self.qkv = Linear(width, 3 * width, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.norm = QKNorm(config.head_width, param_dtype=param_dtype)
        self.proj = Linear(width, width, cut="in", dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.heads = config.heads

    def project(self, x: Float[Array, "B T C"]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q, k, v, each [B T H D], q and k normalised."""
        return self.norm(*split_heads(self.qkv(x), self.heads))


class QKNorm(nnx.Module):
    def __init__(self, head_width: int, *, param_dtype: DType) -> None:
        self.query_norm = RMSNorm(head_width, eps=NORM_EPS, param_dtype=param_dtype)
        self.key_norm = RMSNorm(head_width, eps=NORM_EPS, param_dtype=param_dtype)

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        return self.query_norm(q), self.key_norm(k), v


class MLP(nnx.Module):
    """Linear, GELU (tanh form, as FLUX.1 has it), linear."""

    def __init__(self, width: int, hidden: int, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs) -> None:
        self.in_layer = Linear(width, hidden, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.out_layer = Linear(hidden, width, cut="in", dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
        return self.out_layer(constrain(jax.nn.gelu(self.in_layer(x), approximate=True), "hidden"))


class DoubleBlock(nnx.Module):
    """Context and image stream with weights of their own, joined in attention."""

    def __init__(self, config: DiTConfig, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs) -> None:
        width = config.width
        kinds: Any = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.img_mod = AdaLN(width, 6, param_dtype=param_dtype, rngs=rngs)
        self.img_attn = SelfAttention(config, **kinds)
        self.img_mlp = MLP(width, config.mlp_ratio * width, **kinds)
        self.txt_mod = AdaLN(width, 6, param_dtype=param_dtype, rngs=rngs)
        self.txt_attn = SelfAttention(config, **kinds)
        self.txt_mlp = MLP(width, config.mlp_ratio * width, **kinds)

    def modulation(self, vec: Float[Array, "T C"]) -> tuple[Modulated, Modulated]:
        return self.img_mod(vec), self.txt_mod(vec)

    def __call__(
        self,
        txt: Float[Array, "B L C"],
        img: Float[Array, "B T C"],
        modulated: tuple[Modulated, Modulated],
        by: Rotation,
        mask: Bool[Array, "B keys"] | None,
        seen: KeysValues | None = None,
    ) -> tuple[tuple[Float[Array, "B L C"], Float[Array, "B T C"]], KeysValues]:
        """Both streams, and their keys and values. `seen` are keys and values of tokens that are only looked at."""
        img_shift, img_scale, img_gate, img_shift_mlp, img_scale_mlp, img_gate_mlp = modulated[0]
        txt_shift, txt_scale, txt_gate, txt_shift_mlp, txt_scale_mlp, txt_gate_mlp = modulated[1]
        txt_qkv = self.txt_attn.project(modulate(txt, txt_shift, txt_scale))
        img_qkv = self.img_attn.project(modulate(img, img_shift, img_scale))
        q, k, v = (jnp.concatenate(pair, axis=1) for pair in zip(txt_qkv, img_qkv))
        mixed, own = joint_attention(q, k, v, by, mask, seen)
        length = txt.shape[1]
        txt = gated(txt, txt_gate, self.txt_attn.proj(mixed[:, :length]))
        img = gated(img, img_gate, self.img_attn.proj(mixed[:, length:]))
        txt = gated(txt, txt_gate_mlp, self.txt_mlp(modulate(txt, txt_shift_mlp, txt_scale_mlp)))
        img = gated(img, img_gate_mlp, self.img_mlp(modulate(img, img_shift_mlp, img_scale_mlp)))
        return (constrain(txt, "tokens"), constrain(img, "tokens")), own


class SingleBlock(nnx.Module):
    """One stream; attention and feed-forward in parallel, between two fused linear layers."""

    def __init__(self, config: DiTConfig, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs) -> None:
        width, hidden = config.width, config.mlp_ratio * config.width
        kinds: Any = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.modulation = AdaLN(width, 3, param_dtype=param_dtype, rngs=rngs)
        self.linear1 = Linear(width, 3 * width + hidden, **kinds)
        self.linear2 = Linear(width + hidden, width, cut="in", **kinds)
        self.norm = QKNorm(config.head_width, param_dtype=param_dtype)
        self.heads, self.width = config.heads, width

    def __call__(
        self,
        x: Float[Array, "B T C"],
        modulated: Modulated,
        by: Rotation,
        mask: Bool[Array, "B keys"] | None,
        seen: KeysValues | None = None,
    ) -> tuple[Float[Array, "B T C"], KeysValues]:
        """As `DoubleBlock`, of one stream."""
        shift, scale, gate = modulated
        qkv, hidden = jnp.split(self.linear1(modulate(x, shift, scale)), [3 * self.width], axis=-1)
        mixed, own = joint_attention(*self.norm(*split_heads(qkv, self.heads)), by, mask, seen)
        hidden = constrain(jax.nn.gelu(hidden, approximate=True), "hidden")
        return constrain(gated(x, gate, self.linear2(jnp.concatenate([mixed, hidden], axis=-1))), "tokens"), own


class FinalLayer(nnx.Module):
    """Modulated norm and the projection back to latent tokens."""

    def __init__(self, config: DiTConfig, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs) -> None:
        self.adaLN_modulation = AdaLN(config.width, 2, param_dtype=param_dtype, rngs=rngs)
        self.linear = Linear(
            config.width, config.in_channels, gain=0.0, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )

    def __call__(self, x: Float[Array, "B N C"], modulated: Modulated) -> Float[Array, "B N c"]:
        shift, scale = modulated
        return self.linear(modulate(x, shift, scale))


def split_heads(qkv: Float[Array, "B T _"], heads: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Fused [q; k; v] channels as three arrays [B T H D]."""
    shape = (*qkv.shape[:2], heads, qkv.shape[-1] // (3 * heads))  # no -1: a context may have length 0
    q, k, v = (heads_first(part.reshape(shape)) for part in jnp.split(qkv, 3, axis=-1))
    return q, k, v


def joint_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, by: Rotation, mask: Bool[Array, "B keys"] | None, seen: KeysValues | None
) -> tuple[Float[Array, "B T C"], KeysValues]:
    """Attention of rotated q and k over the joint sequence and what is only seen, heads merged; and its keys and values."""
    q, k, v = (constrain(x, "heads") for x in (rotate(q, by), rotate(k, by), v))
    own = k, v
    if seen is not None:  # one row of them may serve several images
        spread = [jnp.repeat(x, q.shape[0] // x.shape[0], axis=0) for x in seen]
        k, v = (jnp.concatenate(pair, axis=1) for pair in zip(own, spread))
    mixed = attention(q, k, v, mask=mask, name=ATTENTION)
    return mixed.reshape(*mixed.shape[:2], -1), own
