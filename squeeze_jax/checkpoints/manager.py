"""Checkpoints of a run (Orbax), and weights folders (safetensors) to sample from.

A work folder, on a disk or in a bucket (`gs://`), holds `config.json` and `checkpoints/STEP/`. On
a disk Orbax renames a step's folder once it is whole; in a bucket, where nothing can be renamed at
once, it writes a commit marker into it last, and a step without one is none. A weights folder holds
`config.json` and `weights.safetensors` with the trained leaves under their dotted paths. Sampling
reads either, and exported folders.
"""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding

from squeeze_jax.array_types import DType
from squeeze_jax.config import Config
from squeeze_jax.config_json import from_json, to_json
from squeeze_jax.errors import InputError, OutputError, first_line
from squeeze_jax.interop.exported import about_of, is_exported, merged_config, read_exported
from squeeze_jax.interop.tensors import TensorFolder, write_tensors
from squeeze_jax.processes import barrier, is_main
from squeeze_jax.sharding import parameter_spec
from squeeze_jax.storage import AnyPath, files_below, is_remote, write_beside

CONFIG, WEIGHTS, CHECKPOINTS = "config.json", "weights.safetensors", "checkpoints"
MARKER = "commit_success.txt"
"""Orbax's: what it writes last into a step in a bucket."""


def _orbax() -> Any:
    """Orbax, imported where it is used: sampling from a weights folder starts faster without it."""
    import orbax.checkpoint

    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells every save in a dozen lines
    return orbax.checkpoint


class Saved(NamedTuple):
    """What a checkpoint says of its run, beside the arrays."""

    config: Config
    base: str
    """Fingerprint of everything frozen (`checkpoints.fingerprint`)."""
    productive_seconds: float
    """Time that went into the steps up to here, in all of the run's lives."""


class Checkpoints:
    """The checkpoints of a work folder. Saves run in the background; an unfinished one is never
    seen by `latest`.

    Every process takes part in every save and restore.
    """

    def __init__(self, workdir: AnyPath, keep: int, keep_every: int = 0) -> None:
        self.workdir = workdir
        (workdir / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        self._ocp, self._folder = _orbax(), _steps_of(workdir)
        self._options = self._ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            keep_period=keep_every or None,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=not is_remote(workdir),
        )
        self._manager = self._open()

    def _open(self) -> Any:
        """Orbax's manager, once what a killed process left unfinished is gone. Orbax itself removes
        that beside its own first look, which in a bucket fails where nothing else is there."""
        if isinstance(self._folder, epath.Path):
            if is_main() and self._folder.exists():
                for path in self._folder.iterdir():
                    # Object storage may list a folder as its own first entry.
                    if path != self._folder and not (path / MARKER).exists():
                        path.rmtree(missing_ok=True)
            barrier("unfinished checkpoints removed")
        try:
            return self._ocp.CheckpointManager(self._folder, options=self._options)
        except (TypeError, ValueError, ArithmeticError, RecursionError) as error:
            # Of a step's own description.
            raise InputError(
                f"{self._folder}: cannot be listed ({first_line(error)}); a step's "
                "_CHECKPOINT_METADATA is damaged, move that step's folder away"
            ) from error

    def latest(self) -> int | None:
        """The newest finished step."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, data: bytes, saved: Saved) -> None:
        """Begins to save; returns when `state`'s buffers may be donated again. Does nothing where
        `step` is saved already.

        Raises OutputError where an earlier save has failed.
        """
        if step == self.latest():
            return
        args = self._ocp.args
        run = {"base": saved.base, "productive_seconds": saved.productive_seconds}
        with self._reported():
            self._try_folder()
            self._manager.save(
                step,
                args=args.Composite(
                    state=args.StandardSave(state),
                    data=args.JsonSave(json.loads(data)),
                    config=args.JsonSave(json.loads(to_json(saved.config))),
                    run=args.JsonSave(run),
                ),
                force=True,
            )

    def _try_folder(self) -> None:
        """Raises OSError where no folder can be made: of Orbax's threads some would wait for
        minutes for one that failed at it."""
        if isinstance(self._folder, Path) and is_main():
            probe = self._folder / ".writable"
            probe.mkdir(exist_ok=True)
            probe.rmdir()

    def restore(self, step: int, like: Any) -> Any:
        """The state in the shapes, dtypes and shardings of `like`."""
        args = self._ocp.args
        with _reader(self._folder) as reader:
            wanted = args.Composite(state=args.StandardRestore(like))
            return reader.restore(step, args=wanted)["state"]

    def about(self, step: int) -> tuple[Saved, bytes]:
        """What a step was saved with, and the data iterator's state."""
        args = self._ocp.args
        names = ("config", "run", "data")
        wanted = args.Composite(**{name: args.JsonRestore() for name in names})
        with _reader(self._folder) as reader:
            restored = reader.restore(step, args=wanted)
        saved = Saved(from_json(json.dumps(restored["config"])), **restored["run"])
        return saved, json.dumps(restored["data"]).encode()

    def set_aside(self, step: int) -> AnyPath:
        """Takes a checkpoint that cannot be read out of the way, so that its step can be saved
        again. In a bucket it is copied, then removed, the marker first: killed in between, there
        is the whole of it or, at the next start, none."""
        folder, number = self._folder.with_name("damaged"), 1
        while (aside := folder / (str(step) if number == 1 else f"{step}-{number}")).exists():
            number += 1
        barrier(f"setting aside {step}")
        if is_main():
            folder.mkdir(exist_ok=True)
            damaged = self._folder / str(step)
            if isinstance(damaged, Path):
                damaged.rename(aside)
            else:
                for file in files_below(damaged):
                    epath.Path(file).copy(aside / file.relative_to(damaged), overwrite=True)
                (damaged / MARKER).unlink(missing_ok=True)
                damaged.rmtree(missing_ok=True)
        barrier(f"set aside {step}")
        self._manager.close()
        self._manager = self._open()
        return aside

    def wait(self) -> None:
        """Until all saves are on disk. Raises OutputError if one failed."""
        with self._reported():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def close(self) -> None:
        """Waits for saves under way. Raises OutputError where one of them fails."""
        with self._reported():
            self._manager.close()

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """A failed write as one sentence."""
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # a failed write arrives as whatever the storage layer raised
            mend = "see to the bucket" if is_remote(self._folder) else "make room"
            raise OutputError(
                f"{self._folder}: a checkpoint could not be written ({first_line(error)}); "
                f"{self._newest_whole()}, {mend} and start again to continue from it"
            ) from error

    def _newest_whole(self) -> str:
        try:
            steps = [
                int(path.name)
                for path in self._folder.iterdir()
                if path.name.isdigit() and (isinstance(path, Path) or (path / MARKER).exists())
            ]
        except OSError:  # the disk is gone
            return "which ones are whole cannot be seen now"
        return f"the newest whole one is step {max(steps)}" if steps else "there is none yet"


def _reader(steps: AnyPath, handlers: Any = None) -> AbstractContextManager[Any]:
    """Orbax's manager for reading alone. It waits for no other process: where a file is damaged,
    one may fail that others read well."""
    ocp, own = _orbax(), jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"reader {own}"
    )
    options = ocp.CheckpointManagerOptions(
        read_only=True, create=False, multiprocessing_options=alone
    )
    return ocp.CheckpointManager(steps, options=options, handler_registry=handlers)


def _steps_of(folder: AnyPath) -> AnyPath:
    """Where a work folder's checkpoints lie, as Orbax wants it."""
    steps = folder / CHECKPOINTS
    return steps.absolute() if isinstance(steps, Path) else steps


def write_config(workdir: AnyPath, config: Config) -> None:
    """The resolved config beside the checkpoints; process 0 writes it."""
    if is_main():
        write_beside(workdir / CONFIG, lambda part: part.write_text(to_json(config) + "\n"))


def read_config(folder: AnyPath) -> Config:
    """The config of a work or weights folder. Raises InputError where there is none, or a damaged
    one."""
    path = folder / CONFIG
    if not path.is_file():
        raise InputError(
            f"{folder}: no {CONFIG} in it; give a folder that train.py or export wrote"
        )
    try:
        return from_json(path.read_text())
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: cannot be read as a config ({error})") from None


def read_weights(
    folder: AnyPath, mesh: Mesh | None = None, *, merged: bool = False
) -> tuple[Config, dict[str, Any], int | None]:
    """Config, trained leaves by dotted path (their running average where there is one), and the
    step if known.

    The leaves are NumPy arrays, or on a mesh arrays that lie as the sharding table says. `merged`:
    see `exported.merged_config`. Raises InputError where the folder holds no finished checkpoint.
    """
    config = read_config(folder)

    def sharding_of(name: str, shape: tuple[int, ...]) -> Sharding:
        if mesh is None:
            return SingleDeviceSharding(jax.local_devices()[0])
        return NamedSharding(mesh, parameter_spec(name, shape, mesh))

    if is_exported(folder):
        config = merged_config(folder, config) if merged else config
        leaves = read_exported(folder, config, None if mesh is None else sharding_of)
        return config, leaves, about_of(folder).get("step")
    if (folder / WEIGHTS).is_file():
        tensors = TensorFolder(folder / WEIGHTS)
        if mesh is None:
            return config, {name: tensors.read(name) for name in tensors.names()}, None
        leaves = {}
        for name in tensors.names():  # each device's slice is read alone
            shape, read = tensors.shape(name), partial(tensors.read, name)
            place = sharding_of(name, shape)
            leaves[name] = jax.make_array_from_callback(
                shape, place, lambda index, read=read: read(index or ())
            )
        return config, leaves, None
    if not (folder / CHECKPOINTS).is_dir():
        raise InputError(
            f"{folder}: neither {WEIGHTS} nor {CHECKPOINTS} in it; train first, or give another "
            "folder"
        )
    with _named_damage(folder):
        leaves, step = _read_newest(folder, sharding_of)
    if mesh is None:
        leaves = {name: np.asarray(leaf) for name, leaf in leaves.items()}
    return config, leaves, step


def _read_newest(
    folder: AnyPath, sharding_of: Callable[[str, tuple[int, ...]], Sharding]
) -> tuple[dict[str, Any], int]:
    """The leaves of a work folder's newest checkpoint that sampling takes, and its step."""
    ocp = _orbax()
    handlers = ocp.handlers.DefaultCheckpointHandlerRegistry([])
    handlers.add("state", ocp.args.PyTreeRestore, ocp.PyTreeCheckpointHandler())
    with _reader(_steps_of(folder), handlers) as manager:
        step = manager.latest_step()
        if step is None:
            raise InputError(
                f"{folder}: no finished checkpoint yet; let the training run reach its first save"
            )
        state = manager.item_metadata(step)["state"]
        wanted = "average" if state["average"] else "trained"
        like = {
            name: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=sharding_of(name, leaf.shape)
            )
            for name, leaf in state[wanted].items()
        }
        places = ocp.checkpoint_utils.construct_restore_args({wanted: like})
        # Partial: the moments stay on disk.
        part = ocp.args.PyTreeRestore({wanted: like}, restore_args=places, partial_restore=True)
        return manager.restore(step, args=ocp.args.Composite(state=part))["state"][wanted], step


@contextmanager
def _named_damage(folder: AnyPath) -> Iterator[None]:
    """What Orbax raises on a damaged checkpoint as one sentence."""
    try:
        yield
    except (InputError, MemoryError, jax.errors.JaxRuntimeError):  # the last: devices are full
        raise
    except Exception as error:  # whatever the storage layer makes of missing and short files
        raise InputError(
            f"{folder / CHECKPOINTS}: the newest checkpoint cannot be read ({first_line(error)}); "
            "put another copy of it there, or start the run again, which sets it aside for the "
            "one before"
        ) from error


def saved_step(folder: AnyPath) -> int | None:
    """The step of the weights that `read_weights` takes from a folder, if it says."""
    if is_exported(folder):
        return about_of(folder).get("step")
    if (folder / WEIGHTS).is_file() or not (folder / CHECKPOINTS).is_dir():
        return None
    with _named_damage(folder), _reader(_steps_of(folder)) as manager:
        return manager.latest_step()


def saved_base(folder: AnyPath) -> str | None:
    """The fingerprint of the base that a folder's weights were trained on, if it says."""
    if is_exported(folder):
        return about_of(folder).get("base")
    if not (folder / CHECKPOINTS).is_dir():
        return None
    ocp = _orbax()
    handlers = ocp.handlers.DefaultCheckpointHandlerRegistry([])
    handlers.add("run", ocp.args.JsonRestore, ocp.JsonCheckpointHandler())
    with _named_damage(folder), _reader(_steps_of(folder), handlers) as manager:
        step = manager.latest_step()
        if step is None:
            return None
        wanted = ocp.args.Composite(run=ocp.args.JsonRestore())
        return manager.restore(step, args=wanted)["run"]["base"]


def write_weights(
    folder: Path, config: Config, leaves: dict[str, Any], dtype: DType = jnp.bfloat16
) -> None:
    """A weights folder to sample from."""
    tensors = {name: np.asarray(jax.device_get(leaf)) for name, leaf in leaves.items()}
    tensors = {name: tensor.astype(np.dtype(dtype)) for name, tensor in tensors.items()}
    write_tensors(folder / WEIGHTS, tensors)
    write_config(folder, config)


def check_leaves(wanted: dict[str, Any], found: dict[str, Any], where: AnyPath) -> None:
    """Raises InputError unless names and shapes are the same."""
    problems = [f"{name} is missing" for name in sorted(wanted.keys() - found.keys())]
    problems += [f"{name} is not of this config" for name in sorted(found.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & found.keys()):
        there, here = tuple(found[name].shape), tuple(wanted[name].shape)
        if there != here:
            problems.append(f"{name} has shape {there}, the config wants {here}")
    if problems:
        raise InputError(
            f"{where}: weights of another config or size: {'; '.join(problems[:6])}"
            + (f"; and {len(problems) - 6} more" if len(problems) > 6 else "")
        )
