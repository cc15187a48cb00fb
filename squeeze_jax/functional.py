"""The method as pure functions of plain dictionaries of arrays.

    from squeeze_jax import functional

    trained, frozen = functional.init(config, jax.random.key(0))
    loss, gradient = jax.value_and_grad(functional.loss)(trained, frozen, batch, key, config)

`trained` and `frozen` are dictionaries from a parameter's dotted path (`dit.img_in.kernel`) to its
array. `config` is a `squeeze_jax.config.Config`: it is hashable and decides the program, so it is a
static argument of `jax.jit`. Nothing here keeps state, and all of it works under `jit`, `grad`,
`vmap` (over keys, over stacked adapters), `jax.checkpoint` and `jax.export`. It is the code of the
commands, called another way; docs/decisions.md has the sources of the formulas.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from squeeze_jax.array_types import Array, Float, Int, Key
from squeeze_jax.batch import HiddenStates, References, TrainingBatch
from squeeze_jax.checkpoints.build import build_system
from squeeze_jax.checkpoints.trained import load_trained
from squeeze_jax.config import Config
from squeeze_jax.models.system import System
from squeeze_jax.sampling.sampler import denoise, initial_state, prepare
from squeeze_jax.sampling.schedule import MAX_STEPS
from squeeze_jax.sampling.settings import Settings, resolve
from squeeze_jax.training.optimizer import make_optimizer
from squeeze_jax.training.state import (
    Params,
    Split,
    TrainState,
    flatten_params,
    replace_params,
    split_system,
)
from squeeze_jax.training.state import (
    initial_state as initial_train_state,
)
from squeeze_jax.training.step import (
    Metrics,
    compute_losses,
    sample_randomness,
    step_function,
    target_shape,
)

__all__ = [
    "init", "initial_state_of", "load", "loss", "merge", "sample", "split", "train_step", "velocity",
]  # fmt: skip


@functools.cache
def split(config: Config) -> Split:
    """The structure of a config's system, without arrays; the same object for equal configs."""
    system = nnx.eval_shape(lambda: build_system(config, with_base=False))
    return split_system(system, config)[1]


def merge(trained: Params, frozen: Params, config: Config) -> System:
    """The Flax module of these arrays: for what has no function here."""
    structure = split(config)
    return structure.merge(trained, replace_params(structure.frozen, frozen))


def init(config: Config, key: Key) -> tuple[Params, Params]:
    """Random weights: (trained, frozen). A pre-trained base of the config is not read (`load`)."""
    trained, rest = split_system(build_system(config, with_base=False, rngs=nnx.Rngs(key)), config)
    return trained, flatten_params(rest.frozen)


def load(folder: str | Path) -> tuple[Config, Params, Params]:
    """The config and (trained, frozen) of a work, weights or exported folder, averaged weights
    where the run kept an average. Reads files, so it is not for `jit`.

    Raises InputError for what is no such folder.
    """
    found = load_trained(Path(folder))
    trained, rest = split_system(found.system, found.config)
    return found.config, trained, flatten_params(rest.frozen)


def velocity(
    trained: Params,
    frozen: Params,
    x_t: Float[Array, "B N c"],
    t: Float[Array, " B"],
    states: HiddenStates,
    references: References | None,
    config: Config,
    grid: tuple[int, int] | Int[Array, "B 2"] | None = None,
) -> Float[Array, "B N c"]:
    """The velocity ε − x_0 of noisy target tokens at times t in [0, 1], 1 is noise.

    states: hidden states of the MLLM; references: packed latents, None leaves them out; grid: rows
    and columns of the target's tokens, None for the config's.
    """
    system = merge(trained, frozen, config)
    grid = config.target_grid if grid is None else grid
    context = system.aggregate(states)
    return system.velocity(x_t, grid, t, context, references, config.diffusion.guidance)


def loss(
    trained: Params,
    frozen: Params,
    batch: TrainingBatch,
    key: Key,
    config: Config,
    stage: int = -1,
) -> Float[Array, ""]:
    """The mean flow-matching loss of a batch; times, noise and dropped conditions come from `key`.

    stage: which of `config.training.stages` says whether references take part, and the dropout.
    """
    about = config.training.stages[stage]
    draws = sample_randomness(key, target_shape(batch, config), config, about)
    return jnp.mean(compute_losses(merge(trained, frozen, config), batch, draws, config, about))


def initial_state_of(
    trained: Params, config: Config, optimizer: optax.GradientTransformation | None = None
) -> TrainState:
    """The state before the first step; optimizer: the config's own, or any of optax."""
    return initial_train_state(trained, optimizer or make_optimizer(config), config)


def train_step(
    state: TrainState,
    frozen: Params,
    batch: TrainingBatch,
    config: Config,
    optimizer: optax.GradientTransformation | None = None,
    stage: int = -1,
) -> tuple[TrainState, Metrics]:
    """One step of training, as `train` takes it; randomness comes from the config's seed and the
    state's step. Not compiled: `jax.jit(train_step, static_argnames=("config", …))`.
    """
    structure, about = split(config), config.training.stages[stage]
    step = step_function(structure, optimizer or make_optimizer(config), config, about)
    return step(state, replace_params(structure.frozen, frozen), batch)


def sample(
    trained: Params,
    frozen: Params,
    states: HiddenStates,
    references: References | None,
    key: Key,
    config: Config,
    settings: Settings = Settings(),
) -> Float[Array, "B N c"]:
    """Latent tokens of new pictures, one for each row of `states`, by the staged sampler.

    settings: sizes, steps, thresholds and guidance; `seed` and `num_images` play no part: noise
    comes from `key`, and more pictures of a prompt from `vmap` over keys. Raises InputError for
    impossible settings.
    """
    system, resolved = merge(trained, frozen, config), resolve(settings, config)
    schedule = resolved.make_schedule(config, references is not None)
    grid = config.grid(resolved.height, resolved.width)
    prepared = prepare(system, states, references, schedule, config.diffusion.guidance)
    shape = states.text.shape[0], grid[0] * grid[1], config.model.dit.in_channels
    begun = initial_state(
        jax.random.normal(key, shape), resolved.solver_config, config.model.dit.width
    )
    scales = jnp.asarray(resolved.scales, jnp.float32)
    return denoise(
        system,
        begun,
        grid,
        prepared,
        schedule,
        scales,
        jnp.array([0, MAX_STEPS]),
        guided=tuple(scale != 1.0 for scale in resolved.scales),
        solver=resolved.solver_config,
    ).x
