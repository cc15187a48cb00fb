"""A trained system from any folder that has one: a run's, a weights folder, or an exported one."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, Sharding

from squeeze_jax.checkpoints.build import is_trained
from squeeze_jax.checkpoints.fingerprint import fingerprint
from squeeze_jax.checkpoints.inference import build_frozen
from squeeze_jax.checkpoints.manager import check_leaves, read_config, read_weights, saved_base
from squeeze_jax.config import Config
from squeeze_jax.errors import InputError
from squeeze_jax.interop.exported import is_exported, is_merged, lora_leaves, read_exported, transformer_leaves
from squeeze_jax.interop.lora import ROLES
from squeeze_jax.interop.tensors import TensorFolder, read_json
from squeeze_jax.models.system import System
from squeeze_jax.sharding import parameter_spec

Start = Literal["run", "lora", "transformer"]
"""What a run can begin with: a folder of ours (a run's, weights, exported), a LoRA, a FLUX.1 transformer."""


class Trained(NamedTuple):
    """A system with its trained weights, and the base below them."""

    system: System
    config: Config
    step: int | None
    base: str
    """Fingerprint of everything frozen."""


def load_trained(
    folder: Path,
    change: Callable[[Config], Config] = lambda config: config,
    *,
    merged: bool = True,
    mesh: Mesh | None = None,
) -> Trained:
    """The trained system of a folder. `change` makes the config to build it with of the folder's own.

    `merged`: of an exported folder with a LoRA, take the merged transformer where the base is not
    there. With a `mesh` every array is read where the sharding table puts it. Raises InputError
    where the weights are another config's or were trained on another base.
    """
    saved, leaves, step = read_weights(folder, mesh, merged=merged)
    config = change(saved)
    bare = replace(config, data=replace(config.data, online=False))  # who samples brings the encoders along
    system = build_frozen(bare, mesh)
    trained = nnx.to_flat_state(nnx.state(system, is_trained(config)))
    variables = {".".join(map(str, path)): variable for path, variable in trained}
    check_leaves(variables, leaves, folder)
    merged = is_merged(folder, config)
    for name, variable in variables.items():
        value = leaves.pop(name)  # so that no leaf is held twice for long
        kept = value.dtype if merged else variable.dtype
        if mesh is None:  # compiles nothing
            value = jax.device_put(np.asarray(value).astype(kept, copy=False))
        variable.set_value(value if value.dtype == kept else value.astype(kept))
    nnx.update(system, nnx.from_flat_state(trained))
    _, _, frozen = nnx.split(system, is_trained(config), ...)
    base = fingerprint(frozen)
    wanted = saved_base(folder)
    # Random weights of the seed differ in their last bits with how they were compiled; int8 is another base's rounding.
    comparable = bool(config.model.dit_weights) and config.model.frozen_dtype == saved.model.frozen_dtype
    comparable &= is_exported(folder) or not saved.data.online  # a run's covers the encoders that it holds
    if comparable and wanted is not None and wanted != base:
        raise other_base(folder, wanted, base, config)
    return Trained(system, config, step, base)


def other_base(folder: Path, wanted: str, found: str, config: Config) -> InputError:
    """What to say where weights meet a base that they were not trained on."""
    return InputError(
        f"{folder} was trained on another base (fingerprint {wanted}) than {config.model.dit_weights} ({found}); "
        "set model.dit_weights to the one that it began with"
    )


def starting_leaves(start: Path, config: Config, base: str, mesh: Mesh) -> dict[str, Any]:
    """Trained leaves that a run begins with, laid out on its mesh: all of them from a run's or exported folder, the
    adapters of a LoRA, or the whole of a transformer. What is not among them begins as the config's seed has it.

    base: fingerprint of what the run leaves as it is. Raises InputError where that is not what the weights began with.
    """

    def place(name: str, shape: tuple[int, ...]) -> Sharding:
        return NamedSharding(mesh, parameter_spec(name, shape, mesh))

    kind, fresh = start_of(start), np.random.default_rng(config.training.seed)
    if kind == "transformer":
        return transformer_leaves(start, config, place)
    if kind == "lora":
        if config.lora is None:
            raise InputError(f"--from {start} is a LoRA, but this config trains the whole transformer; set lora")
        return lora_leaves(start, config, place, fresh)
    saved, wanted = read_config(start), saved_base(start)
    ways = [one.model.dit.reference_attention for one in (saved, config)]
    if ways[0] != ways[1] and any(stage.references for stage in saved.training.stages):
        raise InputError(
            f"--from {start} has learned {ways[0]} reference attention, this config asks for {ways[1]}: "
            f"set model.dit.reference_attention to {ways[0]}, or begin with weights that have seen no references"
        )
    leaves = read_exported(start, config, place, fresh) if is_exported(start) else read_weights(start, mesh)[1]
    same = (saved.lora, saved.model.frozen_dtype) == (config.lora, config.model.frozen_dtype)
    encoders = config.data.online or (saved.data.online and not is_exported(start))  # these are covered, too
    if config.model.dit_weights and same and not encoders and wanted not in (None, base):
        raise other_base(start, str(wanted), base, config)
    return leaves


def start_of(folder: Path) -> Start:
    """What `--from` names. Raises InputError for anything else."""
    if not folder.exists():
        raise InputError(f"--from {folder}: no such file or folder")
    if (folder / "config.json").is_file() and "aggregator" in read_json(folder / "config.json"):
        return "run"
    names = TensorFolder(folder).names()
    if any(name.endswith(tuple(f".{role}" for role in ROLES)) for name in names):
        return "lora"
    if any("x_embedder." in name or "img_in." in name for name in names):
        return "transformer"
    raise InputError(f"--from {folder}: neither a run's folder, nor an exported one, a LoRA or a FLUX.1 transformer")
