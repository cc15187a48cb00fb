"""The loss of a batch and the train step.

Randomness is a function of (seed, step, row) alone, where steps are counted through all stages, in
one run or in several that began with one another.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from squeeze_jax.array_types import Array, Bool, Float, Key, PyTree
from squeeze_jax.batch import Context, RawBatch, References, TrainingBatch
from squeeze_jax.config import Config, StageConfig
from squeeze_jax.diffusion.flow import add_noise, loss_per_sample, sample_times
from squeeze_jax.models.system import System
from squeeze_jax.sharding import batch_sharding, compiler_options, use_mesh
from squeeze_jax.training.optimizer import learning_rate, schedule_step
from squeeze_jax.training.state import Params, Split, TrainState

Batch = TrainingBatch | RawBatch
"""Features, or examples that the program's own encoders turn into them."""


class StepRandomness(NamedTuple):
    """What is random in a step, row by row of the global batch."""

    t: Float[Array, " B"]
    noise: Float[Array, "B N c"]
    keep_mllm: Bool[Array, " B"]
    keep_vae: Bool[Array, " B"]


TIME_BORDERS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Noise levels whose losses are told apart (our decision)."""


class Metrics(NamedTuple):
    """Numbers of a step, float32."""

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    """Before clipping, as are the next two."""
    grad_norm_dit: Float[Array, ""]
    """Of the transformer's trained leaves: its adapters, or all of it."""
    grad_norm_aggregator: Float[Array, ""]
    loss_by_time: Float[Array, " bins"]
    """Sum of the losses whose t lies between two of `TIME_BORDERS`."""
    count_by_time: Float[Array, " bins"]
    learning_rate: Float[Array, ""]
    skipped: Array
    """Non-finite steps so far."""


def step_key(config: Config, step: int | jax.Array) -> Key:
    """The key of a run's step, a scalar."""
    training = config.training
    return jax.random.fold_in(jax.random.key(training.seed), step + training.steps_before)


def sample_randomness(
    key: Key, shape: tuple[int, int, int], config: Config, stage: StageConfig
) -> StepRandomness:
    """Draws times, noise and dropped conditions of a batch [B, N, c]; row i is the same whatever B
    is."""
    batch, length, channels = shape

    def draw_row(key: Key) -> StepRandomness:
        times, noise, dropout = jax.random.split(key, 3)
        mu = config.schedule_shift(
            length, config.sampling.steps
        )  # training sees the sampler's times
        t = sample_times(times, 1, config.diffusion.time_sampling, mu)
        mllm, vae = stage.dropout.draw(dropout, 1)
        return StepRandomness(t[0], jax.random.normal(noise, (length, channels)), mllm[0], vae[0])

    return jax.vmap(draw_row)(jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch)))


def compute_losses(
    system: System, batch: Batch, draws: StepRandomness, config: Config, stage: StageConfig
) -> Float[Array, " B"]:
    """Each sample's loss. A dropped condition and padding are masked out of attention: neither
    changes a loss."""
    batch = system.encode_batch(batch)
    context = system.aggregate(batch.hidden_states)
    context = Context(context.tokens, context.mask & draws.keep_mllm[:, None])
    references = None
    if stage.references and batch.references.tokens.shape[1]:
        mask = batch.references.mask & draws.keep_vae[:, None]
        references = References(batch.references.tokens, mask, batch.references.positions)
    x_t = add_noise(batch.target, draws.noise, draws.t)
    grid = config.target_grid if batch.grid is None else batch.grid
    velocity = system.velocity(x_t, grid, draws.t, context, references, config.diffusion.guidance)
    return loss_per_sample(velocity, batch.target, draws.noise)


def target_shape(batch: Batch, config: Config) -> tuple[int, int, int]:
    """[B, N, c] of a batch's target tokens."""
    if isinstance(batch, RawBatch):
        rows, columns = config.target_grid
        return batch.target.shape[0], rows * columns, config.model.dit.in_channels
    return batch.target.shape


TrainStep = Callable[[TrainState, nnx.State, Batch], tuple[TrainState, Metrics]]


def step_function(
    split: Split,
    optimizer: optax.GradientTransformation,
    config: Config,
    stage: StageConfig,
    begin: int = 0,
) -> TrainStep:
    """A stage's step as a pure function: (state, frozen leaves, batch) to (state, metrics).

    Gradients exist for trained leaves only. The batch's rows are dealt out to
    `optimizer.accumulate` pieces whose gradients are averaged: the same numbers as one large batch.
    A non-finite loss or gradient leaves weights, moments and average as they were and is counted.
    `begin`: the run's steps before this stage.
    """
    rate, pieces = learning_rate(config), config.optimizer.accumulate

    def mean_loss(
        params: Params, frozen: nnx.State, batch: Batch, draws: StepRandomness
    ) -> tuple[jax.Array, jax.Array]:
        losses = compute_losses(split.merge(params, frozen), batch, draws, config, stage)
        return jnp.mean(losses), losses

    loss_and_gradient = jax.value_and_grad(mean_loss, has_aux=True)

    def accumulate(
        params: Params, frozen: nnx.State, batch: Batch, draws: StepRandomness
    ) -> tuple[tuple[jax.Array, jax.Array], Params]:
        """`loss_and_gradient` of the whole batch, of which a piece at a time is in memory."""

        def add(total: PyTree, piece: PyTree) -> tuple[PyTree, jax.Array]:
            (loss, losses), grads = loss_and_gradient(params, frozen, *piece)
            return jax.tree.map(jnp.add, total, (loss, grads)), losses

        # Piece p has the rows p, pieces + p, …: on a mesh, rows stay on their devices.
        cut = jax.tree.map(
            lambda x: x.reshape(x.shape[0] // pieces, pieces, *x.shape[1:]).swapaxes(0, 1),
            (batch, draws),
        )
        zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        sums, losses = jax.lax.scan(add, zeros, cut)
        loss, grads = jax.tree.map(lambda x: x / pieces, sums)
        return (loss, losses.swapaxes(0, 1).ravel()), grads

    def step(state: TrainState, frozen: nnx.State, batch: Batch) -> tuple[TrainState, Metrics]:
        # Loss and gradients.
        key, shape = step_key(config, state.step), target_shape(batch, config)
        draws = sample_randomness(key, shape, config, stage)
        compute = loss_and_gradient if pieces == 1 else accumulate
        (loss, losses), grads = compute(state.params, frozen, batch, draws)
        norm_dit, norm_aggregator = (
            optax.tree.norm({name: leaf for name, leaf in grads.items() if name.startswith(part)})
            for part in ("dit.", "aggregator.")
        )
        norm = jnp.hypot(norm_dit, norm_aggregator)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)

        # Weights, moments and average; all as they were where something is not finite.
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        ema_params = state.ema_params and update_ema(
            state.ema_params, params, state.step - begin, config.optimizer.ema
        )
        params, opt_state, ema_params = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, opt_state, ema_params),
            (state.params, state.opt_state, state.ema_params),
        )
        skipped = state.skipped + (~finite).astype(jnp.int32)

        # What the run shows.
        sums, counts = sum_losses_by_time(losses, draws.t)
        rate_now = jnp.asarray(rate(schedule_step(state.opt_state, state.step)), jnp.float32)
        metrics = Metrics(loss, norm, norm_dit, norm_aggregator, sums, counts, rate_now, skipped)
        return TrainState(state.step + 1, params, opt_state, ema_params, skipped), metrics

    return step


def make_train_step(
    split: Split,
    optimizer: optax.GradientTransformation,
    config: Config,
    stage: StageConfig,
    shardings: TrainState | None = None,
    begin: int = 0,
) -> TrainStep:
    """Compiles a stage's step (`step_function`); the state is donated.

    `shardings` says how the state lies on a mesh (`state_shardings`), before and after; without it
    everything lies on one device.
    """
    step = step_function(split, optimizer, config, stage, begin)
    if shardings is None:
        return jax.jit(step, donate_argnums=0)
    mesh = jax.tree.leaves(shardings)[0].mesh

    def step_on_mesh(
        state: TrainState, frozen: nnx.State, batch: Batch
    ) -> tuple[TrainState, Metrics]:
        with use_mesh(mesh):
            return step(state, frozen, batch)

    examples, everywhere = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())
    return jax.jit(
        step_on_mesh,
        donate_argnums=0,
        in_shardings=(shardings, None, examples),
        out_shardings=(shardings, everywhere),
        compiler_options=compiler_options(mesh),
    )


def sum_losses_by_time(
    losses: Float[Array, " B"], t: Float[Array, " B"]
) -> tuple[Float[Array, " bins"], Float[Array, " bins"]]:
    """Sums of losses and their numbers in each bin of `TIME_BORDERS`."""
    bins = jnp.searchsorted(jnp.array(TIME_BORDERS[1:-1]), t, side="right")
    member = bins[:, None] == jnp.arange(len(TIME_BORDERS) - 1)[None]
    sums = jnp.where(member, losses[:, None], 0.0).sum(axis=0)
    return sums, member.astype(jnp.float32).sum(axis=0)


def update_ema(average: Params, params: Params, step: jax.Array, decay: float) -> Params:
    """average + (1 − d)·(params − average), with d growing from 0.1 to `decay` over the first steps
    of a stage (our decision). `step`, a scalar, counts from the stage's first."""
    count = step.astype(jnp.float32)
    d = jnp.minimum(decay, (1.0 + count) / (10.0 + count))
    return jax.tree.map(lambda a, w: a + (1.0 - d) * (w - a), average, params)
