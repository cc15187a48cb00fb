"""The training loop: restore, step, log, validate, sample, save."""

from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from squeeze_jax.checkpoints.fingerprint import fingerprint
from squeeze_jax.checkpoints.manager import (
    Checkpoints,
    Saved,
    check_leaves,
    check_same_run,
    first_line,
    write_config,
)
from squeeze_jax.checkpoints.trained import start_of, starting_leaves
from squeeze_jax.config import Config, StageConfig, global_batch
from squeeze_jax.data.online import make_online
from squeeze_jax.data.pipeline import BatchIterator, make_dataset
from squeeze_jax.data.records import read_metadata
from squeeze_jax.data.sources import Examples
from squeeze_jax.errors import InputError, Preempted
from squeeze_jax.processes import broadcast_from_main, is_main, local_rows, put_global, put_local_rows
from squeeze_jax.sharding import batch_sharding, make_mesh, shardings
from squeeze_jax.training.interruption import Interruption
from squeeze_jax.training.metrics import MetricsWriter, progress_bar
from squeeze_jax.training.optimizer import make_optimizer
from squeeze_jax.training.state import (
    Params,
    Split,
    TrainState,
    create_params,
    flatten_params,
    from_saved,
    initial_state,
    make_state,
    replace_params,
    state_shardings,
    to_saved,
)
from squeeze_jax.training.step import Batch, Metrics, Validation, make_train_step, make_validation
from squeeze_jax.training.watch import Profile, Watch

SampleFunction = Callable[[Split, Params, int], None]
"""Draws a grid of pictures with (split, trained leaves, step); commands pass it in."""

WorkFunction = Callable[[StageConfig, Batch], tuple[float, float | None]]
"""Model FLOPs of a step on a batch, and the peak FLOP/s of all devices (None where unknown); commands pass it in."""


MOST_HELD_OUT = 128
"""Held-out examples that validation looks at, in one fixed order; of the last batch some may come twice."""


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
    workdir: Path,
    features: epath.PathLike,
    *,
    start_from: Path | None = None,
    accept_changes: bool = False,
    sample: SampleFunction | None = None,
    work: WorkFunction | None = None,
    examples: Mapping[str, Examples] | None = None,
    say: Callable[[str], None] = print,
) -> Result:
    """Runs all stages of a config on the records in `features`/train, validating on `features`/held_out.

    With `data.online` it reads `examples` of these two names instead, and no records.

    Killed at any moment and started again with the same arguments, it ends with the same weights bit for bit.
    `start_from` is what the run begins with (`checkpoints.trained.starting_leaves`; stage 2: stage 1's). `accept_changes`
    continues a run whose config differs. Several processes call it alike (`processes.join`).
    Raises InputError for what cannot be trained or continued, OutputError where a checkpoint cannot be written, and
    Preempted after SIGTERM, when the state is saved.
    """
    say = say if is_main() else lambda text: None
    parallel = config.parallel
    mesh = make_mesh(parallel.data, parallel.fsdp, parallel.tensor, heads=config.model.dit.heads)
    rows = global_batch(config, mesh.shape)
    data, held_out = batches_of(features, examples, config, mesh, rows)
    say(data.describe())

    trained, split = create_params(config, mesh)
    base = fingerprint(split.frozen)
    optimizer = make_optimizer(config)
    checkpoints = Checkpoints(workdir, config.checkpoint.keep, config.checkpoint.keep_every)
    # 1. The folder's own restore_latest checkpoint: the run goes on.
    found = restore_latest(checkpoints, trained, optimizer, config, mesh, data, workdir, base, accept_changes, say)
    if found is not None:
        state, productive = found
        say(f"continuing {workdir} from step {int(state.step)}")
    else:
        productive = 0.0
        # 2. Weights from elsewhere, with fresh moments.
        if start_from is not None:
            leaves = starting_leaves(start_from, config, base, mesh)
            fresh = {name: leaf for name, leaf in trained.items() if name not in leaves}
            check_leaves(trained, leaves if start_of(start_from) == "run" else fresh | leaves, start_from)
            trained = {name: (fresh | leaves)[name].astype(np.float32) for name in trained}
            say(f"starting from the weights of {start_from}: {len(leaves)} arrays, {len(fresh)} begin anew")
        # 3. From scratch: random weights of the config's seed (and the pre-trained base, which `create_params` has read).
        state = make_state(trained, optimizer, config, mesh)
    del trained
    where, frozen = state_shardings(state, mesh), split.frozen
    write_config(workdir, config)
    writer = MetricsWriter(workdir, int(state.step), config.log.tensorboard)
    watch = Watch(rows, workdir, productive, say)
    counts = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (state.params, frozen)]
    say(f"training {counts[0]:,} values, {counts[1]:,} frozen; {rows} examples a step on {mesh.size} devices")
    say(f"learning rate {config.optimizer.learning_rate:g} ({config.optimizer.kind}, {config.optimizer.decay})")

    def weights() -> Params:
        return state.ema_params or state.params

    def save() -> None:
        saved = Saved(config, base, watch.productive_seconds)
        checkpoints.save(step, to_saved(state), data.get_state(), saved)

    begun = int(state.step)
    validation, step, end = float("nan"), begun, 0
    profile = Profile(config.log.profile, workdir)
    with (
        closing(data), closing(checkpoints), closing(writer), closing(profile),
        Interruption() as interruption, progress_bar() as bar,
    ):  # fmt: skip
        for number, stage in enumerate(config.training.stages, 1):
            end += stage.steps
            if step >= end:
                continue
            train_step = make_train_step(split, optimizer, config, stage, where)
            validate = make_validation(split, config, stage, mesh)
            task = bar.add_task(f"stage {number}", total=stage.steps, completed=stage.steps - (end - step), figures="")
            pending: tuple[Metrics, float] | None = None
            flops: dict[Any, float] = {}  # of a step, by the shape of its batch
            while step < end:
                profile.at(step)
                with watch.waiting():
                    batch = put_local_rows(next(data), batch_sharding(mesh), rows)
                shape = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
                if shape in flops:
                    state, metrics = train_step(state, frozen, batch)
                    # The step before is read only now that the next one is under way: the device never waits for us.
                    if pending is not None:
                        watch.read(*pending)
                    pending = metrics, flops[shape]
                else:  # compiled first, so its time says nothing
                    if pending is not None:
                        watch.read(*pending)
                    pending = None
                    with watch.pause():
                        flops[shape], watch.peak = (0.0, None) if work is None else work(stage, batch)
                        state, metrics = train_step(state, frozen, batch)
                        watch.read(metrics, timed=False)
                    if len(flops) == 1:
                        watch.restart()
                step += 1
                last = step == end
                if pending is not None and (last or step % config.log.every == 0):
                    watch.read(*pending)
                    pending = None
                if last or step % config.log.every == 0:
                    row = watch.row(step)
                    writer.write(step, stage=number, **row)
                    bar.update(task, completed=stage.steps - (end - step), figures=watch.text(row, validation))
                if interruption.asked(step):
                    save()
                    checkpoints.wait()
                    raise Preempted(f"stopped by SIGTERM after step {step}, which is saved; start again to go on")
                with watch.pause():
                    if last or step % config.training.validate_every == 0:
                        validation = mean_validation(validate, weights(), frozen, held_out)
                        writer.write(step, validation_loss=validation)
                    if last or step % config.checkpoint.every == 0:
                        save()
                    if sample and (last or (config.training.sample_every and step % config.training.sample_every == 0)):
                        sample(split, weights(), step)
        if step == begun:  # nothing was left to train; was it stopped before validation?
            validation = broadcast_from_main(writer.last("validation_loss", step))
            if np.isnan(validation):
                validate = make_validation(split, config, config.training.stages[-1], mesh)
                validation = mean_validation(validate, weights(), frozen, held_out)
                writer.write(step, validation_loss=validation)
                if sample:
                    sample(split, weights(), step)
        checkpoints.wait()
    if int(state.skipped):
        say(f"{int(state.skipped)} steps had a non-finite loss or gradient and were skipped")
    return Result(split, weights(), step, validation)


def restore_latest(
    checkpoints: Checkpoints,
    trained: Params,
    optimizer: optax.GradientTransformation,
    config: Config,
    mesh: Mesh,
    data: BatchIterator,
    workdir: Path,
    base: str,
    accept_changes: bool,
    say: Callable[[str], None],
) -> tuple[TrainState, float] | None:
    """The state of the restore_latest checkpoint that can be read and its productive seconds; `data` is set to its place.

    A damaged checkpoint is set aside, aloud, for the one before it; one that a disk or the devices' memory refuses is not.
    None where there never was one; raises InputError where all are damaged, and where this is another run's folder.
    """
    like = jax.eval_shape(lambda leaves: initial_state(leaves, optimizer, config), trained)
    like = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), like, state_shardings(like, mesh)
    )
    aside: Path | None = None
    while (step := checkpoints.latest()) is not None:
        try:
            about, place = checkpoints.about(step)
            # Before the arrays: those of another config would look damaged.
            changed = check_same_run(about.config, config, workdir, accept_changes=accept_changes)
            if about.base != base:
                raise InputError(
                    f"{workdir} was trained on another base (fingerprint {about.base}, this one's is {base}); "
                    "give the weights that it began with"
                )
            data.set_state(place)
            state = checkpoints.restore(step, to_saved(like))
        except (InputError, MemoryError, jax.errors.JaxRuntimeError):  # the last: no room on the devices
            raise
        except Exception as error:  # whatever the storage layer makes of missing and shortened files
            if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
                raise InputError(
                    f"{workdir}: the checkpoint of step {step} cannot be read now ({first_line(error)}); "
                    "see to the disk and start again"
                ) from error
            aside = checkpoints.set_aside(step)
            say(f"warning: the checkpoint of step {step} cannot be read ({first_line(error)}); it now lies in {aside}")
            continue
        for line in changed:
            say(f"changed: {line}")
        return from_saved(state), about.productive_seconds
    if aside is not None:
        raise InputError(
            f"{workdir}: not one checkpoint can be read; they lie in {aside.parent}, put one back to try again, "
            "or give another --workdir to begin anew"
        )
    return None


def check_records(folder: epath.Path, config: Config) -> None:
    """Raises InputError unless the records fit the config's transformer and aggregator, and were made as it says."""
    metadata = read_metadata(folder)
    data, noted = config.data, metadata.settings
    reader = noted.get("encoders", {})
    for name, theirs, ours in (
        ("reference_long_side", noted.get("reference_long_side", data.reference_long_side), data.reference_long_side),
        ("system_text", reader.get("system_text", data.system_text), data.system_text),
        ("max_tiles", reader.get("max_tiles", 1), data.max_tiles),
    ):
        if theirs != ours:
            raise InputError(
                f"{folder}: made with data.{name} {theirs!r}, this config has {ours!r}; extract with this config"
            )
    channels = config.model.dit.in_channels // 4
    wanted = [(2 * rows, 2 * columns, channels) for rows, columns in config.training_grids]
    for what, theirs, ours in (
        ("latents of targets", metadata.target_shapes, wanted),
        ("width of hidden states", [metadata.summary.shape.width], [config.aggregator.width]),
    ):
        if not set(theirs) <= set(ours):
            theirs, ours = (", ".join(map(str, some)) for some in (theirs, ours))
            raise InputError(f"{folder}: {what} are {theirs}, this config wants {ours}; extract with this config")


def place_frozen(frozen: nnx.State, mesh: Mesh) -> nnx.State:
    """Frozen leaves where the sharding table puts them."""
    leaves = flatten_params(frozen)
    return replace_params(frozen, put_global(leaves, shardings(leaves, mesh)))


def batches_of(
    features: epath.PathLike, examples: Mapping[str, Examples] | None, config: Config, mesh: Mesh, rows: int
) -> tuple[BatchIterator, list[Batch]]:
    """Training batches of `rows` rows, of which this process reads what lies on its devices, and validation batches."""
    where, features = batch_sharding(mesh), epath.Path(features)

    def batches(split: str, rows: int, seed: int, workers: int) -> BatchIterator:
        own = local_rows(where, rows)
        if examples is not None:
            return make_online(examples[split], config, batch=rows, seed=seed, own=own)
        return make_dataset(
            features / split, batch=rows, rows=own, seed=seed, workers=workers, layers=config.aggregator.reads,
            positions_of=config.model.dit.reference_positions,
        )

    if examples is None:
        if not (features / "held_out").is_dir():
            raise InputError(f"{features / 'held_out'}: no held-out records; extract them too")
        for split in ("train", "held_out"):
            check_records(features / split, config)
    data = batches("train", rows, config.training.seed, config.data.workers)
    fewer = rows // config.optimizer.accumulate
    with closing(batches("held_out", fewer, 0, 0)) as held_out:
        count = min(held_out.epoch, max(-(-MOST_HELD_OUT // fewer), len(held_out.buckets)))
        return data, [put_local_rows(next(held_out), where, fewer) for _ in range(count)]


def mean_validation(
    validate: Validation, leaves: Params, frozen: nnx.State, batches: list[Batch]
) -> float:
    """Mean validation loss over all batches."""
    return float(np.mean([np.mean(validate(leaves, frozen, batch)) for batch in batches]))
