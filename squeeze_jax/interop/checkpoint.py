"""Checkpoints of a run (Orbax), and weights folders (safetensors) to sample from.

A work folder holds `config.json` and `checkpoints/STEP/`; a weights folder holds `config.json` and
`weights.safetensors` with the trained leaves under their dotted paths. Sampling reads either.
"""

import json
import logging
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from squeeze_jax.config import Config, differences, from_json, to_json
from squeeze_jax.errors import InputError
from squeeze_jax.interop.tensors import TensorFolder, write_beside, write_tensors

CONFIG, WEIGHTS, CHECKPOINTS = "config.json", "weights.safetensors", "checkpoints"
FREE = r"(sampling|checkpoint|log)\..*|training\.(validate|sample)_every|data\.(workers|features)"
"""Fields that a resumed run may change: they decide what is written and shown, not what is learned."""


def _orbax() -> Any:
    """Orbax, imported where it is used: sampling from a weights folder starts faster without it."""
    import orbax.checkpoint

    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells every save in a dozen lines
    return orbax.checkpoint


class Checkpoints:
    """The checkpoints of a work folder. Saves run in the background; an unfinished one is never seen by `latest`."""

    def __init__(self, workdir: Path, keep: int) -> None:
        (workdir / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        self._ocp = ocp = _orbax()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager((workdir / CHECKPOINTS).absolute(), options=options)

    def latest(self) -> int | None:
        """The newest finished step."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, data: bytes, config: Config) -> None:
        """Begins to save; returns when `state`'s buffers may be donated again."""
        self._manager.save(
            step,
            args=self._ocp.args.Composite(
                state=self._ocp.args.StandardSave(state),
                data=self._ocp.args.JsonSave(json.loads(data)),
                config=self._ocp.args.JsonSave(json.loads(to_json(config))),
            ),
        )

    def restore(self, step: int, like: Any) -> tuple[Any, bytes]:
        """The state in the shapes, dtypes and shardings of `like`, and the data iterator's state."""
        args = self._ocp.args
        restored = self._manager.restore(
            step, args=args.Composite(state=args.StandardRestore(like), data=args.JsonRestore())
        )
        return restored["state"], json.dumps(restored["data"]).encode()

    def config(self, step: int) -> Config:
        """The config with which a step was saved."""
        args = self._ocp.args
        restored = self._manager.restore(step, args=args.Composite(config=args.JsonRestore()))
        return from_json(json.dumps(restored["config"]))

    def wait(self) -> None:
        """Until all saves are on disk; raises if one failed."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


def check_same_run(saved: Config, config: Config, workdir: Path) -> None:
    """Raises InputError where a config would not continue the run that a folder holds, and says what differs."""
    changed = [line for line in differences(saved, config) if not re.match(FREE, line)]
    if changed:
        listed = "; ".join(changed[:8]) + (f"; and {len(changed) - 8} more" if len(changed) > 8 else "")
        raise InputError(
            f"{workdir} holds a checkpoint of another config ({listed}); give another --workdir, or the same config"
        )


def write_config(workdir: Path, config: Config) -> None:
    """The resolved config beside the checkpoints."""
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


def read_weights(folder: Path) -> tuple[Config, dict[str, np.ndarray], int | None]:
    """Config, trained leaves by dotted path (their running average where there is one), and the step if known."""
    config = read_config(folder)
    if (folder / WEIGHTS).is_file():
        tensors = TensorFolder(folder / WEIGHTS)
        return config, {name: tensors.read(name) for name in tensors.names()}, None
    if not (folder / CHECKPOINTS).is_dir():
        raise InputError(f"{folder}: neither {WEIGHTS} nor {CHECKPOINTS} in it; train first, or give another folder")
    ocp = _orbax()
    handlers = ocp.handlers.DefaultCheckpointHandlerRegistry([])
    handlers.add("state", ocp.args.StandardRestore, ocp.StandardCheckpointHandler())
    manager = ocp.CheckpointManager((folder / CHECKPOINTS).absolute(), handler_registry=handlers)
    step = manager.latest_step()
    if step is None:
        raise InputError(f"{folder}: no finished checkpoint yet; let the training run reach its first save")
    # Onto one device, however many the run had.
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), manager.item_metadata(step)["state"]
    )
    restored = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(like)))["state"]
    manager.close()
    leaves = restored["average"] or restored["trained"]
    return config, {name: np.asarray(leaf) for name, leaf in leaves.items()}, step


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

