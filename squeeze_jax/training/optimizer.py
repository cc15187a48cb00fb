"""AdamW with clipping, and the learning rate over a run's stages."""

import jax.numpy as jnp
import optax

from squeeze_jax.array_types import Array
from squeeze_jax.config import Config


def learning_rate(config: Config) -> optax.Schedule:
    """The rate at a step of the whole run: each stage warms up anew, then stays or falls along a cosine."""
    optimizer, pieces, borders, start = config.optimizer, [], [], 0
    for stage in config.training.stages:
        warmup = min(optimizer.warmup_steps, stage.steps)
        if optimizer.decay == "cosine":
            piece = optax.warmup_cosine_decay_schedule(
                0.0, optimizer.learning_rate, warmup, stage.steps, end_value=optimizer.learning_rate / 20
            )
        else:
            piece = optax.join_schedules(
                [
                    optax.linear_schedule(0.0, optimizer.learning_rate, max(warmup, 1)),
                    optax.constant_schedule(optimizer.learning_rate),
                ],
                [warmup],
            )
        pieces.append(lambda step, piece=piece: piece(step + 1))  # the first step moves, too
        start += stage.steps
        borders.append(start)
    return optax.join_schedules(pieces, borders[:-1])


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Clipping by the global norm, Adam moments in float32, decoupled weight decay on matrices only."""
    optimizer = config.optimizer
    return optax.chain(
        optax.clip_by_global_norm(optimizer.clip_norm),
        optax.scale_by_adam(b1=optimizer.b1, b2=optimizer.b2, mu_dtype=jnp.float32),
        optax.add_decayed_weights(optimizer.weight_decay, mask=is_matrix),
        optax.scale_by_learning_rate(learning_rate(config)),
    )


def is_matrix(leaves: dict[str, Array]) -> dict[str, bool]:
    """True for kernels and low-rank factors; biases, norms and pooling weights do not decay."""
    return {path: path.rsplit(".", 1)[-1] in ("kernel", "down", "up") for path in leaves}
