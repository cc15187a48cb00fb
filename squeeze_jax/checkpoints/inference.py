"""A trained system as sampling keeps it: adapters merged, matrices in their products' type.

Loading a checkpoint and planning for one go through the same functions here, so that what a plan
says of memory is what a pipeline keeps.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.core as jax_core
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from squeeze_jax.array_types import DType, PyTree
from squeeze_jax.checkpoints.build import build_system, is_trained, load_base
from squeeze_jax.config import Config
from squeeze_jax.errors import InputError
from squeeze_jax.layers.lora import linears
from squeeze_jax.models.system import System
from squeeze_jax.sharding import shardings

LowRankArrays = tuple[jax.Array, jax.Array, jax.Array]
"""Down, up and scale of one part of an adapter."""


def convert_for_sampling(system: System, config: Config, *, merge_lora: bool = True) -> System:
    """Converts a system in place to what sampling keeps of it, and returns it.

    With `merge_lora` adapters become part of their kernels (`merge_adapters`), except on an int8
    base, which cannot take a delta. Every linear layer's matrices are then kept in the type that
    the layer multiplies in, to which each call would round them anyway: under `model.dtype`
    bfloat16 the aggregator and what is left of adapters take half of float32's memory. Norms,
    modulation and the layers that compute in float32 stay as they are.

    Source: docs/decisions.md, "Weights while sampling".
    """
    if merge_lora and config.model.frozen_dtype != "int8":
        merge_adapters(system)
    for _, linear in linears(system):
        leaves = [linear.bias] if linear.kernel_scale is not None else [linear.kernel, linear.bias]
        for part in () if linear.adapter is None else linear.adapter.parts:
            leaves += [part.down, part.up]
        for leaf in leaves:
            if leaf is not None and leaf.dtype.itemsize > linear.dtype.itemsize:
                leaf.set_value(leaf[...].astype(linear.dtype))
    return system


def sampling_shapes(config: Config, *, merge_lora: bool = True) -> tuple[nnx.GraphDef, nnx.State]:
    """Structure and shapes of the system that sampling keeps for a config; no weights are read."""
    bare = replace(config, data=replace(config.data, online=False))

    def make() -> System:
        system = build_system(bare, with_base=False)
        return convert_for_sampling(system, bare, merge_lora=merge_lora)

    return nnx.split(nnx.eval_shape(make))


def build_frozen(config: Config, mesh: Mesh | None = None) -> System:
    """Builds the system of a config to put trained weights into.

    Everything frozen is read, or made where it has no file, on `mesh` where the sharding table puts
    it. Trained leaves are shapes alone; where a random base is made on one device they are values
    that nobody needs.
    """
    if mesh is None and config.lora is not None and config.model.dit_weights is None:
        return build_system(config)  # in a program the base's last bits would be others
    system = nnx.eval_shape(lambda: build_system(config, with_base=False))
    if config.lora is None:  # trained whole: nothing is frozen
        return system

    def frozen_leaves(system: System) -> dict[str, tuple[PyTree, nnx.Variable]]:
        _, _, frozen = nnx.split(system, is_trained(config), ...)
        flat = nnx.to_flat_state(frozen)
        return {".".join(map(str, path)): (path, variable) for path, variable in flat}

    found: dict[str, jax.Array] = {}
    if config.model.dit_weights is not None:
        base = nnx.to_flat_state(nnx.state(load_base(config, mesh)))
        found = {".".join(["dit", *map(str, path)]): leaf.get_value() for path, leaf in base}
    slots = frozen_leaves(system)
    rest = {name: leaf.get_value() for name, (_, leaf) in slots.items() if name not in found}

    def make() -> dict[str, jax.Array]:
        made = frozen_leaves(build_system(config, with_base=False))
        return {name: made[name][1].get_value() for name in rest}

    found |= jax.jit(make, out_shardings=None if mesh is None else shardings(rest, mesh))()
    nnx.update(
        system,
        nnx.from_flat_state([(path, leaf.replace(found[k])) for k, (path, leaf) in slots.items()]),
    )
    return system


def merge_adapters(model: nnx.Module) -> None:
    """Adds every adapter to its kernel and takes it off; the old kernels are freed.

    The sum is computed in float32 and rounded once, to the type that the layer computes in. Of a
    stack one layer at a time is in float32, and on a mesh each device computes its own slice.
    Raises InputError for an int8 base, before anything is merged.
    """
    adapted = [(path, linear) for path, linear in linears(model) if linear.adapter is not None]
    if coarse := [path for path, linear in adapted if linear.kernel_scale is not None]:
        raise InputError(
            f"{coarse[0]} is kept in int8, which cannot be merged into; "
            "set model.frozen_dtype bfloat16"
        )
    for _, linear in adapted:
        kernel, parts = linear.kernel[...], linear.adapter.parts
        arrays = [(part.down[...], part.up[...], part.scale[...]) for part in parts]
        starts = tuple(part.start for part in parts)
        linear.kernel.set_value(_merged(kernel, arrays, starts, linear.dtype))
        linear.adapter = nnx.data(None)


def _merged(
    kernel: jax.Array, parts: Sequence[LowRankArrays], starts: tuple[int, ...], dtype: DType
) -> jax.Array:
    """A kernel [depth, in, out] (or [in, out]) with its adapter's parts, laid out as it was."""
    place = None if isinstance(kernel, jax_core.Tracer) else kernel.sharding
    mesh_place = place if isinstance(place, NamedSharding) and place.mesh.size > 1 else None
    merge: Any = jax.jit(
        partial(_add_layers, starts=starts, dtype=jnp.dtype(dtype), place=mesh_place),
        out_shardings=mesh_place,
        donate_argnums=(0,) if kernel.dtype == dtype else (),
    )
    return jax.block_until_ready(merge(kernel, list(parts)))


def _add_layers(
    kernel: jax.Array,
    parts: list[LowRankArrays],
    *,
    starts: tuple[int, ...],
    dtype: jnp.dtype,
    place: NamedSharding | None,
) -> jax.Array:
    """The program of `_merged`: a loop over layers that writes into the donated kernel."""
    if kernel.ndim == 2:
        added = _add(kernel, parts, starts, place)
        return added.astype(dtype)

    def add_layer(layer: jax.Array, merged: jax.Array) -> jax.Array:
        source = merged if merged.dtype == kernel.dtype else kernel
        take = partial(jax.lax.dynamic_index_in_dim, index=layer, keepdims=False)
        added = _add(take(source), jax.tree.map(take, parts), starts, place).astype(dtype)
        return jax.lax.dynamic_update_index_in_dim(merged, added, layer, 0)

    return jax.lax.fori_loop(0, kernel.shape[0], add_layer, kernel.astype(dtype))


def _add(
    kernel: jax.Array,
    parts: Sequence[LowRankArrays],
    starts: tuple[int, ...],
    place: NamedSharding | None,
) -> jax.Array:
    """One layer's kernel [in, out] plus scale · down · up of each part, in float32."""

    def lay(x: jax.Array, rows: object, columns: object) -> jax.Array:
        if place is None:
            return x
        there = NamedSharding(place.mesh, PartitionSpec(rows, columns))
        return jax.lax.with_sharding_constraint(x, there)

    rows, columns = (None, None) if place is None else tuple(place.spec)[-2:]
    total = kernel.astype(jnp.float32)
    for (down, up, scale), start in zip(parts, starts, strict=True):
        after = kernel.shape[-1] - start - up.shape[-1]
        # The rank is whole on every device: no product is summed between devices.
        down = lay(down.astype(jnp.float32), rows, None)
        up = lay(jnp.pad(up.astype(jnp.float32), ((0, 0), (start, after))), None, columns)
        # Accelerators multiply float32 in bfloat16 by default, which a merge would keep for ever.
        delta = jnp.matmul(down, up, precision=jax.lax.Precision.HIGHEST)
        total = lay(total + delta * scale.astype(jnp.float32), rows, columns)
    return total
