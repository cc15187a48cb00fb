"""Mesh axes, and one table that says how parameters and batches lie on them.

Axes: `data` (copies of the model, other examples), `fsdp` (parameters in slices, other examples), `tensor` (slices of
every matrix product). Batches are split over data and fsdp together.
"""

import re

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from squeeze_jax.errors import InputError

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))

# Pattern of a parameter's dotted path → spec of its last axes (a stack's leading depth axis is never split).
PARAMETERS: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r".*\.adapter\..*\.down", ("fsdp", None)),  # [in, rank]
    (r".*\.adapter\..*\.up", (None, "tensor")),  # [rank, out]
    (r".*(proj|linear2|mlp\.out_layer|to_out|ff_down|aggregator\.out)\.kernel", ("tensor", "fsdp")),  # [in, out]
    (r".*\.kernel", ("fsdp", "tensor")),  # [in, out]
    (r".*", ()),  # norms, biases, pooling weights
)


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
    full = (None,) * (len(shape) - len(spec)) + spec
    return PartitionSpec(*(a if a and size % mesh.shape[a] == 0 else None for a, size in zip(full, shape)))


def shardings(leaves: dict[str, jax.Array], mesh: Mesh) -> dict[str, NamedSharding]:
    """A sharding for every leaf of a flat dict, by its dotted path."""
    return {path: NamedSharding(mesh, parameter_spec(path, leaf.shape, mesh)) for path, leaf in leaves.items()}


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Examples split over data and fsdp."""
    return NamedSharding(mesh, BATCH)
