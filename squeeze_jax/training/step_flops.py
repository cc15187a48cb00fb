"""How much a step computes, by the shape of its batch."""

from collections.abc import Callable

import jax

from squeeze_jax.config import StageConfig
from squeeze_jax.training.step import Batch

WorkFunction = Callable[[StageConfig, Batch], tuple[float, float | None]]
"""Model FLOPs of a step on a batch, and the peak FLOP/s of all devices (None where unknown).
Commands pass it in."""

Shape = tuple[tuple[int, ...], ...]


class StepFlops:
    """Model FLOPs of a stage's step, counted once for every shape of batch that has come."""

    def __init__(self, work: WorkFunction | None, stage: StageConfig) -> None:
        self._work, self._stage = work, stage
        self._flops: dict[Shape, float] = {}

    def __len__(self) -> int:
        """Shapes counted so far."""
        return len(self._flops)

    def get(self, batch: Batch) -> float | None:
        """A batch's FLOPs, 0 where nothing can count them; None where its shape is new."""
        return self._flops.get(_shape(batch))

    def count(self, batch: Batch) -> float | None:
        """Counts a new shape's FLOPs; returns the peak FLOP/s of all devices."""
        flops, peak = (0.0, None) if self._work is None else self._work(self._stage, batch)
        self._flops[_shape(batch)] = flops
        return peak


def _shape(batch: Batch) -> Shape:
    return tuple(leaf.shape for leaf in jax.tree.leaves(batch))
