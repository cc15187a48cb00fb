"""A trained system from any folder that has one: a run's, a weights folder, or an exported one."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, Sharding

from squeeze_jax.checkpoints.build import is_trained
from squeeze_jax.checkpoints.compatibility import check_start
from squeeze_jax.checkpoints.fingerprint import fingerprint
from squeeze_jax.checkpoints.inference import build_frozen
from squeeze_jax.checkpoints.manager import (
    check_leaves,
    read_config,
    read_weights,
    saved_base,
    saved_step,
)
from squeeze_jax.config import Config
from squeeze_jax.errors import InputError
from squeeze_jax.interop.exported import (
    is_exported,
    is_merged,
    lora_leaves,
    read_exported,
    transformer_leaves,
)
from squeeze_jax.interop.load import is_transformer
from squeeze_jax.interop.lora_dialects import ROLES
from squeeze_jax.interop.tensors import TensorFolder, read_json
from squeeze_jax.layers.lora import LoRAConfig, LoRAScale
from squeeze_jax.models.system import System
from squeeze_jax.sharding import parameter_spec
from squeeze_jax.storage import AnyPath

StartKind = Literal["run", "lora", "transformer"]
"""What a run can begin with: a folder of ours (a run's, weights, exported), a LoRA, a transformer."""


class Trained(NamedTuple):
    """A system with its trained weights, and the base below them."""

    system: System
    config: Config
    step: int | None
    base: str
    """Fingerprint of everything frozen."""


def load_trained(
    folder: AnyPath,
    change: Callable[[Config], Config] = lambda config: config,
    *,
    merged: bool = True,
    mesh: Mesh | None = None,
) -> Trained:
    """The trained system of a folder. `change` makes the config to build it with of the folder's
    own.

    `merged`: of an exported folder with a LoRA, take the merged transformer where the base is not
    there. With a `mesh` every array is read where the sharding table puts it. Raises InputError
    where the weights are another config's or were trained on another base.
    """
    saved, leaves, step = read_weights(folder, mesh, merged=merged)
    config = change(saved)
    # Who samples brings the encoders along.
    bare = replace(config, data=replace(config.data, online=False))
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
    # Random weights of the seed differ in their last bits with how they were compiled; int8 is
    # another base's rounding; an on-line run's fingerprint covers the encoders that it holds.
    comparable = bool(config.model.dit_weights)
    comparable &= config.model.frozen_dtype == saved.model.frozen_dtype
    comparable &= is_exported(folder) or not saved.data.online
    if comparable and wanted is not None and wanted != base:
        raise other_base(folder, wanted, base, config)
    return Trained(system, config, step, base)


def other_base(folder: AnyPath, wanted: str, found: str, config: Config) -> InputError:
    """What to say where weights meet a base that they were not trained on."""
    return InputError(
        f"{folder} was trained on another base (fingerprint {wanted}) than "
        f"{config.model.dit_weights} ({found}); "
        "set model.dit_weights to the one that it began with"
    )


def load_initial_params(
    start: AnyPath, config: Config, base: str, mesh: Mesh, *, accept_changes: bool = False
) -> dict[str, Any]:
    """Trained leaves that a run begins with, laid out on its mesh: all of them from a run's or
    exported folder, the adapters of a LoRA, or the whole of a transformer. What is not among them
    begins as the config's seed has it.

    Adapters that were trained at another scale (`lora.alpha`) have the ratio in `up`: they do what
    they did. base: fingerprint of what the run leaves as it is, under the adapters' scale of
    `start` (`with_scale_of`). Raises InputError where that is not what the weights began with, and
    where they would compute something else under this config (`compatibility.check_start`).
    """

    def sharding_of(name: str, shape: tuple[int, ...]) -> Sharding:
        return NamedSharding(mesh, parameter_spec(name, shape, mesh))

    kind, fresh = start_kind(start), np.random.default_rng(config.training.seed)
    if kind == "transformer":
        return transformer_leaves(start, config, sharding_of)
    if kind == "lora":
        if config.lora is None:
            raise InputError(
                f"--from {start} is a LoRA, but this config trains the whole transformer; set lora"
            )
        return lora_leaves(start, config, sharding_of, fresh)
    saved, wanted, exported = read_config(start), saved_base(start), is_exported(start)
    learned, asked = (one.model.dit.reference_attention for one in (saved, config))
    if learned != asked and any(stage.references for stage in saved.training.stages):
        raise InputError(
            f"--from {start} has learned {learned} reference attention, this config asks for "
            f"{asked}: set model.dit.reference_attention to {learned}, or begin with weights that "
            "have seen no references"
        )
    check_start(saved, config, start, exported=exported, accept_changes=accept_changes)
    if exported:  # a LoRA file has its scale beside it, which reading it takes into account
        leaves = read_exported(start, config, sharding_of, fresh)
    else:
        leaves = rescale_adapters(read_weights(start, mesh)[1], saved, config)
    same = _arrays_of(saved) == _arrays_of(config)
    same &= saved.model.frozen_dtype == config.model.frozen_dtype
    # On-line, the fingerprint covers the encoders, too.
    online = config.data.online or (saved.data.online and not exported)
    if config.model.dit_weights and same and not online and wanted not in (None, base):
        raise other_base(start, str(wanted), base, config)
    return leaves


def rescale_adapters(leaves: dict[str, Any], saved: Config, config: Config) -> dict[str, Any]:
    """Trained leaves whose adapters compute at the config's scale what they did at the saved one:
    the ratio is multiplied into `up` (exact where it is a power of two, else rounded once)."""
    if saved.lora is None or config.lora is None or _scale(saved.lora) == _scale(config.lora):
        return leaves
    ratio = np.float32(_scale(saved.lora) / _scale(config.lora))

    def rescale(name: str, leaf: Any) -> Any:
        is_up = ".adapter." in name and name.endswith(".up")
        return leaf.astype(np.float32) * ratio if is_up else leaf

    return {name: rescale(name, leaf) for name, leaf in leaves.items()}


def with_scale_of(start: AnyPath, frozen: nnx.State) -> nnx.State:
    """A run's frozen leaves with the adapters' scale that a folder's weights were trained with,
    which is among them: to compare fingerprints. Of what has no config, as they are."""
    saved = read_config(start) if start_kind(start) == "run" else None
    if saved is None or saved.lora is None:
        return frozen
    scale = np.float32(_scale(saved.lora))
    fill = jax.jit(lambda leaf: jnp.full_like(leaf, scale))  # where the leaf lies

    def replaced(variable: nnx.Variable) -> nnx.Variable:
        is_scale = issubclass(getattr(variable, "type", type(variable)), LoRAScale)
        return variable.replace(fill(variable.get_value())) if is_scale else variable

    flat = nnx.to_flat_state(frozen)
    return nnx.from_flat_state([(path, replaced(variable)) for path, variable in flat])


def _scale(lora: LoRAConfig) -> float:
    return (lora.rank if lora.alpha is None else lora.alpha) / lora.rank


def _arrays_of(config: Config) -> LoRAConfig | None:
    """The LoRA's config without what decides no array of the base: its scale and first values."""
    return config.lora and replace(config.lora, alpha=None, init_gain=1.0)


def steps_behind(start: AnyPath) -> int | None:
    """Steps of training behind the weights of a folder, those of the runs that it began with
    included; None of a LoRA or a transformer, which do not say."""
    if start_kind(start) != "run":
        return None
    saved, step = read_config(start), saved_step(start)
    return saved.training.steps_before + (saved.total_steps if step is None else step)


def start_kind(folder: AnyPath) -> StartKind:
    """What `--from` names. Raises InputError for anything else."""
    if not folder.exists():
        raise InputError(f"--from {folder}: no such file or folder")
    if (folder / "config.json").is_file() and "aggregator" in read_json(folder / "config.json"):
        return "run"
    names = TensorFolder(folder).names()
    if any(name.endswith(tuple(f".{role}" for role in ROLES)) for name in names):
        return "lora"
    if is_transformer(folder):
        return "transformer"
    raise InputError(
        f"--from {folder}: neither a run's folder, nor an exported one, a LoRA or a "
        "transformer"
    )
