"""The training loop: restore, step, log, validate, sample, save."""

import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from squeeze_jax.batch import TrainingBatch
from squeeze_jax.config import Config
from squeeze_jax.data.pipeline import BatchIterator, make_dataset
from squeeze_jax.errors import InputError
from squeeze_jax.interop.build import build_system
from squeeze_jax.interop.checkpoint import Checkpoints, check_leaves, check_same_run, read_weights, write_config
from squeeze_jax.sharding import batch_sharding, make_mesh, shardings
from squeeze_jax.training.metrics import MetricsWriter, progress_bar
from squeeze_jax.training.optimizer import make_optimizer
from squeeze_jax.training.state import Leaves, Split, TrainState, initial_state, split_system, state_shardings
from squeeze_jax.training.step import Metrics, Validation, make_train_step, make_validation

SampleFunction = Callable[[Split, Leaves, int], None]
"""Draws a grid of pictures with (split, trained leaves, step); commands pass it in."""


class Result(NamedTuple):
    """How a run ended."""

    split: Split
    leaves: Leaves
    """Trained leaves, or their average where the config keeps one."""
    step: int
    validation: float
    """Mean validation loss at the end."""


def train(
    config: Config,
    workdir: Path,
    features: Path,
    *,
    start_from: Path | None = None,
    sample: SampleFunction | None = None,
    say: Callable[[str], None] = print,
) -> Result:
    """Runs all stages of a config on the records in `features`/train, validating on `features`/held_out.

    Killed at any moment and started again with the same arguments, it ends with the same weights bit for bit.
    `start_from` is a work or weights folder whose trained weights begin the run (stage 2 from stage 1).
    """
    mesh = make_mesh(config.parallel.data, config.parallel.fsdp, config.parallel.tensor)
    rows = config.data.batch_per_chip * mesh.shape["data"] * mesh.shape["fsdp"] * config.optimizer.accumulate
    seed, count = config.training.seed, jax.process_count()
    data = make_dataset(
        features / "train",
        batch=rows // count,
        seed=seed,
        process_index=jax.process_index(),
        process_count=count,
        workers=config.data.workers,
        layers=config.aggregator.reads,
    )
    held_out = validation_batches(features / "held_out", rows // config.optimizer.accumulate, config.aggregator.reads)

    check_records(data, config, features)
    say(data.describe())

    trained, split = split_system(build_system(config, mesh=mesh), config)
    optimizer = make_optimizer(config)
    state = initial_state(trained, optimizer, config)
    checkpoints = Checkpoints(workdir, config.checkpoint.keep)
    latest = checkpoints.latest()
    # 1. The folder's own newest checkpoint: the run goes on.
    if latest is not None:
        check_same_run(checkpoints.config(latest), config, workdir)
        placed = jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
            state,
            state_shardings(state, mesh),
        )
        state, place = checkpoints.restore(latest, placed._asdict())
        state = TrainState(**state)
        data.set_state(place)
        say(f"continuing {workdir} from step {latest}")
    # 2. Weights from elsewhere, with fresh moments.
    elif start_from is not None:
        _, leaves, _ = read_weights(start_from)
        check_leaves(trained, leaves, start_from)
        start = {name: np.asarray(leaf, np.float32) for name, leaf in leaves.items()}
        state = initial_state(jax.tree.map(jax.numpy.asarray, start), optimizer, config)
        say(f"starting from the weights of {start_from}")
    # 3. From scratch: random weights of the config's seed (and the pre-trained base, which build_system loads).
    where = state_shardings(state, mesh)
    state = jax.device_put(state, where)
    frozen = place_frozen(split.frozen, mesh)
    write_config(workdir, config)
    writer = MetricsWriter(workdir, int(state.step), config.log.tensorboard)
    trained_count = sum(leaf.size for leaf in trained.values())
    frozen_count = sum(leaf.size for leaf in jax.tree.leaves(frozen))
    say(f"training {trained_count:,} values, {frozen_count:,} frozen; {rows} examples a step on {mesh.size} devices")

    def weights() -> Leaves:
        return state.average or state.trained

    validation, step = float("nan"), int(state.step)
    with closing(data), closing(checkpoints), closing(writer), progress_bar() as bar:
        end = 0
        for number, stage in enumerate(config.training.stages, 1):
            end += stage.steps
            if step >= end:
                continue
            train_step = make_train_step(split, optimizer, config, stage, where)
            validate = make_validation(split, config, stage, mesh)
            task = bar.add_task(f"stage {number}", total=stage.steps, completed=stage.steps - (end - step), figures="")
            meter = Meter(rows)
            pending: tuple[int, Metrics] | None = None
            while step < end:
                batch = jax.device_put(next(data), batch_sharding(mesh))
                state, metrics = train_step(state, frozen, batch)
                step += 1
                # The step before is read only now that the next one is under way: the device never waits for us.
                if pending is not None:
                    meter.read(*pending)
                pending = (step, metrics)
                last = step == end
                if last or step % config.log.every == 0:
                    row = meter.read(*pending)
                    pending = None
                    writer.write(step, stage=number, **row)
                    bar.update(task, completed=stage.steps - (end - step), figures=meter.text(validation))
                if last or step % config.training.validate_every == 0:
                    validation = mean_validation(validate, weights(), frozen, held_out, mesh)
                    writer.write(step, validation_loss=validation)
                    meter.restart()
                if last or step % config.checkpoint.every == 0:
                    checkpoints.save(step, state._asdict(), data.get_state(), config)
                if sample and (last or (config.training.sample_every and step % config.training.sample_every == 0)):
                    sample(split, weights(), step)
                    meter.restart()
        checkpoints.wait()
    if int(state.skipped):
        say(f"{int(state.skipped)} steps had a non-finite loss or gradient and were skipped")
    return Result(split, weights(), step, validation)


def check_records(data: BatchIterator, config: Config, features: Path) -> None:
    """Raises InputError unless the records fit the config's transformer and aggregator's width."""
    channels = config.model.dit.in_channels // 4
    wanted = [(2 * rows, 2 * columns, channels) for rows, columns in config.training_grids]
    for what, theirs, ours in (
        ("latents of targets", data.source.metadata.target_shapes, wanted),
        ("width of hidden states", [data.source.metadata.summary.shape.width], [config.aggregator.width]),
    ):
        if not set(theirs) <= set(ours):
            theirs, ours = (", ".join(map(str, some)) for some in (theirs, ours))
            raise InputError(f"{features}: {what} are {theirs}, this config wants {ours}; extract with this config")


def place_frozen(frozen: nnx.State, mesh: Mesh) -> nnx.State:
    """Frozen leaves where the sharding table puts them."""
    flat = nnx.to_flat_state(frozen)
    leaves = {".".join(map(str, path)): variable[...] for path, variable in flat}
    placed = jax.device_put(leaves, shardings(leaves, mesh))
    return nnx.from_flat_state([(path, v.replace(placed[".".join(map(str, path))])) for path, v in flat])


class Meter:
    """Smoothed loss and speed."""

    def __init__(self, rows: int) -> None:
        self.rows, self.loss, self.values = rows, float("nan"), {}
        self.restart()

    def restart(self) -> None:
        """Leaves pauses (validation, sampling) out of the speed."""
        self.start, self.count = time.perf_counter(), 0

    def read(self, step: int, metrics: Metrics) -> dict[str, float]:
        """Waits for a step's metrics and takes them in."""
        self.values = {name: float(value) for name, value in metrics._asdict().items()}
        loss = self.values["loss"]
        if np.isfinite(loss):
            self.loss = loss if not np.isfinite(self.loss) else 0.98 * self.loss + 0.02 * loss
        self.count += 1
        return {**self.values, "loss_smoothed": self.loss, **self.speed()}

    def speed(self) -> dict[str, float]:
        seconds = (time.perf_counter() - self.start) / max(self.count, 1)
        return {"step_seconds": seconds, "examples_per_second": self.rows / max(seconds, 1e-9)}

    def text(self, validation: float) -> str:
        speed = self.speed()
        seen = f"  validation {validation:.4f}" if np.isfinite(validation) else ""  # none yet
        return (
            f"loss {self.loss:.4f}{seen}  {speed['step_seconds']:.2f} s/step  "
            f"{speed['examples_per_second']:.0f} examples/s"
        )


def validation_batches(
    folder: Path, rows: int, layers: tuple[int, ...] | None = None, most: int = 128
) -> list[TrainingBatch]:
    """The first `most` held-out records in batches of `rows`, in one fixed order; rows of the last may come again."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no held-out records; extract them too")
    batches: BatchIterator = make_dataset(folder, batch=rows, seed=0, layers=layers)
    count = min(batches.epoch, max(-(-most // rows), len(batches.buckets)))
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return taken


def mean_validation(
    validate: Validation, leaves: Leaves, frozen: nnx.State, batches: list[TrainingBatch], mesh: Mesh
) -> float:
    """Mean validation loss over all batches."""
    placed = (jax.device_put(batch, batch_sharding(mesh)) for batch in batches)
    return float(np.mean([np.mean(validate(leaves, frozen, batch)) for batch in placed]))
