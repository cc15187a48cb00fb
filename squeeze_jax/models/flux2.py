"""FLUX.2's diffusion transformer ([klein] 4B by default) as a `Backbone`.

It differs from FLUX.1's (`models/dit.py`) in four things. All double blocks share one modulation
and all single blocks another, so that a step computes them once. Rotary positions have four axes
(t, row, column, l): the target is at t = 0, references at t = 10, 20, …, and text runs along l.
Feed-forwards are SwiGLU. No linear layer has a bias. Module names are those of the published
single file. Source: diffusers 0.42.1, `Flux2Transformer2DModel`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from squeeze_jax.array_types import Array, Bool, DType, Float, Int, PyTree
from squeeze_jax.batch import References
from squeeze_jax.diffusion.flow import empirical_shift
from squeeze_jax.diffusion.latents import Grid, timed_reference_positions
from squeeze_jax.errors import InputError
from squeeze_jax.layers.linear import Linear
from squeeze_jax.layers.modulation import AdaLN, Embedder, sinusoidal
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
from squeeze_jax.models.dit_blocks import FinalLayer
from squeeze_jax.models.flux2_blocks import DoubleBlock, SingleBlock
from squeeze_jax.models.two_stacks import TwoStackBackbone
from squeeze_jax.sharding import constrain


@dataclass(frozen=True)
class Flux2Config:
    """Sizes of the transformer; the defaults are those of FLUX.2 [klein] 4B, base and distilled."""

    in_channels: int = 128
    """Channels of a packed latent token: 2 x 2 latents of 32 channels."""
    context_width: int = 7680
    """Width of a context token: the aggregator's output, in the place of Qwen3-4B's layers."""
    heads: int = 24
    head_width: int = 128
    num_double_blocks: int = 5
    num_single_blocks: int = 20
    mlp_ratio: float = 3.0
    """Width of a feed-forward layer over the transformer's."""
    rope_axes: tuple[int, int, int, int] = (32, 32, 32, 32)
    """Channels of a head that turn with (t, row, column, l)."""
    rope_theta: float = 2000.0
    guidance: bool = False
    """Whether the model takes a distilled guidance value (dev: yes, klein: no)."""
    reference_attention: ReferenceAttention = "joint"
    """`joint`: every token sees every token. `cached`: reference tokens see each other alone and
    are modulated at t = 0, so that their keys and values are the same in every step of sampling
    (as in diffusers' `Flux2KleinKVPipeline`). Chosen before training."""

    @property
    def width(self) -> int:
        return self.heads * self.head_width

    def reference_positions(self, target_grid: Grid, reference_grids: Sequence[Grid]) -> np.ndarray:
        """(t, row, column) of every reference token, whatever the target's grid: int32 [R, 3]."""
        return timed_reference_positions(reference_grids)

    def schedule_shift(self, target_tokens: int, steps: int) -> float:
        """μ of FLUX.2's schedule."""
        return empirical_shift(target_tokens, steps)

    @property
    def mlp_width(self) -> int:
        """Width of a feed-forward layer."""
        return int(self.width * self.mlp_ratio)

    def __post_init__(self) -> None:
        sizes = (
            "in_channels",
            "context_width",
            "heads",
            "head_width",
            "num_double_blocks",
            "num_single_blocks",
            "mlp_width",
        )
        for name in sizes:
            if getattr(self, name) < 1:
                raise InputError(f"FLUX.2's {name} is {getattr(self, name)}; it must be at least 1")
        if len(self.rope_axes) != 4 or sum(self.rope_axes) != self.head_width:
            raise InputError(
                f"FLUX.2's rope_axes are {self.rope_axes}; "
                f"give four that sum to head_width, {self.head_width}"
            )
        if any(axis % 2 for axis in self.rope_axes):
            raise InputError(
                f"FLUX.2's rope_axes {self.rope_axes} must be even: channels turn in pairs"
            )
        if self.reference_attention not in ("joint", "cached"):
            raise InputError(
                f"FLUX.2's reference_attention is {self.reference_attention!r}; "
                "choose joint or cached"
            )


class Flux2(TwoStackBackbone):
    """Predicts the velocity ε − x_0 of the target tokens."""

    def __init__(
        self,
        config: Flux2Config,
        *,
        dtype: DType = jnp.float32,
        param_dtype: DType = jnp.float32,
        remat: Remat = "none",
        unroll: int | bool = 1,
        rngs: nnx.Rngs,
    ) -> None:
        width = config.width
        kinds: Any = {"dtype": dtype, "param_dtype": param_dtype}
        of_time: Any = {"use_bias": False, "param_dtype": param_dtype, "rngs": rngs}
        self.config: Flux2Config = config  # pyright: ignore[reportIncompatibleVariableOverride]
        self.dtype, self.unroll = jnp.dtype(dtype), unroll
        self.remat: Remat = remat
        self.img_in = Linear(config.in_channels, width, use_bias=False, **kinds, rngs=rngs)
        self.txt_in = Linear(config.context_width, width, use_bias=False, **kinds, rngs=rngs)
        self.time_in = Embedder(256, width, **of_time)
        self.guidance_in = Embedder(256, width, **of_time) if config.guidance else None
        self.double_stream_modulation_img = AdaLN(width, 6, **of_time)
        self.double_stream_modulation_txt = AdaLN(width, 6, **of_time)
        self.single_stream_modulation = AdaLN(width, 3, **of_time)
        sizes = width, config.heads, config.mlp_width
        self.double_blocks = stack_blocks(
            lambda r: DoubleBlock(*sizes, **kinds, rngs=r), config.num_double_blocks, rngs
        )
        self.single_blocks = stack_blocks(
            lambda r: SingleBlock(*sizes, **kinds, rngs=r), config.num_single_blocks, rngs
        )
        self.final_layer = FinalLayer(width, config.in_channels, use_bias=False, **kinds, rngs=rngs)

    def embed_timestep(
        self, t: Float[Array, " B"], guidance: Float[Array, " B"] | None = None
    ) -> Float[Array, "B C"]:
        """Sums the embeddings of time and guidance in float32: the input of every modulation.

        Raises ValueError where the model takes a guidance value and none is given, or vice versa.
        """
        self.check_guidance(guidance)
        temb = self.time_in(sinusoidal(t))
        return temb if self.guidance_in is None else temb + self.guidance_in(sinusoidal(guidance))

    def make_modulation(self, temb: Float[Array, "T C"]) -> Modulation:
        """The modulation of all blocks: arrays [1, T, 1, C], of depth 1 since blocks share them."""
        double = self.double_stream_modulation_img(temb), self.double_stream_modulation_txt(temb)
        double, single = jax.tree.map(
            lambda x: x[None], (double, self.single_stream_modulation(temb))
        )
        return Modulation(double, single, self.final_layer.adaLN_modulation(temb))

    def cache_references(
        self, references: References, temb: Float[Array, "B C"]
    ) -> CachedReferences:
        """Keys and values of reference tokens, which see each other alone; `temb` is of t = 0."""
        rope = self._rope(references.positions, 0)
        inputs = BlockInputs(self.make_modulation(temb), rope, references.mask, None)
        img = constrain(self.img_in(references.tokens), "tokens")
        (_, img), double = self.run_stack("double", (img[:, :0], img), inputs, return_kv=True)
        _, single = self.run_stack("single", img, inputs, return_kv=True)
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
        """Projects context and image tokens to the transformer's width; collects blocks' inputs.

        References follow the target in the image stream. `BlockInputs.temb` is a `Modulation`.
        """
        positions = target_positions(target_grid, target.shape[1])
        positions = jnp.pad(positions, ((0, 0), (0, 0), (1, 0)))  # t = 0
        tokens, positions, mask, cached_kv = append_references(
            target, positions, references, context, context_mask
        )
        modulation = temb if isinstance(temb, Modulation) else self.make_modulation(temb)
        inputs = BlockInputs(modulation, self._rope(positions, context.shape[1]), mask, cached_kv)
        streams = self.txt_in(context), self.img_in(tokens)
        return (constrain(streams[0], "tokens"), constrain(streams[1], "tokens")), inputs

    def predict_velocity(
        self, hidden: Float[Array, "B N C"], inputs: BlockInputs
    ) -> Float[Array, "B N c"]:
        """Applies the final layer to the target's hidden states."""
        assert isinstance(inputs.temb, Modulation)
        return self.final_layer(hidden, inputs.temb.final)

    def run_stack(
        self,
        stack: Literal["double", "single"],
        hidden: PyTree,
        inputs: BlockInputs,
        block_range: range | None = None,
        *,
        return_kv: bool = False,
    ) -> tuple[PyTree, PyTree]:
        """Runs blocks of a stack (None: all) on its streams.

        Returns the streams and, where `return_kv` says so, every block's keys and values.
        """
        blocks = self.double_blocks if stack == "double" else self.single_blocks
        modulation, rope, mask, cached_kv = inputs
        modulated = jax.tree.map(lambda x: x[0], getattr(modulation, stack))

        def apply(
            block: DoubleBlock | SingleBlock, hidden: PyTree, cached: KeysValues | None
        ) -> tuple[PyTree, PyTree]:
            hidden, kv = block(hidden, modulated, rope, mask, cached)
            return hidden, kv if return_kv else None

        return scan_blocks(
            blocks, apply, hidden, cached_kv and getattr(cached_kv, stack),
            remat=self.remat, unroll=self.unroll, block_range=block_range,
        )  # fmt: skip

    def _rope(self, image: Int[Array, "#B T 3"], context_length: int) -> Rotation:
        """Angles of the joint sequence: context token i at (0, 0, 0, i), the others at l = 0."""
        image = jnp.pad(image, ((0, 0), (0, 0), (0, 1)))
        context = jnp.pad(jnp.arange(context_length)[None, :, None], ((0, 0), (0, 0), (3, 0)))
        context = jnp.broadcast_to(context, (image.shape[0], context_length, 4))
        positions = jnp.concatenate([context, image], axis=1)
        return rotation(positions, self.config.rope_axes, self.config.rope_theta)
