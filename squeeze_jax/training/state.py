"""What changes during training, as one pytree; and a system apart into trained and frozen leaves."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from squeeze_jax.array_types import Array, Int
from squeeze_jax.checkpoints.build import build_system, is_trained, load_base, load_encoders
from squeeze_jax.config import Config
from squeeze_jax.models.system import System
from squeeze_jax.sharding import parameter_spec, shardings

Leaves = dict[str, Any]
"""Arrays by dotted path, the same names as in checkpoints and in the sharding table."""


class TrainState(NamedTuple):
    """Everything that a step changes; all that a checkpoint holds."""

    step: Int[Array, ""]
    """Steps done, skipped ones included."""
    trained: Leaves
    """float32."""
    moments: optax.OptState
    """The optimizer's state, float32."""
    average: Leaves
    """Running average of `trained`; empty where `optimizer.ema` is 0."""
    skipped: Int[Array, ""]
    """Steps whose loss or gradient was not finite: nothing but the step count moved."""


class Split(NamedTuple):
    """A system apart: its structure, where each trained leaf goes, and the frozen leaves."""

    graph: Any
    slots: dict[str, tuple[tuple[Any, ...], nnx.Variable]]
    """Dotted path → path and (emptied) variable of each trained leaf."""
    frozen: nnx.State

    def merge(self, trained: Leaves, frozen: nnx.State | None = None) -> System:
        """The system with these trained leaves; under `jit`, pass the frozen ones as an argument too."""
        flat = [(path, variable.replace(trained[name])) for name, (path, variable) in self.slots.items()]
        return nnx.merge(self.graph, nnx.from_flat_state(flat), self.frozen if frozen is None else frozen)


def split_system(system: System, config: Config) -> tuple[Leaves, Split]:
    """The trained leaves by dotted path, and the rest."""
    graph, trained, frozen = nnx.split(system, is_trained(config), ...)
    flat = {".".join(map(str, path)): (path, variable) for path, variable in nnx.to_flat_state(trained)}
    leaves = {name: variable.get_value() for name, (_, variable) in flat.items()}
    empty = {name: (path, variable.replace(None)) for name, (path, variable) in flat.items()}
    return leaves, Split(graph, empty, frozen)


def create(config: Config, mesh: Mesh) -> tuple[Leaves, Split]:
    """The trained leaves and the rest of a new run, every array made or read where the sharding table puts it.

    No device ever holds a whole that others share, and no process reads more of a pre-trained base than its own part.
    """
    wanted, split = split_system(nnx.eval_shape(lambda: build_system(config, with_base=False)), config)
    places = shardings(wanted | flat_leaves(split.frozen), mesh)
    read: Leaves = {}
    for part, wants, load in (
        ("dit", config.model.dit_weights, load_base), ("encoders", config.data.online, load_encoders)
    ):  # fmt: skip
        if wants:
            read |= {f"{part}.{name}": leaf for name, leaf in flat_leaves(nnx.state(load(config, mesh))).items()}

    def make() -> Leaves:
        leaves, rest = split_system(build_system(config, with_base=False), config)
        return {name: leaf for name, leaf in (leaves | flat_leaves(rest.frozen)).items() if name not in read}

    made = jax.jit(make, out_shardings={name: place for name, place in places.items() if name not in read})()
    leaves = made | read
    return {name: leaves[name] for name in wanted}, split._replace(frozen=with_leaves(split.frozen, leaves))


def flat_leaves(state: nnx.State) -> Leaves:
    """The arrays of a state by dotted path."""
    return {".".join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(state)}


def with_leaves(state: nnx.State, leaves: Leaves) -> nnx.State:
    """The state with these arrays in place of its own; more than it has may be given."""
    flat = nnx.to_flat_state(state)
    return nnx.from_flat_state([(path, v.replace(leaves[".".join(map(str, path))])) for path, v in flat])


def make_state(trained: Leaves, optimizer: optax.GradientTransformation, config: Config, mesh: Mesh) -> TrainState:
    """`initial_state` on a mesh: moments are made where they will lie."""
    where = state_shardings(jax.eval_shape(lambda leaves: initial_state(leaves, optimizer, config), trained), mesh)
    return jax.jit(lambda leaves: initial_state(leaves, optimizer, config), out_shardings=where)(trained)


def initial_state(trained: Leaves, optimizer: optax.GradientTransformation, config: Config) -> TrainState:
    """Step 0. The average begins as a copy, so that donating the state never frees it twice."""
    average = jax.tree.map(jnp.copy, trained) if config.optimizer.ema else {}
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, trained, optimizer.init(trained), average, jnp.copy(zero))


def state_shardings(state: TrainState, mesh: Mesh) -> TrainState:
    """A sharding for every leaf: moments and average lie as their parameters do, counters everywhere."""

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = getattr(path[-1], "key", None)
        spec = parameter_spec(name, leaf.shape, mesh) if isinstance(name, str) else PartitionSpec()
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(place, state)
