"""Where the inputs of a program lie beside weights on a mesh."""

from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from squeeze_jax.processes import put_global
from squeeze_jax.sharding import batch_sharding

Tree = TypeVar("Tree")


def mesh_of(leaves: Any) -> Mesh | None:
    """The mesh that the weights lie on; None on a single device."""
    where = getattr(jax.tree.leaves(leaves)[0], "sharding", None)
    mesh = where.mesh if isinstance(where, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) and mesh.size > 1 else None


def data_parallel_size(mesh: Mesh | None) -> int:
    """Places of a mesh that hold examples of their own."""
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


def shard_inputs(mesh: Mesh | None, inputs: Tree) -> Tree:
    """Inputs on the mesh: rows split over it where they divide evenly, else everywhere."""
    if mesh is None:
        return inputs
    rows, everywhere = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())

    def where(x: jax.Array | np.ndarray) -> NamedSharding:
        return rows if x.shape[0] % data_parallel_size(mesh) == 0 else everywhere

    return put_global(inputs, jax.tree.map(where, inputs))
