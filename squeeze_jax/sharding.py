"""Mesh axes, and two tables that say how parameters and activations lie on them.

Axes: `data` (copies of the model, other examples), `fsdp` (parameters in slices, other examples), `tensor` (slices of
every matrix product). Batches are split over data and fsdp together.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from squeeze_jax.errors import InputError

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")
BATCH = PartitionSpec(ROWS)

# Pattern of a parameter's dotted path → spec of its last axes (a stack's leading depth axis is never split).
PARAMETERS: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r".*\.adapter\..*\.down", ("fsdp", None)),  # [in, rank]
    (r".*\.adapter\..*\.up", ("fsdp", "tensor")),  # [rank, out]
    (r".*(proj|linear2|mlp\.out_layer|to_out|ff_down|aggregator\.out)\.kernel", ("tensor", "fsdp")),  # [in, out]
    (r".*\.kernel", ("fsdp", "tensor")),  # [in, out]
    (r".*", ()),  # norms, biases, pooling weights
)

# Kind of an activation → spec of its axes.
Activation = Literal["tokens", "hidden", "heads"]
ACTIVATIONS: dict[Activation, PartitionSpec] = {
    "tokens": PartitionSpec(ROWS, None, None),  # [B, T, C], between blocks: every channel of an example on one chip
    "hidden": PartitionSpec(ROWS, None, "tensor"),  # [B, T, F], inside a feed-forward
    "heads": PartitionSpec(ROWS, None, "tensor", None),  # [B, T, H, D]
}

_current: ContextVar[Mesh | None] = ContextVar("mesh", default=None)


@contextmanager
def on_mesh(mesh: Mesh | None) -> Iterator[None]:
    """While a program is traced: the mesh that it will run on, for `constrain` and for attention's kernels."""
    token = _current.set(mesh)
    try:
        yield
    finally:
        _current.reset(token)


def current_mesh() -> Mesh | None:
    """The mesh of `on_mesh`."""
    return _current.get()


def platform() -> str:
    """What the program being traced will run on: `tpu`, `gpu` or `cpu`."""
    mesh = current_mesh()
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def constrain(x: jax.Array, kind: Activation) -> jax.Array:
    """Lays an activation on the current mesh as the table says; without one, `x` itself.

    An axis that the mesh does not divide evenly stays whole.
    """
    mesh = current_mesh()
    if mesh is None or mesh.size == 1:
        return x
    spec = evenly(ACTIVATIONS[kind], x.shape, mesh)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def evenly(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The spec without the axes that do not divide the shape."""

    def parts(axes: str | tuple[str, ...] | None) -> int:
        names = (axes,) if isinstance(axes, str) else axes or ()
        return int(np.prod([mesh.shape[name] for name in names]))

    return PartitionSpec(*(axes if size % parts(axes) == 0 else None for axes, size in zip(spec, shape)))


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1) -> Mesh:
    """A mesh over all devices; one axis may be -1 and takes what the others leave."""
    devices = jax.devices()
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) == 1:
        known = int(np.prod([size for size in sizes if size != -1]))
        sizes[sizes.index(-1)] = max(1, len(devices) // known)
    if int(np.prod(sizes)) != len(devices):
        shape = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes))
        raise InputError(f"a mesh of {shape} needs {int(np.prod(sizes))} devices, there are {len(devices)}")
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)


def parameter_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The table's row for a parameter; an axis that the mesh does not divide evenly stays whole."""
    spec = next(spec for pattern, spec in PARAMETERS if re.fullmatch(pattern, path))
    if len(spec) > len(shape):
        return PartitionSpec()
    return evenly(PartitionSpec(*(None,) * (len(shape) - len(spec)), *spec), shape, mesh)


def shardings(leaves: dict[str, Any], mesh: Mesh) -> dict[str, NamedSharding]:
    """A sharding for every leaf of a flat dict, by its dotted path."""
    return {path: NamedSharding(mesh, parameter_spec(path, leaf.shape, mesh)) for path, leaf in leaves.items()}


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Examples split over data and fsdp."""
    return NamedSharding(mesh, BATCH)
