"""The loss of a batch and the train step. Randomness is a function of (seed, step, row) alone."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from squeeze_jax.array_types import Array, Bool, Float, Key
from squeeze_jax.batch import Context, RawBatch, References, TrainingBatch
from squeeze_jax.config import Config, StageConfig
from squeeze_jax.diffusion.flow import add_noise, loss_per_sample, sample_times
from squeeze_jax.models.system import System
from squeeze_jax.sharding import batch_sharding, compiler_options, use_mesh
from squeeze_jax.training.optimizer import learning_rate
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
    """The key of a step."""
    return jax.random.fold_in(jax.random.key(config.training.seed), step)


def sample_randomness(key: Key, shape: tuple[int, int, int], config: Config, stage: StageConfig) -> StepRandomness:
    """Times, noise and dropped conditions of a batch [B, N, c]; row i is the same whatever B is."""
    batch, length, channels = shape

    def row(key: Key) -> StepRandomness:
        times, noise, dropout = jax.random.split(key, 3)
        mu = config.schedule_shift(length, config.sampling.steps)  # training sees the sampler's times
        t = sample_times(times, 1, config.diffusion.time_sampling, mu)
        mllm, vae = stage.dropout.draw(dropout, 1)
        return StepRandomness(t[0], jax.random.normal(noise, (length, channels)), mllm[0], vae[0])

    return jax.vmap(row)(jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch)))


def compute_losses(
    system: System, batch: TrainingBatch | RawBatch, draws: StepRandomness, config: Config, stage: StageConfig
) -> Float[Array, " B"]:
    """Each sample's loss. A dropped condition is masked out of attention, padding likewise: neither changes a loss."""
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


def make_train_step(
    split: Split,
    optimizer: optax.GradientTransformation,
    config: Config,
    stage: StageConfig,
    where: TrainState | None = None,
) -> TrainStep:
    """The compiled step of a stage: (state, frozen leaves, batch) to (state, metrics); the state is donated.

    Gradients exist for trained leaves only. The batch's rows are dealt out to `optimizer.accumulate` pieces whose gradients
    are averaged: the same numbers as one large batch. A non-finite loss or gradient leaves weights, moments and average
    as they were and is counted. `where` says how the state lies on a mesh (`state_shardings`), before and after; without
    it everything lies on one device.
    """
    rate, pieces = learning_rate(config), config.optimizer.accumulate

    def mean_loss(
        trained: Params, frozen: nnx.State, batch: Batch, draws: StepRandomness
    ) -> tuple[jax.Array, jax.Array]:
        each = compute_losses(split.merge(trained, frozen), batch, draws, config, stage)
        return jnp.mean(each), each

    def step(state: TrainState, frozen: nnx.State, batch: Batch) -> tuple[TrainState, Metrics]:
        draws = sample_randomness(step_key(config, state.step), target_shape(batch, config), config, stage)
        gradient = jax.value_and_grad(mean_loss, has_aux=True)
        if pieces == 1:
            (loss, each), grads = gradient(state.params, frozen, batch, draws)
        else:

            def add(total: Any, piece: Any) -> tuple[Any, jax.Array]:
                (loss, each), grads = gradient(state.params, frozen, *piece)
                return jax.tree.map(jnp.add, total, (loss, grads)), each

            # Piece p has the rows p, pieces + p, 2·pieces + p, …: on a mesh, rows stay on their devices.
            cut = jax.tree.map(
                lambda x: x.reshape(x.shape[0] // pieces, pieces, *x.shape[1:]).swapaxes(0, 1), (batch, draws)
            )
            nothing = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
            sums, each = jax.lax.scan(add, nothing, cut)
            each = each.swapaxes(0, 1)
            loss, grads = jax.tree.map(lambda x: x / pieces, sums)
        of_dit, of_aggregator = (
            optax.tree.norm({name: leaf for name, leaf in grads.items() if name.startswith(part)})
            for part in ("dit.", "aggregator.")
        )
        norm = jnp.hypot(of_dit, of_aggregator)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params: Params = optax.apply_updates(state.params, updates)  # pyright: ignore[reportAssignmentType]
        ema_params = state.ema_params and update_ema(state.ema_params, params, state.step, config.optimizer.ema)

        def keep(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(finite, new, old)

        params, opt_state, ema_params = jax.tree.map(
            keep, (params, opt_state, ema_params), (state.params, state.opt_state, state.ema_params)
        )
        skipped = state.skipped + (~finite).astype(jnp.int32)
        sums, counts = sum_losses_by_time(each.ravel(), draws.t)
        # Skipped steps do not count in the optimiser's moments, where its schedule's place lies, too.
        now = jnp.asarray(rate(state.step - state.skipped), jnp.float32)
        metrics = Metrics(loss, norm, of_dit, of_aggregator, sums, counts, now, skipped)
        return TrainState(state.step + 1, params, opt_state, ema_params, skipped), metrics

    if where is None:
        return jax.jit(step, donate_argnums=0)
    mesh = jax.tree.leaves(where)[0].mesh

    def placed(state: TrainState, frozen: nnx.State, batch: Batch) -> tuple[TrainState, Metrics]:
        with use_mesh(mesh):
            return step(state, frozen, batch)

    examples, everywhere = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())
    return jax.jit(
        placed,
        donate_argnums=0,
        in_shardings=(where, None, examples),
        out_shardings=(where, everywhere),
        compiler_options=compiler_options(mesh),
    )


def sum_losses_by_time(
    each: Float[Array, " B"], t: Float[Array, " B"]
) -> tuple[Float[Array, " bins"], Float[Array, " bins"]]:
    """Sums of losses and their numbers in each bin of `TIME_BORDERS`."""
    bins = jnp.searchsorted(jnp.array(TIME_BORDERS[1:-1]), t, side="right")
    member = bins[:, None] == jnp.arange(len(TIME_BORDERS) - 1)[None]
    return jnp.where(member, each[:, None], 0.0).sum(axis=0), member.astype(jnp.float32).sum(axis=0)


def update_ema(average: Params, trained: Params, step: jax.Array, decay: float) -> Params:
    """average + (1 − d)·(trained − average), with d growing from 0.1 to `decay` over the first steps."""
    count = step.astype(jnp.float32)
    d = jnp.minimum(decay, (1.0 + count) / (10.0 + count))
    return jax.tree.map(lambda a, w: a + (1.0 - d) * (w - a), average, trained)


VALIDATION_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)


Validation = Callable[[Params, nnx.State, Batch], Float[Array, " B"]]


def make_validation(split: Split, config: Config, stage: StageConfig, mesh: Mesh | None = None) -> Validation:
    """The compiled validation: (trained, frozen, batch) to each sample's loss, averaged over fixed times and noise.

    Every condition stays; noise depends on the record's index alone, so that runs can be compared. `mesh` is what the
    arrays lie on.
    """

    def validate(trained: Params, frozen: nnx.State, batch: Batch) -> Float[Array, " B"]:
        with use_mesh(mesh):
            system, shape = split.merge(trained, frozen), target_shape(batch, config)
            batch = system.encode_batch(batch)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), batch.index)
            noise = jax.vmap(lambda key: jax.random.normal(key, shape[1:]))(keys)
            keep = jnp.ones(shape[0], bool)
            at = jax.lax.map(
                lambda t: compute_losses(
                    system, batch, StepRandomness(jnp.full(shape[0], t), noise, keep, keep), config, stage
                ),
                jnp.asarray(VALIDATION_TIMES),
            )
            return at.mean(axis=0)

    return jax.jit(validate, out_shardings=None if mesh is None else NamedSharding(mesh, PartitionSpec()))
