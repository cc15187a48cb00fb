"""The optimiser, and the learning rate over a run's stages."""

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from squeeze_jax.array_types import PyTree
from squeeze_jax.config import Config


def learning_rate(config: Config, peak: float | None = None) -> optax.Schedule:
    """The rate at a step of the run: each stage warms up anew, then stays or falls along a cosine.

    `peak` defaults to `optimizer.learning_rate`.
    """
    optimizer, pieces, borders, start = config.optimizer, [], [], 0
    peak = optimizer.learning_rate if peak is None else peak
    for stage in config.training.stages:
        warmup = min(optimizer.warmup_steps, max(stage.steps - 1, 0))
        if optimizer.decay == "cosine":
            piece = optax.warmup_cosine_decay_schedule(
                0.0, peak, warmup, stage.steps + 1, end_value=peak / 20
            )
        else:
            ramp = optax.linear_schedule(0.0, peak, max(warmup, 1))
            piece = optax.join_schedules([ramp, optax.constant_schedule(peak)], [warmup])
        pieces.append(lambda step, piece=piece: piece(step + 1))  # the first step moves, too
        start += stage.steps
        borders.append(start)
    return optax.join_schedules(pieces, borders[:-1])


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW or Muon; moments in float32, weight decay on matrices
    only."""
    optimizer = config.optimizer
    clip = optax.clip_by_global_norm(optimizer.clip_norm)
    if optimizer.kind == "muon":
        return optax.chain(
            clip,
            muon(
                learning_rate(config),
                muon_weight_dimension_numbers=_matrix_axes,  # pyright: ignore[reportArgumentType]
                adam_learning_rate=learning_rate(config, optimizer.vector_learning_rate),
                adam_b1=optimizer.b1,
                adam_b2=optimizer.b2,
                weight_decay=optimizer.weight_decay,
                mu_dtype=jnp.float32,
            ),
        )
    return optax.chain(
        clip,
        optax.scale_by_adam(b1=optimizer.b1, b2=optimizer.b2, mu_dtype=jnp.float32),
        optax.add_decayed_weights(optimizer.weight_decay, mask=is_matrix),
        optax.scale_by_learning_rate(learning_rate(config)),
    )


def schedule_step(opt_state: optax.OptState, default: jax.Array) -> jax.Array:
    """The step (a scalar) at which the learning rate's schedule is; of an optimizer without one,
    `default`."""
    leaves = jax.tree.leaves(opt_state, is_leaf=_is_schedule)
    counts = [leaf.count for leaf in leaves if _is_schedule(leaf)]
    return counts[0] if counts else default


def with_schedule_step(opt_state: optax.OptState, step: jax.Array) -> optax.OptState:
    """An optimizer's state with its learning rate's schedule at this step, a scalar."""
    return jax.tree.map(
        lambda leaf: leaf._replace(count=step) if _is_schedule(leaf) else leaf,
        opt_state,
        is_leaf=_is_schedule,
    )


def _is_schedule(leaf: object) -> bool:
    return isinstance(leaf, optax.ScaleByScheduleState)


def is_matrix(leaves: dict[str, PyTree]) -> dict[str, bool]:
    """True for kernels and low-rank factors; biases, norms and pooling weights do not decay."""
    return {path: path.rsplit(".", 1)[-1] in ("kernel", "down", "up") for path in leaves}


def _matrix_axes(leaves: dict[str, PyTree]) -> dict[str, MuonDimensionNumbers | None]:
    """Input and output axis of every matrix, from the last (a stack's leading axis is a batch of
    matrices)."""
    axes = MuonDimensionNumbers(-2, -1)
    return {path: axes if matrix else None for path, matrix in is_matrix(leaves).items()}
