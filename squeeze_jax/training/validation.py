"""Validation: the loss of held-out examples at fixed times and noise, with every condition."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from squeeze_jax.array_types import Array, Float
from squeeze_jax.config import Config, StageConfig
from squeeze_jax.sharding import use_mesh
from squeeze_jax.training.state import Params, Split
from squeeze_jax.training.step import Batch, StepRandomness, compute_losses, target_shape

VALIDATION_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Our decision."""

Validation = Callable[[Params, nnx.State, Batch], Float[Array, " B"]]
"""(trained leaves, frozen leaves, batch) to each example's loss."""


def make_validation(
    split: Split, config: Config, stage: StageConfig, mesh: Mesh | None = None
) -> Validation:
    """Compiles a stage's validation: each example's loss, averaged over `VALIDATION_TIMES`.

    No condition is dropped. Noise depends on the record's index alone, so that runs can be
    compared. `mesh` is what the arrays lie on.
    """

    def validate(trained: Params, frozen: nnx.State, batch: Batch) -> Float[Array, " B"]:
        with use_mesh(mesh):
            system, shape = split.merge(trained, frozen), target_shape(batch, config)
            batch = system.encode_batch(batch)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), batch.index)
            noise = jax.vmap(lambda key: jax.random.normal(key, shape[1:]))(keys)
            keep = jnp.ones(shape[0], bool)

            def losses_at(t: jax.Array) -> jax.Array:
                draws = StepRandomness(jnp.full(shape[0], t), noise, keep, keep)
                return compute_losses(system, batch, draws, config, stage)

            return jax.lax.map(losses_at, jnp.asarray(VALIDATION_TIMES)).mean(axis=0)

    everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    return jax.jit(validate, out_shardings=everywhere)


def validation_loss(
    validate: Validation, params: Params, frozen: nnx.State, batches: Sequence[Batch]
) -> float:
    """The mean loss of all validation batches."""
    return float(np.mean([np.mean(validate(params, frozen, batch)) for batch in batches]))
