"""The training loop: opens the data, restores or initialises the state, runs every training
stage."""

from collections.abc import Callable, Mapping
from contextlib import closing
from typing import NamedTuple

import jax
import numpy as np
from etils import epath

from squeeze_jax.checkpoints.manager import Checkpoints, Saved, write_config
from squeeze_jax.config import Config, global_batch
from squeeze_jax.data.sources import Examples
from squeeze_jax.errors import Preempted
from squeeze_jax.processes import broadcast_from_main, is_main, put_local_rows
from squeeze_jax.sharding import batch_sharding, make_mesh
from squeeze_jax.storage import AnyPath, spoken_waiting
from squeeze_jax.training.batches import make_batches
from squeeze_jax.training.interruption import Interruption
from squeeze_jax.training.metrics import MetricsWriter, progress_bar
from squeeze_jax.training.monitor import Monitor
from squeeze_jax.training.optimizer import make_optimizer
from squeeze_jax.training.profiling import Profiler
from squeeze_jax.training.start import restore_or_initialize
from squeeze_jax.training.state import Params, Split, begin_stage, state_shardings, to_saved
from squeeze_jax.training.step import make_train_step
from squeeze_jax.training.step_flops import StepFlops, WorkFunction
from squeeze_jax.training.validation import make_validation, validation_loss

SampleFunction = Callable[[Split, Params, int], None]
"""Draws a grid of pictures with (split, trained leaves, step); commands pass it in."""


class Result(NamedTuple):
    """How a run ended."""

    split: Split
    params: Params
    """Trained parameters, or their average where the config keeps one."""
    step: int
    validation: float
    """Mean validation loss at the end."""


def train(
    config: Config,
    workdir: AnyPath,
    features: epath.PathLike,
    *,
    start_from: AnyPath | None = None,
    accept_changes: bool = False,
    sample: SampleFunction | None = None,
    work: WorkFunction | None = None,
    examples: Mapping[str, Examples] | None = None,
    say: Callable[[str], None] = print,
) -> Result:
    """Runs all stages of a config on the records in `features`/train, validating on
    `features`/held_out. With `data.online` it reads `examples` of these two names instead.

    Killed at any moment and started again with the same arguments, it ends with the same weights
    bit for bit. `start_from` is what a new run begins with
    (`checkpoints.trained.load_initial_params`; stage 2: stage 1's folder). `accept_changes`
    continues a run whose config differs. Several processes call it alike
    (`processes.init_distributed`). Raises InputError for what cannot be trained or continued,
    OutputError where a checkpoint cannot be written, and Preempted after SIGTERM, when the state
    is saved.
    """
    # What to train on, and where to begin.
    everywhere, say = say, say if is_main() else lambda text: None
    parallel = config.parallel
    mesh = make_mesh(parallel.data, parallel.fsdp, parallel.tensor, heads=config.model.dit.heads)
    rows = global_batch(config, mesh.shape)
    with spoken_waiting(f"opening the records in {features}", everywhere):
        data, held_out = make_batches(features, examples, config, mesh, rows)
    say(data.describe())
    optimizer = make_optimizer(config)
    checkpoints = Checkpoints(workdir, config.checkpoint.keep, config.checkpoint.keep_every)
    config, state, split, base, productive_seconds = restore_or_initialize(
        config,
        mesh,
        optimizer,
        checkpoints,
        data,
        start_from=start_from,
        accept_changes=accept_changes,
        say=say,
    )
    frozen = split.frozen

    # What the run writes and shows.
    write_config(workdir, config)
    first_step = step = int(state.step)
    writer = MetricsWriter(workdir, first_step, config.log.tensorboard)
    monitor = Monitor(rows, workdir, productive_seconds, say)
    profiler = Profiler(config.log.profile, workdir)
    trained, kept = (_values(tree) for tree in (state.params, frozen))
    say(
        f"training {trained:,} values, {kept:,} frozen; "
        f"{rows} examples a step on {mesh.size} devices"
    )
    optimized = config.optimizer
    say(f"learning rate {optimized.learning_rate:g} ({optimized.kind}, {optimized.decay})")

    def weights() -> Params:
        return state.ema_params or state.params

    def save() -> None:
        writer.upload()  # first, so that a checkpoint has the rows up to it
        saved = Saved(config, base, monitor.productive_seconds)
        checkpoints.save(step, to_saved(state), data.get_state(), saved)

    validation, end = float("nan"), 0
    with (
        closing(data), closing(checkpoints), closing(writer), closing(profiler),
        Interruption() as interruption, progress_bar() as bar,
    ):  # fmt: skip
        for number, stage in enumerate(config.training.stages, 1):
            begin, end = end, end + stage.steps
            if step >= end:
                continue
            if step == begin > 0:
                state = begin_stage(state, optimizer, config, mesh)
            train_step = make_train_step(
                split, optimizer, config, stage, state_shardings(state, mesh), begin
            )
            validate = make_validation(split, config, stage, mesh)
            flops = StepFlops(work, stage)
            task = bar.add_task(
                f"stage {number}", total=stage.steps, completed=step - begin, figures=""
            )
            while step < end:
                # A step. The metrics of the one before are read only now that it is under way.
                profiler.update(step)
                with monitor.waiting_for_input(), spoken_waiting("records", everywhere):
                    batch = put_local_rows(next(data), batch_sharding(mesh), rows)
                if (known := flops.get(batch)) is not None:
                    state, metrics = train_step(state, frozen, batch)
                    monitor.record(metrics, known)
                else:  # the first of its shape is compiled, so its time says nothing
                    monitor.read_pending()
                    with monitor.paused():
                        monitor.peak = flops.count(batch)
                        state, metrics = train_step(state, frozen, batch)
                        monitor.record_untimed(metrics)
                    if len(flops) == 1:
                        monitor.restart_clock()
                step += 1

                # What is due after so many steps, and always at the end of a stage.
                if _is_due(step, config.log.every, end):
                    row = monitor.make_row(step)
                    writer.write(step, stage=number, **row)
                    figures = monitor.format_row(row, validation)
                    bar.update(task, completed=step - begin, figures=figures)
                if interruption.requested(step):
                    save()
                    checkpoints.wait()
                    raise Preempted(
                        f"stopped by SIGTERM after step {step}, which is saved; "
                        "start again to go on"
                    )
                with monitor.paused():
                    if _is_due(step, config.training.validate_every, end):
                        validation = validation_loss(validate, weights(), frozen, held_out)
                        writer.write(step, validation_loss=validation)
                    if _is_due(step, config.checkpoint.every, end):
                        save()
                    if sample and _is_due(step, config.training.sample_every, end):
                        sample(split, weights(), step)
        if step == first_step:  # nothing was left to train; was it stopped before validation?
            validation = broadcast_from_main(writer.last("validation_loss", step))
            if np.isnan(validation):
                validate = make_validation(split, config, config.training.stages[-1], mesh)
                validation = validation_loss(validate, weights(), frozen, held_out)
                writer.write(step, validation_loss=validation)
                if sample:
                    sample(split, weights(), step)
        with spoken_waiting(f"writing the last checkpoint into {workdir}", say):
            checkpoints.wait()
    if int(state.skipped):
        say(f"{int(state.skipped)} steps had a non-finite loss or gradient and were skipped")
    return Result(split, weights(), step, validation)


def _is_due(step: int, every: int, end: int) -> bool:
    """Whether a periodic action is due after `step`: every `every` steps (0: none), and at the
    stage's end."""
    return step == end or (every > 0 and step % every == 0)


def _values(tree: object) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
