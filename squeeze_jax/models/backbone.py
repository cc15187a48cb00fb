"""The interface of a diffusion transformer: the base class `Backbone` and the values that it
exchanges.

Aggregator, sampler, trainer, planner and export use these names alone. `models/dit.py` (FLUX.1)
is the first backbone; `tests/toy_backbone.py` is the smallest one that can be trained and
sampled.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int32

from squeeze_jax.array_types import Array, Bool, Float, Int, PyTree
from squeeze_jax.batch import References
from squeeze_jax.diffusion.latents import Grid, ReferencePositions, grid_positions
from squeeze_jax.layers.attention import attention, heads_first
from squeeze_jax.layers.rope import Rotation, rotate
from squeeze_jax.layers.stack import ATTENTION
from squeeze_jax.sharding import constrain

Modulated = tuple[Float[Array, "*T 1 C"], ...]
"""Shifts, scales and gates of one block, at T times."""
KeysValues = tuple[Float[Array, "*depth _ _ H D"], Float[Array, "*depth _ _ H D"]]
"""Rotated keys, and values, of R tokens in a block [B, R, H, D]; with a leading axis [depth]
those of a whole stack."""
ReferenceAttention = Literal["joint", "cached"]
Streams = tuple[Float[Array, "B L C"], Float[Array, "B T C"]]
"""Hidden states between blocks: of the context stream, and of the image stream."""


class Modulation(NamedTuple):
    """Shifts, scales and gates of all blocks at T times, computed before a sampler's loop. All
    are float32.
    """

    double: Any
    """Of the double-stream blocks, every array with axes [depth, T, 1, C]."""
    single: Any
    """Of the single-stream blocks, likewise."""
    final: Any
    """Of the final layer, arrays [T, 1, C]."""

    def at(self, i: int | Int[Array, ""]) -> "Modulation":
        """Selects time i alone, T = 1."""

        def select(tree: PyTree, axis: int) -> PyTree:
            return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i, 1, axis), tree)

        return Modulation(select(self.double, 1), select(self.single, 1), select(self.final, 0))


class CachedReferences(NamedTuple):
    """Keys and values of reference tokens in every block (`reference_attention="cached"`),
    computed once a prompt.
    """

    double: KeysValues
    single: KeysValues
    mask: Bool[Array, "B R"]


class BlockInputs(NamedTuple):
    """What every block reads besides its hidden states."""

    temb: Float[Array, "B C"] | Modulation
    """The conditioning vector, or the modulation that was computed from it beforehand."""
    rope: Rotation
    mask: Bool[Array, "B S"] | None
    """Which keys count: of the context, the image stream and the cached references."""
    cached_kv: CachedReferences | None


@runtime_checkable
class BackboneConfig(Protocol):
    """What the system reads of a backbone's config."""

    @property
    def in_channels(self) -> int:
        """Channels of a latent token."""
        ...

    @property
    def context_width(self) -> int:
        """Width of a context token: the aggregator's output."""
        ...

    @property
    def width(self) -> int:
        """Width of the hidden states."""
        ...

    @property
    def guidance(self) -> bool:
        """Whether the backbone takes a distilled guidance value."""
        ...

    @property
    def reference_attention(self) -> ReferenceAttention:
        """Whether references attend with all the others ("joint"), or to themselves alone, with
        keys and values that are computed once a prompt ("cached")."""
        ...

    def reference_positions(
        self, target_grid: Grid, reference_grids: Sequence[Grid]
    ) -> Int32[np.ndarray, "R axes"]:
        """Where each reference token stands on the rotary axes; grids are (rows, columns) of
        tokens."""
        ...

    def schedule_shift(self, target_tokens: int, steps: int) -> float:
        """μ of the published schedule, for a picture of so many tokens in so many steps."""
        ...


class Backbone(nnx.Module):
    """A diffusion transformer that predicts the velocity ε − x_0 of target tokens.

    The contract: `velocity` equals `embed_inputs`, then `apply_blocks` over all blocks, then
    `predict_velocity`. Times are in [0, 1], 1 is noise. Masked context and reference tokens
    change nothing. `embed_timestep` and `make_modulation` depend on times (and guidance) alone,
    so a sampler computes them before its loop. References are `References` (joint attention) or
    what `cache_references` made of them.
    """

    config: BackboneConfig

    def __call__(
        self,
        target: Float[Array, "B N c"],
        context: Float[Array, "B L W"],
        t: Float[Array, " B"],
        guidance: Float[Array, " B"] | None = None,
        *,
        target_grid: Grid,
        references: Sequence[tuple[Float[Array, "B _ c"], Grid]] = (),
        context_mask: Bool[Array, "B L"] | None = None,
        **extra: Float[Array, "B _"] | None,
    ) -> Float[Array, "B N c"]:
        """Predicts the velocity of noisy `target` tokens at times `t`, with references of known
        sizes.

        `target_grid` and each reference's grid are (rows, columns) of tokens. `guidance` is the
        distilled guidance value as a user gives it (3.5, say), needed where the model takes one.
        The context may have length 0. `extra` are further inputs of `embed_timestep`.
        """
        shown: References | CachedReferences | None = None
        if references:
            shown = join_references(references, target_grid, self.config.reference_positions)
            if self.config.reference_attention == "cached":
                start = self.embed_timestep(jnp.zeros_like(t), guidance, **extra)
                shown = self.cache_references(shown, start)
        temb = self.embed_timestep(t, guidance, **extra)
        return self.velocity(target, target_grid, temb, context, context_mask, shown)

    def embed_timestep(
        self, t: Float[Array, " B"], guidance: Float[Array, " B"] | None = None
    ) -> jax.Array:
        """The conditioning vector [B, C] of times and distilled guidance values."""
        raise NotImplementedError

    def make_modulation(self, temb: Float[Array, "T C"]) -> Modulation:
        """All shifts, scales and gates of every block at T embedded times."""
        raise NotImplementedError

    def cache_references(
        self, references: References, temb: Float[Array, "B C"]
    ) -> CachedReferences:
        """Keys and values of the references in every block, for `reference_attention="cached"`."""
        raise NotImplementedError

    def embed_inputs(
        self,
        target: Float[Array, "B N c"],
        target_grid: tuple[int, int] | Int[Array, "B 2"],
        temb: Float[Array, "B C"] | Modulation,
        context: Float[Array, "B L W"],
        context_mask: Bool[Array, "B L"] | None = None,
        references: References | CachedReferences | None = None,
    ) -> tuple[Streams, BlockInputs]:
        """The hidden states before block 0, and what all blocks read; the target's tokens stand
        first.
        """
        raise NotImplementedError

    def apply_blocks(
        self, streams: Streams, inputs: BlockInputs, start: int = 0, stop: int | None = None
    ) -> Streams:
        """The hidden states after the blocks `start` to `stop` - 1, of all blocks in order."""
        raise NotImplementedError

    def predict_velocity(
        self, hidden: Float[Array, "B N C"], inputs: BlockInputs
    ) -> Float[Array, "B N c"]:
        """The velocity of the target tokens from their hidden states after the last block."""
        raise NotImplementedError

    def velocity(
        self,
        target: Float[Array, "B N c"],
        target_grid: tuple[int, int] | Int[Array, "B 2"],
        temb: Float[Array, "B C"] | Modulation,
        context: Float[Array, "B L W"],
        context_mask: Bool[Array, "B L"] | None = None,
        references: References | CachedReferences | None = None,
    ) -> Float[Array, "B N c"]:
        """Predicts the velocity: the one forward of training, sampling and verification.

        `target_grid` is (rows, columns) of tokens, one for all or one a row of the batch: a batch
        of one number of tokens may hold portraits and landscapes. `temb` is the conditioning vector
        of each sample's time, or what `make_modulation` computed of one for all.
        """
        streams, inputs = self.embed_inputs(
            target, target_grid, temb, context, context_mask, references
        )
        _, img = self.apply_blocks(streams, inputs)
        return self.predict_velocity(img[:, : target.shape[1]], inputs)


def target_positions(
    grid: tuple[int, int] | Int[Array, "B 2"], length: int
) -> Int[Array, "#B N 2"]:
    """Row and column of the target's tokens; `grid` is one for all samples, or one for each, of
    `length` tokens.
    """
    if isinstance(grid, tuple):
        return jnp.asarray(grid_positions(grid[0], grid[1]))[None]
    index, columns = jnp.arange(length)[None], jnp.asarray(grid)[:, 1:]
    return jnp.stack([index // columns, index % columns], axis=-1)


def join_references(
    references: Sequence[tuple[Float[Array, "B _ c"], Grid]],
    target_grid: Grid,
    positions_of: ReferencePositions,
) -> References:
    """Joins references that have the same sizes in every sample to one row of tokens, none padding.

    Each has its tokens and (rows, columns) of them; samples of different sizes are the business of
    `diffusion.latents.pack_references`.
    """
    tokens = jnp.concatenate([tokens for tokens, _ in references], axis=1)
    positions = jnp.asarray(positions_of(target_grid, [grid for _, grid in references]))
    positions = jnp.broadcast_to(positions[None], (len(tokens), *positions.shape))
    return References(tokens, jnp.ones(tokens.shape[:2], bool), positions)


def append_references(
    target: Float[Array, "B N c"],
    positions: Int[Array, "#B N axes"],
    references: References | CachedReferences | None,
    context: Float[Array, "B L W"],
    context_mask: Bool[Array, "B L"] | None,
) -> tuple[
    Float[Array, "B T c"],
    Int[Array, "#B T axes"],
    Bool[Array, "B S"] | None,
    CachedReferences | None,
]:
    """Puts reference tokens behind the target's in the image stream, whose `positions` are given.

    Returns the stream's tokens and positions; which keys count, of context, image stream and cached
    references (None: all); and the cached references, whose tokens stay out of the stream.
    """
    batch, length = target.shape[:2]
    tokens, mask, cached_kv = target, None, None
    if isinstance(references, CachedReferences):
        cached_kv = references
    elif references is not None:
        tokens = jnp.concatenate([target, references.tokens.astype(target.dtype)], axis=1)
        positions = jnp.broadcast_to(positions, (batch, length, positions.shape[-1]))
        positions = jnp.concatenate([positions, references.positions], axis=1)
    if references is not None:
        mask = jnp.concatenate([jnp.ones((batch, length), bool), references.mask], axis=1)
    keys = length if mask is None else mask.shape[1]
    return (
        tokens,
        positions,
        join_masks(context_mask, mask, (batch, context.shape[1], keys)),
        cached_kv,
    )


def join_masks(
    context: Bool[Array, "B L"] | None,
    image: Bool[Array, "B T"] | None,
    sizes: tuple[int, int, int],
) -> Bool[Array, "B S"] | None:
    """One mask of the joint sequence, None where all tokens count; `sizes` are (batch, context,
    image tokens).
    """
    if context is None and image is None:
        return None
    batch, *lengths = sizes
    masks = [
        jnp.ones((batch, length), bool) if mask is None else jnp.asarray(mask)
        for mask, length in zip((context, image), lengths)
    ]
    return jnp.concatenate(masks, axis=1)


def split_heads(
    parts: Sequence[Float[Array, "B T _"]], heads: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The channels of q, k and v, [B, T, C] each, as heads [B, T, H, D]; C is H times D."""
    q, k, v = (
        # No -1: a context may have length 0.
        heads_first(part.reshape(*part.shape[:2], heads, part.shape[-1] // heads))
        for part in parts
    )
    return q, k, v


def joint_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rope: Rotation,
    mask: Bool[Array, "B keys"] | None,
    cached_kv: KeysValues | None,
) -> tuple[Float[Array, "B T C"], KeysValues]:
    """Attends over the joint sequence (q, k, v [B, T, H, D]) and the cached keys, with rotary
    positions.

    Returns the output with heads merged, and the keys and values of the joint sequence.
    """
    q, k, v = (constrain(x, "heads") for x in (rotate(q, rope), rotate(k, rope), v))
    kv = k, v
    # The cached keys follow; one row of them may serve several images of a prompt.
    if cached_kv is not None:
        k, v = (
            jnp.concatenate(
                [own, jnp.repeat(cached, q.shape[0] // cached.shape[0], axis=0)], axis=1
            )
            for own, cached in zip(kv, cached_kv)
        )
    mixed = attention(q, k, v, mask=mask, name=ATTENTION)
    return mixed.reshape(*mixed.shape[:2], -1), kv
