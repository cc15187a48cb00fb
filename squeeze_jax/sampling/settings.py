"""How to sample: what a caller asks for, and the same with every value known."""

import dataclasses
from dataclasses import dataclass
from typing import cast

from squeeze_jax.sampling.solver_config import DEFAULT_SOLVER, SolverConfig
from squeeze_jax.sampling.solvers import SolverName


@dataclass(frozen=True)
class Settings:
    """How to sample; None takes the checkpoint's own value."""

    height: int | None = None
    width: int | None = None
    """Pixels, multiples of 16."""
    steps: int | None = None
    tau1: float | None = None
    tau2: float | None = None
    """Thresholds for this very size, 0 ≤ tau2 ≤ tau1 ≤ 1.1 (`diffusion.stages.plan_stages`):
    `tau_tokens` of the config does not move them."""
    cfg_scale: float | tuple[float, float, float] | None = None
    """One scale, or one a stage; a stage at 1 leaves the unconditional branch out."""
    seed: int = 0
    num_images: int = 1
    """Of each prompt; image i is what `seed + i` alone gives."""
    solver: SolverName = "euler"
    cache_interval: int = 1
    max_order: int = 1
    first_block_threshold: float = 0.0
    """Solver and caches, which change the image: see `sampling.solver_config`."""


@dataclass(frozen=True)
class Resolved:
    """`Settings` with every value known."""

    height: int
    width: int
    steps: int
    tau1: float
    tau2: float
    cfg_scale: float | tuple[float, float, float]
    seed: int
    num_images: int
    solver: str = "euler"
    cache_interval: int = 1
    max_order: int = 1
    first_block_threshold: float = 0.0
    int8: bool = False
    """The pipeline's own."""

    @property
    def solver_config(self) -> SolverConfig:
        """The solver and cache policy. Raises InputError for what does not go together."""
        asked = SolverConfig(
            cast(SolverName, self.solver), self.cache_interval, self.max_order, self.first_block_threshold
        )
        # Where every step is evaluated, nothing is extrapolated: one program, whatever the order.
        return asked if asked.cache_interval > 1 else dataclasses.replace(asked, max_order=DEFAULT_SOLVER.max_order)

    @property
    def seeds(self) -> list[int]:
        """Of each of a prompt's images, from 0 to 2³² − 1."""
        return [(self.seed + i) % 2**32 for i in range(self.num_images)]

    @property
    def scales(self) -> tuple[float, ...]:
        """Guidance of each of the three stages."""
        return self.cfg_scale if isinstance(self.cfg_scale, tuple) else (self.cfg_scale,) * 3
