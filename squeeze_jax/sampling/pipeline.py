"""Prompt and reference pictures in, pictures out: load once, sample many."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image

from squeeze_jax.batch import HiddenStates, References
from squeeze_jax.config import Config
from squeeze_jax.data.encoders import FrozenEncoders
from squeeze_jax.data.images import parse_size, resize_for_reference
from squeeze_jax.diffusion.latents import latent_grid, pack, reference_positions, unpack
from squeeze_jax.errors import InputError
from squeeze_jax.interop.load import DEMO
from squeeze_jax.interop.trained import load_trained
from squeeze_jax.models.system import System
from squeeze_jax.processes import place, whole
from squeeze_jax.sampling.sampler import make_sampler, make_schedule, noise_for
from squeeze_jax.sharding import batch_sharding

REFERENCE_BUCKET = 16
"""Reference tokens are padded to a multiple of this, so that similar sizes share a program."""


@dataclass(frozen=True)
class Settings:
    """How to sample; None takes the checkpoint's own value."""

    height: int | None = None
    width: int | None = None
    """Pixels, multiples of 16."""
    steps: int | None = None
    tau1: float | None = None
    tau2: float | None = None
    cfg_scale: float | None = None
    seed: int = 0
    num_images: int = 1
    """Image i is what `seed + i` alone gives."""


@dataclass(frozen=True)
class Resolved:
    """`Settings` with every value known."""

    height: int
    width: int
    steps: int
    tau1: float
    tau2: float
    cfg_scale: float
    seed: int
    num_images: int


@dataclass
class Pipeline:
    """A trained system with its encoders. Programs are compiled at first use and kept."""

    config: Config
    encoders: FrozenEncoders
    graph: Any
    leaves: tuple[Any, ...]
    step: int | None = None
    _programs: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, checkpoint: str | Path | None = None) -> "Pipeline":
        """From a work, weights or exported folder; None is the shipped miniature."""
        trained = load_trained(DEMO / "system" if checkpoint is None else Path(checkpoint))
        return cls.of(trained.system, trained.config, step=trained.step)

    @classmethod
    def of(cls, system: System, config: Config, encoders: FrozenEncoders | None = None, step: int | None = None):
        """Around a system in memory."""
        if encoders is None:
            encoders = FrozenEncoders.of(config)
        graph, state = nnx.split(system)
        return cls(config, encoders, graph, (state,), step)

    @property
    def uses_references(self) -> bool:
        """Whether reference tokens took part in training."""
        return any(stage.references for stage in self.config.training.stages)

    def resolved(self, settings: Settings) -> Resolved:
        """The settings with the config's values filled in. Raises InputError for an impossible size or number."""
        own, data = self.config.sampling, self.config.data
        height = data.height if settings.height is None else settings.height
        width = data.width if settings.width is None else settings.width
        parse_size(f"{height}x{width}")  # refuses what is no multiple of 16
        if settings.num_images < 1:
            raise InputError(f"num_images is {settings.num_images}; it must be at least 1")
        return Resolved(
            height=height,
            width=width,
            steps=own.steps if settings.steps is None else settings.steps,
            tau1=own.tau1 if settings.tau1 is None else settings.tau1,
            tau2=own.tau2 if settings.tau2 is None else settings.tau2,
            cfg_scale=own.cfg_scale if settings.cfg_scale is None else settings.cfg_scale,
            seed=settings.seed,
            num_images=settings.num_images,
        )

    def __call__(
        self, prompt: str, references: Sequence[Image.Image] = (), settings: Settings = Settings()
    ) -> np.ndarray:
        """Pictures [num_images, height, width, 3] in [−1, 1] of the references' subjects doing what the prompt says.

        Without references the MLLM's condition stays on throughout. Raises InputError for an empty or too long prompt,
        sizes that are no multiples of 16, and impossible steps or τ.
        """
        resolved = self.resolved(settings)
        seeds = [resolved.seed + i for i in range(resolved.num_images)]
        states = self.encoders.read([prompt], [list(references)])
        latents = [
            self.encoders.latents([resize_for_reference(image, self.config.data.reference_long_side)])[0]
            for image in references
        ]
        return self.decode(self.sample(states, [latents], seeds, settings), settings)

    def sample(
        self,
        states: HiddenStates,
        latents: Sequence[Sequence[np.ndarray]],
        seeds: Sequence[int],
        settings: Settings = Settings(),
    ) -> jax.Array:
        """Latent tokens [len(seeds), N, c] from hidden states and reference latents of one prompt, or one each a seed."""
        resolved = self.resolved(settings)
        grid = self.config.grid(resolved.height, resolved.width)
        references = reference_tokens(latents, grid)
        # A system trained on the MLLM alone has never seen reference tokens (AMENDMENTS): it samples without them.
        if not self.uses_references:
            references = None
        schedule = make_schedule(
            resolved.steps, grid[0] * grid[1], resolved.tau1, resolved.tau2,
            references=references is not None, shifted=self.config.sampling.shifted,
        )  # fmt: skip
        guided, mesh = resolved.cfg_scale != 1.0, mesh_of(self.leaves)
        program = self._programs.get((grid, guided))
        if program is None:
            guidance = self.config.diffusion.guidance
            program = make_sampler(self.graph, target_grid=grid, guided=guided, guidance=guidance, mesh=mesh)
            self._programs[grid, guided] = program
        noise = noise_for(list(seeds), grid[0] * grid[1], self.config.model.dit.in_channels)
        inputs = beside(mesh, (noise, states, references))
        return program(self.leaves, *inputs, schedule, jnp.float32(resolved.cfg_scale))

    def decode(self, tokens: jax.Array, settings: Settings = Settings()) -> np.ndarray:
        """Pictures [B, height, width, 3] in [−1, 1] of latent tokens."""
        resolved = self.resolved(settings)
        latents = unpack(whole(tokens), self.config.grid(resolved.height, resolved.width))
        return np.clip(self.encoders.decode(latents), -1.0, 1.0)


def mesh_of(leaves: Any) -> Mesh | None:
    """The mesh that the weights lie on; None on a single device."""
    where = getattr(jax.tree.leaves(leaves)[0], "sharding", None)
    mesh = where.mesh if isinstance(where, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) and mesh.size > 1 else None


def beside(mesh: Mesh | None, inputs: Any) -> Any:
    """Inputs on the mesh: rows split over it where they divide evenly, else everywhere."""
    if mesh is None:
        return inputs
    rows, everywhere = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())

    def where(x: jax.Array | np.ndarray) -> NamedSharding:
        return rows if x.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0 else everywhere

    return place(inputs, jax.tree.map(where, inputs))


def reference_tokens(latents: Sequence[Sequence[np.ndarray]], target_grid: tuple[int, int]) -> References | None:
    """Each sample's reference latents [h, w, c] as one padded, masked row of tokens; None where no sample has any."""
    counts = [sum(latent.shape[0] * latent.shape[1] // 4 for latent in row) for row in latents]
    if not max(counts, default=0):
        return None
    length = -(-max(counts) // REFERENCE_BUCKET) * REFERENCE_BUCKET
    channels = 4 * next(latent for row in latents for latent in row).shape[-1]
    tokens = np.zeros((len(latents), length, channels), np.float32)
    positions = np.zeros((len(latents), length, 2), np.int32)
    for i, row in enumerate(latents):
        if row:
            tokens[i, : counts[i]] = np.concatenate([pack(latent) for latent in row])
            positions[i, : counts[i]] = reference_positions(target_grid, [latent_grid(latent) for latent in row])
    return References(tokens, np.arange(length)[None] < np.array(counts)[:, None], positions)
