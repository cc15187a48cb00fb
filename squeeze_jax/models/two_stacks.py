"""What FLUX.1's and FLUX.2's transformers share: two stacks of blocks, run one after the other."""

from typing import Literal, Protocol, runtime_checkable

import jax.numpy as jnp

from squeeze_jax.array_types import Array, Float, PyTree
from squeeze_jax.models.backbone import Backbone, BackboneConfig, BlockInputs, Streams


@runtime_checkable
class TwoStackConfig(BackboneConfig, Protocol):
    """A config that says how many blocks there are of each kind."""

    @property
    def num_double_blocks(self) -> int:
        """Blocks with weights of their own for context and image."""
        ...

    @property
    def num_single_blocks(self) -> int:
        """Blocks with one set of weights for the joint sequence."""
        ...


class TwoStackBackbone(Backbone):
    """Blocks with a context and an image stream, then blocks on the joint stream."""

    config: TwoStackConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def apply_blocks(
        self, streams: Streams, inputs: BlockInputs, start: int = 0, stop: int | None = None
    ) -> Streams:
        """Runs the blocks `start` to `stop` - 1 (None: to the last): double blocks first, then
        single blocks.
        """
        double, single = self.config.num_double_blocks, self.config.num_single_blocks
        stop = double + single if stop is None else stop

        def within(first: int, last: int, count: int) -> range | None:
            return None if (first, last) == (0, count) else range(first, last)

        if start < double:
            blocks = within(start, min(stop, double), double)
            streams, _ = self.run_stack("double", streams, inputs, blocks)
        if stop > double:
            length = streams[0].shape[1]
            blocks = within(max(start - double, 0), stop - double, single)
            x, _ = self.run_stack("single", jnp.concatenate(streams, axis=1), inputs, blocks)
            streams = x[:, :length], x[:, length:]
        return streams

    def run_stack(
        self,
        stack: Literal["double", "single"],
        hidden: PyTree,
        inputs: BlockInputs,
        block_range: range | None = None,
        *,
        return_kv: bool = False,
    ) -> tuple[PyTree, PyTree]:
        """Runs blocks of a stack (None: all), on both streams or on the joint one [B, T, C].

        Returns the hidden states and, where `return_kv` says so, every block's keys and values.
        """
        raise NotImplementedError

    def check_guidance(self, guidance: Float[Array, " B"] | None) -> None:
        """Raises ValueError unless a guidance value is given exactly where the model takes one."""
        if (guidance is None) == self.config.guidance:
            raise ValueError(
                "this transformer takes a guidance value: pass guidance=[B]"
                if self.config.guidance
                else "this transformer takes no guidance value: leave guidance out"
            )
