"""Checkpoints of a run (Orbax), and weights folders (safetensors) to sample from.

A work folder holds `config.json` and `checkpoints/STEP/`; a weights folder holds `config.json` and
`weights.safetensors` with the trained leaves under their dotted paths. Sampling reads either, and exported folders.
"""

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding

from squeeze_jax.config import Config
from squeeze_jax.config_json import differences, from_json, to_json
from squeeze_jax.errors import InputError, OutputError
from squeeze_jax.interop.exported import about_of, is_exported, merged_config, read_exported
from squeeze_jax.interop.tensors import TensorFolder, write_beside, write_tensors
from squeeze_jax.processes import barrier, is_main, put_global
from squeeze_jax.sharding import parameter_spec

CONFIG, WEIGHTS, CHECKPOINTS = "config.json", "weights.safetensors", "checkpoints"
FREE = (
    r"(sampling|checkpoint|log|parallel)\..*|training\.(validate|sample)_every"
    r"|data\.(workers|features|batch_per_chip|extract_batch|max_text_tokens)|optimizer\.accumulate"
    r"|model\.(dit_weights|autoencoder|mllm)"
)
"""Fields that a resumed run may change: they decide what is written and shown and where things lie, not what is learned.

The global batch and the records stay what they were: the data iterator refuses others. So do the frozen weights, wherever
they lie: the checkpoint has their fingerprint, and the records have their digests."""
FIXED = r"(model|aggregator|lora)\b.*|optimizer\.(kind|ema)|training\.seed"
"""Fields that no resumed run may change: they decide which arrays there are, of which size and dtype, and which record
comes when."""


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
    """The checkpoints of a work folder. Saves run in the background; an unfinished one is never seen by `latest`.

    Every process takes part in every save and restore.
    """

    def __init__(self, workdir: Path, keep: int, keep_every: int = 0) -> None:
        (workdir / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        self._ocp, self._folder = _orbax(), (workdir / CHECKPOINTS).absolute()
        self._options = self._ocp.CheckpointManagerOptions(
            max_to_keep=keep, keep_period=keep_every or None, enable_async_checkpointing=True, cleanup_tmp_directories=True
        )
        self._manager = self._ocp.CheckpointManager(self._folder, options=self._options)

    def latest(self) -> int | None:
        """The newest finished step."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, data: bytes, saved: Saved) -> None:
        """Begins to save; returns when `state`'s buffers may be donated again. Nothing happens where `step` is saved.

        Raises OutputError where an earlier save has failed.
        """
        if step == self.latest():
            return
        args = self._ocp.args
        run = {"base": saved.base, "productive_seconds": saved.productive_seconds}
        with self._reported():
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

    def restore(self, step: int, like: Any) -> Any:
        """The state in the shapes, dtypes and shardings of `like`."""
        args = self._ocp.args
        return self._manager.restore(step, args=args.Composite(state=args.StandardRestore(like)))["state"]

    def about(self, step: int) -> tuple[Saved, bytes]:
        """What a step was saved with, and the data iterator's state."""
        args = self._ocp.args
        names = ("config", "run", "data")
        restored = self._manager.restore(step, args=args.Composite(**{name: args.JsonRestore() for name in names}))
        saved = Saved(from_json(json.dumps(restored["config"])), **restored["run"])
        return saved, json.dumps(restored["data"]).encode()

    def set_aside(self, step: int) -> Path:
        """Takes a checkpoint that cannot be read out of the way, so that its step can be saved again."""
        folder, number = self._folder.with_name("damaged"), 1
        while (aside := folder / (str(step) if number == 1 else f"{step}-{number}")).exists():
            number += 1
        barrier(f"setting aside {step}")
        if is_main():
            folder.mkdir(exist_ok=True)
            (self._folder / str(step)).rename(aside)
        barrier(f"set aside {step}")
        self._manager.close()
        self._manager = self._ocp.CheckpointManager(self._folder, options=self._options)
        return aside

    def wait(self) -> None:
        """Until all saves are on disk. Raises OutputError if one failed."""
        with self._reported():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def close(self) -> None:
        self._manager.close()

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """A failed write as one sentence."""
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # a failed write arrives as whatever the storage layer raised
            whole = max((int(path.name) for path in self._folder.iterdir() if path.name.isdigit()), default=None)
            left = f"the newest whole one is step {whole}" if whole is not None else "there is none yet"
            raise OutputError(
                f"{self._folder}: a checkpoint could not be written ({first_line(error)}); {left}, "
                "make room and start again to continue from it"
            ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's text; of a long one the beginning and the end, where the cause stands."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 200 else f"{line[:60]} … {line[-130:]}"


def check_same_run(saved: Config, config: Config, workdir: Path, *, accept_changes: bool = False) -> list[str]:
    """What differs between the config that a folder's run was saved with and this one, one line a field.

    Raises InputError where that would not continue the run: always for what is `FIXED`, for the rest unless
    `accept_changes`.
    """
    changed = [line for line in differences(saved, config) if not re.match(FREE, line)]
    fixed = [line for line in changed if re.match(FIXED, line)]
    refused = fixed if accept_changes else changed
    if refused:
        listed = "; ".join(refused[:8]) + (f"; and {len(refused) - 8} more" if len(refused) > 8 else "")
        how = "these decide its arrays or the order of its records: give another --workdir"
        if not fixed:
            how = "give the same config, another --workdir, or --accept-changes to go on with the new one"
        raise InputError(f"{workdir} holds a checkpoint of another config ({listed}); {how}")
    return changed


def write_config(workdir: Path, config: Config) -> None:
    """The resolved config beside the checkpoints; process 0 writes it."""
    if is_main():
        write_beside(workdir / CONFIG, lambda part: part.write_text(to_json(config) + "\n"))


def read_config(folder: Path) -> Config:
    """The config of a work or weights folder."""
    path = folder / CONFIG
    if not path.is_file():
        raise InputError(f"{folder}: no {CONFIG} in it; give a folder that train.py or export wrote")
    try:
        return from_json(path.read_text())
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: cannot be read as a config ({error})") from None


def read_weights(
    folder: Path, mesh: Mesh | None = None, *, merged: bool = False
) -> tuple[Config, dict[str, Any], int | None]:
    """Config, trained leaves by dotted path (their running average where there is one), and the step if known.

    The leaves are NumPy arrays, or on a mesh arrays that lie as the sharding table says. `merged`: see
    `exported.merged_config`.
    """
    config = read_config(folder)

    def where(name: str, shape: tuple[int, ...]) -> Sharding:
        if mesh is None:
            return SingleDeviceSharding(jax.local_devices()[0])
        return NamedSharding(mesh, parameter_spec(name, shape, mesh))

    if is_exported(folder):
        config = merged_config(folder, config) if merged else config
        leaves = read_exported(folder, config, None if mesh is None else where)
        return config, leaves, about_of(folder).get("step")
    if (folder / WEIGHTS).is_file():
        tensors = TensorFolder(folder / WEIGHTS)
        leaves = {name: tensors.read(name) for name in tensors.names()}
        if mesh is not None:
            leaves = {name: put_global(leaf, where(name, leaf.shape)) for name, leaf in leaves.items()}
        return config, leaves, None
    if not (folder / CHECKPOINTS).is_dir():
        raise InputError(f"{folder}: neither {WEIGHTS} nor {CHECKPOINTS} in it; train first, or give another folder")
    ocp = _orbax()
    handlers = ocp.handlers.DefaultCheckpointHandlerRegistry([])
    handlers.add("state", ocp.args.PyTreeRestore, ocp.PyTreeCheckpointHandler())
    with ocp.CheckpointManager((folder / CHECKPOINTS).absolute(), handler_registry=handlers) as manager:
        step = manager.latest_step()
        if step is None:
            raise InputError(f"{folder}: no finished checkpoint yet; let the training run reach its first save")
        state = manager.item_metadata(step)["state"]
        wanted = "average" if state["average"] else "trained"
        like = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where(name, leaf.shape))
            for name, leaf in state[wanted].items()
        }
        places = ocp.checkpoint_utils.construct_restore_args({wanted: like})
        # Partial: the moments stay on disk.
        part = ocp.args.PyTreeRestore({wanted: like}, restore_args=places, partial_restore=True)
        leaves = manager.restore(step, args=ocp.args.Composite(state=part))["state"][wanted]
    if mesh is None:
        leaves = {name: np.asarray(leaf) for name, leaf in leaves.items()}
    return config, leaves, step


def saved_base(folder: Path) -> str | None:
    """The fingerprint of the base that a folder's weights were trained on, if it says."""
    if is_exported(folder):
        return about_of(folder).get("base")
    if not (folder / CHECKPOINTS).is_dir():
        return None
    ocp = _orbax()
    handlers = ocp.handlers.DefaultCheckpointHandlerRegistry([])
    handlers.add("run", ocp.args.JsonRestore, ocp.JsonCheckpointHandler())
    with ocp.CheckpointManager((folder / CHECKPOINTS).absolute(), handler_registry=handlers) as manager:
        step = manager.latest_step()
        if step is None:
            return None
        return manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))["run"]["base"]


def write_weights(folder: Path, config: Config, leaves: dict[str, Any], dtype: Any = jnp.bfloat16) -> None:
    """A weights folder to sample from."""
    write_tensors(folder / WEIGHTS, {k: np.asarray(jax.device_get(v)).astype(np.dtype(dtype)) for k, v in leaves.items()})
    write_config(folder, config)


def check_leaves(wanted: dict[str, Any], found: dict[str, Any], where: Path) -> None:
    """Raises InputError unless names and shapes are the same."""
    problems = [f"{name} is missing" for name in sorted(wanted.keys() - found.keys())]
    problems += [f"{name} is not of this config" for name in sorted(found.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & found.keys()):
        if tuple(wanted[name].shape) != tuple(found[name].shape):
            problems.append(f"{name} has shape {tuple(found[name].shape)}, the config wants {tuple(wanted[name].shape)}")
    if problems:
        raise InputError(
            f"{where}: weights of another config or size: {'; '.join(problems[:6])}"
            + (f"; and {len(problems) - 6} more" if len(problems) > 6 else "")
        )

