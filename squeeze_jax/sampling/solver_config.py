"""The choice of solver and cache policy that a sampler is compiled for."""

from dataclasses import dataclass

from squeeze_jax.errors import InputError
from squeeze_jax.sampling.caching import CachePolicy, FirstBlockCache, NoCache, TaylorSeer
from squeeze_jax.sampling.solver_names import SolverName
from squeeze_jax.sampling.solvers import SOLVERS


@dataclass(frozen=True)
class SolverConfig:
    """Which solver and cache a compiled sampler uses; by default Euler's steps, all evaluated."""

    solver: SolverName = "euler"
    """`multistep`: Adams-Bashforth of order 2, anew in each stage."""
    cache_interval: int = 1
    """TaylorSeer: of so many steps in a row, one is evaluated; 1 evaluates all."""
    max_order: int = 1
    """Order of TaylorSeer's expansion, 0 to 2, in steps since the last evaluation."""
    first_block_threshold: float = 0.0
    """Threshold of the first-block cache (diffusers' default is 0.05); 0 is off."""

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise InputError(f"solver is {self.solver!r}; choose one of {', '.join(SOLVERS)}")
        if self.cache_interval < 1 or self.max_order not in (0, 1, 2):
            raise InputError(
                f"cache_interval {self.cache_interval} must be at least 1, "
                f"max_order {self.max_order} must be 0, 1 or 2"
            )
        if self.first_block_threshold < 0:
            raise InputError(
                f"first_block_threshold is {self.first_block_threshold}; "
                "it must be at least 0 (0 is off)"
            )
        if self.first_block_threshold and self.cache_interval > 1:
            raise InputError(
                "first_block_threshold and cache_interval are two caches; choose one of them"
            )

    @property
    def cache(self) -> CachePolicy:
        """The cache policy that these settings ask for."""
        if self.first_block_threshold:
            return FirstBlockCache(self.first_block_threshold)
        return (
            TaylorSeer(self.cache_interval, self.max_order)
            if self.cache_interval > 1
            else NoCache()
        )


DEFAULT_SOLVER = SolverConfig()
