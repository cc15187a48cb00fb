"""Mesh axes, and the tables that say how matrices, parameters and activations lie on them.

Axes: `data` (copies of the model, other examples), `fsdp` (parameters in slices, other examples), `tensor` (slices of
every matrix product). Batches are split over data and fsdp together.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from squeeze_jax.errors import InputError

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")
BATCH = PartitionSpec(ROWS)

# What `tensor` cuts of a matrix [in, out] → spec of its axes.
Cut = Literal["out", "in", "nothing"]
MATRICES: dict[Cut, PartitionSpec] = {
    "out": PartitionSpec("fsdp", "tensor"),
    "in": PartitionSpec("tensor", "fsdp"),
    "nothing": PartitionSpec("fsdp", None),
}

# Pattern of a parameter's dotted path → spec of its last axes (a stack's leading depth axis is never split).
PARAMETERS: tuple[tuple[str, PartitionSpec], ...] = (
    (r".*\.adapter\..*\.down", MATRICES["nothing"]),
    (r".*\.adapter\..*\.up", MATRICES["out"]),
    (r".*(proj|linear2|mlp\.out_layer|to_out|ff_down|aggregator\.out)\.kernel", MATRICES["in"]),
    (r".*\.kernel", MATRICES["out"]),
    (r".*", PartitionSpec()),  # norms, biases, pooling weights
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


def gathered(matrix: jax.Array, cut: Cut) -> jax.Array:
    """A matrix [in, out] as a product wants it on the current mesh: whole over fsdp, cut by tensor as the table says.

    Its gradient goes back in slices. Never left to the partitioner, which with a matrix cut by fsdp and tensor gives
    some products the rows of other examples (seen in JAX 0.10.2 and 0.12.0 where data > 1 and fsdp = tensor > 1), and
    might send activations where weights are smaller.
    """
    mesh = current_mesh()
    if mesh is None or mesh.size == 1:
        return matrix
    sliced = evenly(MATRICES[cut], matrix.shape, mesh)
    whole = PartitionSpec(*(None if axis == "fsdp" else axis for axis in sliced))
    return _moved(matrix, NamedSharding(mesh, whole), NamedSharding(mesh, sliced))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _moved(x: jax.Array, there: NamedSharding, back: NamedSharding) -> jax.Array:
    """`x` laid out anew, and its gradient in a layout of its own."""
    return jax.lax.with_sharding_constraint(x, there)


_moved.defvjp(
    lambda x, there, back: (_moved(x, there, back), None),
    lambda there, back, _, gradient: (jax.lax.with_sharding_constraint(gradient, back),),
)


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
