"""FLUX.1's diffusion transformer with a context stream, target tokens and reference tokens.

The context (aggregated MLLM tokens) and the image stream (target tokens, then reference tokens)
meet in the attention of double-stream blocks, and go as one sequence through single-stream blocks
(`dit_blocks.py`). The forward pass is `Backbone.velocity` (`backbone.py`): it calls `embed_inputs`,
`apply_blocks` and `predict_velocity` below. Module names are FLUX.1's own. Source: the published
FLUX.1 architecture; references follow UNO (arXiv 2504.02160).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from squeeze_jax.array_types import Array, Bool, DType, Float, Int, PyTree
from squeeze_jax.batch import References
from squeeze_jax.diffusion.flow import schedule_shift
from squeeze_jax.diffusion.latents import Grid, reference_positions
from squeeze_jax.errors import InputError
from squeeze_jax.layers.linear import Linear
from squeeze_jax.layers.modulation import Embedder, sinusoidal
from squeeze_jax.layers.rope import Rotation, rotation
from squeeze_jax.layers.stack import Remat, scan_blocks, stack_blocks
from squeeze_jax.models.backbone import (
    BlockInputs,
    CachedReferences,
    KeysValues,
    Modulation,
    ReferenceAttention,
    Streams,
    append_references,
    target_positions,
)
from squeeze_jax.models.dit_blocks import DoubleBlock, FinalLayer, SingleBlock
from squeeze_jax.models.two_stacks import TwoStackBackbone
from squeeze_jax.sharding import constrain

Hidden = TypeVar("Hidden")
"""Hidden states between blocks: `Streams` of double blocks, the joint stream of single blocks."""


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of the transformer; the defaults are FLUX.1-dev's."""

    in_channels: int = 64
    """Channels of a packed latent token: 2 x 2 latents of 16 channels."""
    context_width: int = 4096
    """Width of a context token (the aggregator's output takes the place of the T5 features)."""
    pooled_width: int = 768
    """Width of the pooled text vector; this system feeds zeros (docs/decisions.md, "Entry to the
    backbone")."""
    heads: int = 24
    head_width: int = 128
    num_double_blocks: int = 19
    num_single_blocks: int = 38
    mlp_ratio: int = 4
    rope_axes: tuple[int, int, int] = (16, 56, 56)
    """Channels of a head that each position axis rotates: (0, row, column)."""
    guidance: bool = True
    """Whether the model takes the distilled guidance value (dev: yes, schnell: no)."""
    reference_attention: ReferenceAttention = "joint"
    """`joint`: every token sees every token (UNO). `cached`: reference tokens see reference
    tokens alone and are modulated at t = 0, so that their keys and values are the same in every
    sampling step. A model is trained for one of the two (our decision)."""

    @property
    def width(self) -> int:
        return self.heads * self.head_width

    def reference_positions(self, target_grid: Grid, reference_grids: Sequence[Grid]) -> np.ndarray:
        """Row and column of every reference token, past the target's: int32 [R, 2]."""
        return reference_positions(target_grid, reference_grids)

    def schedule_shift(self, target_tokens: int, steps: int) -> float:
        """μ of FLUX.1-dev's schedule, whatever the number of steps."""
        return schedule_shift(target_tokens)

    def __post_init__(self) -> None:
        if sum(self.rope_axes) != self.head_width:
            raise ValueError(
                f"dit.rope_axes {self.rope_axes} must sum to dit.head_width {self.head_width}"
            )
        if any(axis % 2 for axis in self.rope_axes):
            raise ValueError(f"dit.rope_axes {self.rope_axes} must be even: channels turn in pairs")
        if self.reference_attention not in ("joint", "cached"):
            raise InputError(
                f"model.dit.reference_attention is {self.reference_attention!r}; "
                "choose joint or cached"
            )


BLOCK_STACKS = ("double_blocks", "single_blocks")
"""The transformer's stacks of blocks, by their names in it."""


class DiT(TwoStackBackbone):
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
        self.config: DiTConfig = config  # pyright: ignore[reportIncompatibleVariableOverride]
        self.dtype, self.unroll = jnp.dtype(dtype), unroll
        self.remat: Remat = remat
        self.img_in = Linear(config.in_channels, width, **kinds, rngs=rngs)
        self.txt_in = Linear(config.context_width, width, **kinds, rngs=rngs)
        self.time_in = Embedder(256, width, param_dtype=param_dtype, rngs=rngs)
        self.vector_in = Embedder(config.pooled_width, width, param_dtype=param_dtype, rngs=rngs)
        self.guidance_in = (
            Embedder(256, width, param_dtype=param_dtype, rngs=rngs) if config.guidance else None
        )
        sizes = width, config.heads, config.mlp_ratio * width
        self.double_blocks = stack_blocks(
            lambda r: DoubleBlock(*sizes, **kinds, rngs=r), config.num_double_blocks, rngs
        )
        self.single_blocks = stack_blocks(
            lambda r: SingleBlock(*sizes, **kinds, rngs=r), config.num_single_blocks, rngs
        )
        self.final_layer = FinalLayer(width, config.in_channels, **kinds, rngs=rngs)

    def embed_timestep(
        self,
        t: Float[Array, " B"],
        guidance: Float[Array, " B"] | None = None,
        pooled: Float[Array, "B P"] | None = None,
    ) -> Float[Array, "B C"]:
        """The conditioning vector, which every block's modulation reads: embedded time, guidance
        and pooled vector, summed in float32.
        """
        self.check_guidance(guidance)
        temb = self.time_in(sinusoidal(t))
        if self.guidance_in is not None:
            temb = temb + self.guidance_in(sinusoidal(guidance))
        if pooled is None:
            pooled = jnp.zeros((t.shape[0], self.config.pooled_width), jnp.float32)
        return temb + self.vector_in(pooled)

    def make_modulation(self, temb: Float[Array, "T C"]) -> Modulation:
        """Computes the modulation of every block, for samplers, which know their times
        beforehand.
        """
        _, double = scan_blocks(
            self.double_blocks, lambda block, carry, _: (carry, block.modulation(temb)), None
        )
        _, single = scan_blocks(
            self.single_blocks, lambda block, carry, _: (carry, block.modulation(temb)), None
        )
        return Modulation(double, single, self.final_layer.adaLN_modulation(temb))

    def cache_references(
        self, references: References, temb: Float[Array, "B C"]
    ) -> CachedReferences:
        """Computes keys and values of reference tokens, which attend to reference tokens alone.
        `temb` is that of t = 0.
        """
        inputs = BlockInputs(temb, self._rope(references.positions, 0), references.mask, None)
        img = constrain(self.img_in(references.tokens), "tokens")
        (_, img), double = self.run_stack("double", (img[:, :0], img), inputs, return_kv=True)
        _, single = self.run_stack("single", img, inputs, return_kv=True)
        assert double is not None and single is not None
        return CachedReferences(double, single, references.mask)

    def embed_inputs(
        self,
        target: Float[Array, "B N c"],
        target_grid: tuple[int, int] | Int[Array, "B 2"],
        temb: Float[Array, "B C"] | Modulation,
        context: Float[Array, "B L W"],
        context_mask: Bool[Array, "B L"] | None = None,
        references: References | CachedReferences | None = None,
    ) -> tuple[Streams, BlockInputs]:
        """Projects context and image tokens to the transformer's width; collects blocks' inputs."""
        positions = target_positions(target_grid, target.shape[1])
        tokens, positions, mask, cached_kv = append_references(
            target, positions, references, context, context_mask
        )
        inputs = BlockInputs(temb, self._rope(positions, context.shape[1]), mask, cached_kv)
        streams = self.txt_in(context), self.img_in(tokens)
        return (constrain(streams[0], "tokens"), constrain(streams[1], "tokens")), inputs

    def predict_velocity(
        self, hidden: Float[Array, "B N C"], inputs: BlockInputs
    ) -> Float[Array, "B N c"]:
        """Applies the final layer to the target's hidden states."""
        temb = inputs.temb
        final = (
            temb.final if isinstance(temb, Modulation) else self.final_layer.adaLN_modulation(temb)
        )
        return self.final_layer(hidden, final)

    def run_stack(
        self,
        stack: Literal["double", "single"],
        hidden: Hidden,
        inputs: BlockInputs,
        block_range: range | None = None,
        *,
        return_kv: bool = False,
    ) -> tuple[Hidden, KeysValues | None]:
        """Runs the blocks of a stack, all or those in `block_range`, on both streams or on the
        joint one.

        `return_kv` also returns every block's keys and values.
        """
        temb, rope, mask, cached_kv = inputs
        # Scanned over depth: precomputed modulation (if any) and cached keys and values.
        known = getattr(temb, stack) if isinstance(temb, Modulation) else None
        cached = None if cached_kv is None else getattr(cached_kv, stack)

        def apply(
            block: DoubleBlock | SingleBlock,
            hidden: Hidden,
            per_block: tuple[PyTree, KeysValues | None],
        ) -> tuple[Hidden, KeysValues | None]:
            modulation, cached = per_block
            modulation = block.modulation(temb) if modulation is None else modulation
            streams: Any = hidden if stack == "double" else (hidden,)
            run: Any = block
            hidden, kv = run(*streams, modulation, rope, mask, cached)
            return hidden, kv if return_kv else None

        blocks = self.double_blocks if stack == "double" else self.single_blocks
        return scan_blocks(
            blocks,
            apply,
            hidden,
            (known, cached),
            remat=self.remat,
            unroll=self.unroll,
            block_range=block_range,
        )

    def _rope(self, positions: Int[Array, "#B _ 2"], context_length: int) -> Rotation:
        """Angles of the joint sequence: context tokens at (0, 0, 0), image tokens at (0, row,
        column).
        """
        positions = jnp.pad(positions, ((0, 0), (context_length, 0), (1, 0)))
        return rotation(positions, self.config.rope_axes)
