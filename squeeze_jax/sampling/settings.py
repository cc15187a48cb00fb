"""How to sample: what a caller asks for, and the same with every value known."""

import dataclasses
from dataclasses import dataclass
from typing import cast

from squeeze_jax.config import Config
from squeeze_jax.data.images import parse_size
from squeeze_jax.diffusion.stages import carry_tau, check_thresholds
from squeeze_jax.errors import InputError
from squeeze_jax.sampling.schedule import MAX_STEPS, STAGE_NAMES, Schedule, make_schedule
from squeeze_jax.sampling.solver_config import DEFAULT_SOLVER, SolverConfig
from squeeze_jax.sampling.solver_names import SolverName


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
    """Of each prompt; image i is what `seed + i` alone gives, to one grey level."""
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

    def make_schedule(self, config: Config, references: bool) -> Schedule:
        """Makes the run's schedule. `references` says whether reference tokens take part."""
        rows, columns = config.grid(self.height, self.width)
        return make_schedule(
            self.steps,
            rows * columns,
            self.tau1,
            self.tau2,
            references=references,
            shift=config.schedule_shift,
        )

    def empty_stages(self, config: Config, references: bool) -> list[str]:
        """Returns a sentence for each stage that tau1 and tau2 leave room for without any step.

        That happens on few steps, whose times lie far apart. `references` as in `make_schedule`.
        """
        taken = self.make_schedule(config, references).stage_names(self.steps)
        _, both, vae = STAGE_NAMES
        spans = {both: (self.tau2, self.tau1), vae: (0.0, self.tau2)} if references else {}
        return [
            f"no step has {name}: none of {self.steps} begins at {start:g} ≤ t < {end:g}; "
            "take more steps or move tau1 and tau2"
            for name, (start, end) in spans.items()
            if start < min(end, 1.0) and name not in taken
        ]

    @property
    def solver_config(self) -> SolverConfig:
        """The solver and cache policy. Raises InputError for what does not go together."""
        asked = SolverConfig(
            cast(SolverName, self.solver),
            self.cache_interval,
            self.max_order,
            self.first_block_threshold,
        )
        # Where every step is evaluated, nothing is extrapolated: one program, whatever the order.
        return (
            asked
            if asked.cache_interval > 1
            else dataclasses.replace(asked, max_order=DEFAULT_SOLVER.max_order)
        )

    @property
    def seeds(self) -> list[int]:
        """Of each of a prompt's images, from 0 to 2³² − 1."""
        return [(self.seed + i) % 2**32 for i in range(self.num_images)]

    @property
    def scales(self) -> tuple[float, ...]:
        """Guidance of each of the three stages."""
        return self.cfg_scale if isinstance(self.cfg_scale, tuple) else (self.cfg_scale,) * 3


def resolve(settings: Settings, config: Config, int8: bool = False) -> Resolved:
    """Fills in the config's values; its own thresholds move with the size (`sampling.tau_tokens`).

    Raises InputError for an impossible size or number.
    """
    own, data = config.sampling, config.data
    height = data.height if settings.height is None else settings.height
    width = data.width if settings.width is None else settings.width
    parse_size(f"{height}x{width}")  # refuses what is no multiple of 16
    if settings.num_images < 1:
        raise InputError(f"num_images is {settings.num_images}; it must be at least 1")
    steps = own.steps if settings.steps is None else settings.steps
    if not 1 <= steps <= MAX_STEPS:
        raise InputError(f"steps is {steps}; it must be from 1 to {MAX_STEPS}")
    rows, columns = config.grid(height, width)

    def threshold(given: float | None, default: float) -> float:
        if given is not None:
            return given
        return carry_tau(default, own.tau_tokens, rows * columns) if own.tau_tokens else default

    resolved = Resolved(
        height=height,
        width=width,
        steps=steps,
        tau1=threshold(settings.tau1, own.tau1),
        tau2=threshold(settings.tau2, own.tau2),
        cfg_scale=own.cfg_scale if settings.cfg_scale is None else settings.cfg_scale,
        seed=settings.seed,
        num_images=settings.num_images,
        solver=settings.solver,
        cache_interval=settings.cache_interval,
        max_order=settings.max_order,
        first_block_threshold=settings.first_block_threshold,
        int8=int8,
    )
    check_thresholds(resolved.tau1, resolved.tau2)
    _ = resolved.solver_config  # refuses what does not go together
    return resolved
