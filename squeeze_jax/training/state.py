"""What changes during training, as one pytree; a system split into trained and frozen leaves."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from squeeze_jax.array_types import Array, Int, PyTree
from squeeze_jax.checkpoints.build import build_system, is_trained, load_base, load_encoders
from squeeze_jax.config import Config
from squeeze_jax.models.system import System
from squeeze_jax.sharding import parameter_spec, shardings
from squeeze_jax.training.optimizer import with_schedule_step

Params = dict[str, Any]
"""Arrays by dotted path, the same names as in checkpoints and in the sharding table."""


class TrainState(NamedTuple):
    """Everything that a step changes; all that a checkpoint holds."""

    step: Int[Array, ""]
    """Steps done, skipped ones included."""
    params: Params
    """Trained parameters, float32."""
    opt_state: optax.OptState
    """The optimizer's state, float32."""
    ema_params: Params
    """Running average of `params`; empty where `optimizer.ema` is 0."""
    skipped: Int[Array, ""]
    """Steps whose loss or gradient was not finite: nothing but the step count moved."""


SAVED_NAMES = {"params": "trained", "opt_state": "moments", "ema_params": "average"}
"""Field of `TrainState` → its name in a checkpoint, where they differ: the format is older than the
fields' names."""


def to_saved(state: TrainState) -> dict[str, PyTree]:
    """The state under the names that checkpoints use."""
    return {SAVED_NAMES.get(name, name): value for name, value in state._asdict().items()}


def from_saved(saved: dict[str, PyTree]) -> TrainState:
    """The inverse of `to_saved`."""
    return TrainState(**{name: saved[SAVED_NAMES.get(name, name)] for name in TrainState._fields})


class Split(NamedTuple):
    """A system in parts: its structure, where each trained leaf goes, and the frozen leaves."""

    graphdef: Any
    slots: dict[str, tuple[tuple[Any, ...], nnx.Variable]]
    """Dotted path → path and (emptied) variable of each trained leaf."""
    frozen: nnx.State

    def merge(self, trained: Params, frozen: nnx.State | None = None) -> System:
        """The system with these trained leaves; under `jit`, pass the frozen ones as an argument,
        too."""
        flat = [
            (path, variable.replace(trained[name])) for name, (path, variable) in self.slots.items()
        ]
        frozen = self.frozen if frozen is None else frozen
        return nnx.merge(self.graphdef, nnx.from_flat_state(flat), frozen)


def split_system(system: System, config: Config) -> tuple[Params, Split]:
    """The trained leaves by dotted path, and the rest."""
    graphdef, trained, frozen = nnx.split(system, is_trained(config), ...)
    flat = {
        ".".join(map(str, path)): (path, variable) for path, variable in nnx.to_flat_state(trained)
    }
    leaves = {name: variable.get_value() for name, (_, variable) in flat.items()}
    empty = {name: (path, variable.replace(None)) for name, (path, variable) in flat.items()}
    return leaves, Split(graphdef, empty, frozen)


def create_params(config: Config, mesh: Mesh) -> tuple[Params, Split]:
    """The trained leaves and the rest of a new run, every array made or read where the sharding
    table puts it.

    No device ever holds a whole that others share, and no process reads more of a pre-trained base
    than its own part.
    """
    # The shapes alone, with their shardings.
    params, split = split_system(
        nnx.eval_shape(lambda: build_system(config, with_base=False)), config
    )
    layout = shardings(params | flatten_params(split.frozen), mesh)
    # What there are files of.
    loaded: Params = {}
    if config.model.dit_weights:
        loaded |= _prefixed("dit", load_base(config, mesh))
    if config.data.online:
        loaded |= _prefixed("encoders", load_encoders(config, mesh))

    # The rest is made on the devices, from the seed.
    def make() -> Params:
        made, rest = split_system(build_system(config, with_base=False), config)
        made = made | flatten_params(rest.frozen)
        return {name: leaf for name, leaf in made.items() if name not in loaded}

    wanted = {name: sharding for name, sharding in layout.items() if name not in loaded}
    leaves = jax.jit(make, out_shardings=wanted)() | loaded
    frozen = replace_params(split.frozen, leaves)
    return {name: leaves[name] for name in params}, split._replace(frozen=frozen)


def _prefixed(part: str, module: nnx.Module) -> Params:
    return {f"{part}.{name}": leaf for name, leaf in flatten_params(nnx.state(module)).items()}


def flatten_params(state: nnx.State) -> Params:
    """The arrays of a state by dotted path."""
    flat = nnx.to_flat_state(state)
    return {".".join(map(str, path)): variable.get_value() for path, variable in flat}


def replace_params(state: nnx.State, leaves: Params) -> nnx.State:
    """The state with these arrays in place of its own; more than it has may be given."""
    return nnx.from_flat_state(
        [
            (path, variable.replace(leaves[".".join(map(str, path))]))
            for path, variable in nnx.to_flat_state(state)
        ]
    )


def make_state(
    params: Params, optimizer: optax.GradientTransformation, config: Config, mesh: Mesh
) -> TrainState:
    """`initial_state` on a mesh: moments are made where they will lie."""
    wanted = abstract_state(params, optimizer, config, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, wanted)
    make = jax.jit(lambda leaves: initial_state(leaves, optimizer, config), out_shardings=shardings)
    return make(params)


def abstract_state(
    params: Params, optimizer: optax.GradientTransformation, config: Config, mesh: Mesh
) -> TrainState:
    """Shapes, dtypes and shardings of a state with these parameters (arrays or their shapes)."""
    state = jax.eval_shape(lambda leaves: initial_state(leaves, optimizer, config), params)

    def with_sharding(leaf: jax.ShapeDtypeStruct, sharding: Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(with_sharding, state, state_shardings(state, mesh))


def initial_state(
    params: Params, optimizer: optax.GradientTransformation, config: Config
) -> TrainState:
    """Step 0. The average begins as a copy, so that donating the state never frees it twice."""
    average = jax.tree.map(jnp.copy, params) if config.optimizer.ema else {}
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, optimizer.init(params), average, jnp.copy(zero))


def begin_stage(
    state: TrainState, optimizer: optax.GradientTransformation, config: Config, mesh: Mesh
) -> TrainState:
    """The state with which a further stage begins, as a run of its own would begin it: from the
    weights that sampling takes (their average where one is kept), with fresh moments and average.

    The steps go on, and with them the learning rate's schedule. `state` is donated. Source:
    docs/decisions.md, "From stage to stage".
    """

    def begin(state: TrainState) -> TrainState:
        fresh = initial_state(state.ema_params or state.params, optimizer, config)
        opt_state = with_schedule_step(fresh.opt_state, state.step)
        return fresh._replace(step=state.step, opt_state=opt_state, skipped=state.skipped)

    shardings = state_shardings(state, mesh)
    return jax.jit(begin, donate_argnums=0, out_shardings=shardings)(state)


def state_shardings(state: TrainState, mesh: Mesh) -> TrainState:
    """A sharding for every leaf: moments and average lie as their parameters do, counters on every
    device."""

    def sharding_of(path: tuple[object, ...], leaf: PyTree) -> NamedSharding:
        name = getattr(path[-1], "key", None)
        named = isinstance(name, str)
        spec = parameter_spec(name, leaf.shape, mesh) if named else PartitionSpec()
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding_of, state)
