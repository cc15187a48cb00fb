"""Where a run begins: at its folder's latest checkpoint, with weights from elsewhere, or anew."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from squeeze_jax.array_types import PyTree
from squeeze_jax.checkpoints.compatibility import check_same_run
from squeeze_jax.checkpoints.fingerprint import fingerprint
from squeeze_jax.checkpoints.manager import Checkpoints, Saved, check_leaves
from squeeze_jax.checkpoints.trained import (
    load_initial_params,
    start_kind,
    steps_behind,
    with_scale_of,
)
from squeeze_jax.config import Config
from squeeze_jax.data.pipeline import BatchIterator
from squeeze_jax.errors import InputError, first_line
from squeeze_jax.processes import gather
from squeeze_jax.storage import AnyPath, is_remote, spoken_waiting
from squeeze_jax.training.state import (
    Params,
    Split,
    TrainState,
    abstract_state,
    create_params,
    from_saved,
    make_state,
    to_saved,
)


class InitialRun(NamedTuple):
    """What a run begins with."""

    config: Config
    """The run's, with its `training.steps_before`."""
    state: TrainState
    split: Split
    base: str
    """Fingerprint of everything frozen."""
    productive_seconds: float
    """Time that went into the steps so far, in all of the run's processes."""


AWAY = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "UNAUTHENTICATED", "ABORTED")
"""How TensorStore's errors begin, or go on, where a bucket is out of reach and not damaged."""


def restore_or_initialize(
    config: Config,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    checkpoints: Checkpoints,
    data: BatchIterator,
    *,
    start_from: AnyPath | None,
    accept_changes: bool,
    say: Callable[[str], None],
) -> InitialRun:
    """The state that a run begins with, on the mesh; `data` is set to the batch that comes next.

    Raises InputError where a checkpoint or the weights of `start_from` are not this config's.
    """
    params, split = create_params(config, mesh)
    base = fingerprint(split.frozen)
    # 1. The folder's own latest checkpoint: the run goes on.
    wanted = abstract_state(params, optimizer, config, mesh)
    restored = restore_latest(checkpoints, wanted, data, config, base, accept_changes, say)
    if restored is not None:
        state, saved = restored
        say(f"continuing {checkpoints.workdir} from step {int(state.step)}")
        config = _after(saved.config.training.steps_before, config)
        return InitialRun(config, state, split, base, saved.productive_seconds)
    # 2. Weights from elsewhere, with fresh moments; what is drawn goes on where they ended.
    if start_from is not None:
        params = load_params(start_from, params, split, config, mesh, accept_changes, say)
        config = _after(steps_behind(start_from), config)
    # 3. Anew: random weights of the config's seed, beside the pre-trained base that
    #    `create_params` has read.
    data.skip(config.training.steps_before)
    state = make_state(params, optimizer, config, mesh)
    return InitialRun(config, state, split, base, productive_seconds=0.0)


def _after(steps: int | None, config: Config) -> Config:
    """The config of a run whose draws go on after so many steps; None: as it is."""
    if steps is None:
        return config
    return replace(config, training=replace(config.training, steps_before=steps))


def load_params(
    folder: AnyPath,
    params: Params,
    split: Split,
    config: Config,
    mesh: Mesh,
    accept_changes: bool,
    say: Callable[[str], None],
) -> Params:
    """The trained leaves of a folder or file (`checkpoints.trained.load_initial_params`), float32.

    Only a LoRA or a transformer may lack some: those stay as they are in `params`.
    """
    base = fingerprint(with_scale_of(folder, split.frozen))
    loaded = load_initial_params(folder, config, base, mesh, accept_changes=accept_changes)
    fresh = {name: leaf for name, leaf in params.items() if name not in loaded}
    check_leaves(params, loaded if start_kind(folder) == "run" else fresh | loaded, folder)
    say(f"starting from the weights of {folder}: {len(loaded)} arrays, {len(fresh)} begin anew")
    return {name: (fresh | loaded)[name].astype(np.float32) for name in params}


def restore_latest(
    checkpoints: Checkpoints,
    wanted: TrainState,
    data: BatchIterator,
    config: Config,
    base: str,
    accept_changes: bool,
    say: Callable[[str], None],
) -> tuple[TrainState, Saved] | None:
    """The state of the latest checkpoint that can be read, laid out like `wanted`, and what it says
    of the run; `data` is set to its place. None where there never was a checkpoint.

    A damaged checkpoint is set aside, aloud, for the one before it; one that a disk or the devices'
    memory refuses is not. Of several processes each reads its own part, and all go the same way:
    what is damaged for one is set aside for all, what one refuses no one takes. Raises InputError
    where all are damaged, and where the folder is that of another run.
    """
    workdir = checkpoints.workdir
    set_aside: AnyPath | None = None
    while (step := checkpoints.latest()) is not None:
        found, error = None, None
        with spoken_waiting(f"reading the checkpoint of step {step} of {workdir}", say):
            try:
                found = _read(checkpoints, step, wanted, data, config, base, accept_changes)
            except Exception as raised:  # whatever the storage layer makes of missing, short files
                error = _refusal(workdir, step, raised)
            ways = gather(_way(error))
        if REFUSED in ways:
            if error is not None and _way(error) == REFUSED:
                raise error
            raise InputError(
                f"{workdir}: process {ways.index(REFUSED)} cannot take the checkpoint of step "
                f"{step}; it says why"
            )
        if DAMAGED in ways or found is None:
            set_aside = checkpoints.set_aside(step)
            why = first_line(error) if error else f"on process {ways.index(DAMAGED)}"
            say(
                f"warning: the checkpoint of step {step} cannot be read ({why}); "
                f"it now lies in {set_aside}"
            )
            continue
        state, saved, changed = found
        for line in changed:
            say(f"changed: {line}")
        return from_saved(state), saved
    if set_aside is not None:
        raise InputError(
            f"{workdir}: not one checkpoint can be read; they lie in {set_aside.parent}, put one "
            "back to try again, or give another --workdir to begin anew"
        )
    return None


READ, DAMAGED, REFUSED = range(3)
"""What a process makes of a checkpoint."""


def _way(error: Exception | None) -> int:
    if error is None:
        return READ
    # The last of these: devices are full.
    refused = isinstance(error, (InputError, MemoryError, jax.errors.JaxRuntimeError))
    return REFUSED if refused else DAMAGED


def _refusal(workdir: AnyPath, step: int, error: Exception) -> Exception:
    """An InputError in place of an error that says that a disk or a bucket is out of reach; any
    other as it is."""
    away = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
    if _way(error) == REFUSED or not (away or any(reason in str(error) for reason in AWAY)):
        return error
    place = "bucket" if is_remote(workdir) else "disk"
    return InputError(
        f"{workdir}: the checkpoint of step {step} cannot be read now ({first_line(error)}); "
        f"see to the {place} and start again"
    )


def _read(
    checkpoints: Checkpoints,
    step: int,
    wanted: TrainState,
    data: BatchIterator,
    config: Config,
    base: str,
    accept_changes: bool,
) -> tuple[dict[str, PyTree], Saved, list[str]]:
    """A checkpoint's arrays, what it says of the run, and how the config differs; `data` is set to
    its place."""
    workdir = checkpoints.workdir
    saved, place = checkpoints.about(step)
    # Before the arrays: those of another config would look damaged.
    changed = check_same_run(saved.config, config, workdir, accept_changes=accept_changes)
    if saved.base != base:
        raise InputError(
            f"{workdir} was trained on another base (fingerprint {saved.base}, "
            f"this one's is {base}); give the weights that it began with"
        )
    data.set_state(place)
    return checkpoints.restore(step, to_saved(wanted)), saved, changed
