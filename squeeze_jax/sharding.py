"""The mesh's axes, and tables of how matrices, parameters and activations are sharded over them.

Axes: `data` (copies of the model, other examples), `fsdp` (parameters in slices, other examples),
`tensor` (slices of every matrix product). Batches are split over data and fsdp together.
"""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Literal

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from squeeze_jax.array_types import Device, PyTree
from squeeze_jax.errors import InputError

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")
BATCH = PartitionSpec(ROWS)

# Axis of a matrix [in, out] that `tensor` splits → spec of its axes.
TensorAxis = Literal["out", "in", "nothing"]
MATRICES: dict[TensorAxis, PartitionSpec] = {
    "out": PartitionSpec("fsdp", "tensor"),
    "in": PartitionSpec("tensor", "fsdp"),
    "nothing": PartitionSpec("fsdp", None),
}

# Pattern of a parameter's dotted path → spec of its last axes (a stack's leading depth axis is
# never split).
PARAMETERS: tuple[tuple[str, PartitionSpec], ...] = (
    (r".*\.adapter\..*\.down", MATRICES["nothing"]),
    (r".*\.adapter\..*\.up", MATRICES["out"]),
    (r".*(proj|linear2|mlp\.out_layer|to_out|ff_down|aggregator\.out)\.kernel", MATRICES["in"]),
    (r".*\.kernel", MATRICES["out"]),
    (r"(.*\.)?embedding", PartitionSpec(None, "fsdp")),  # [vocabulary, width]
    (r".*", PartitionSpec()),  # norms, biases, pooling weights
)

# Kind of an activation → spec of its axes.
Activation = Literal["tokens", "hidden", "heads"]
ACTIVATIONS: dict[Activation, PartitionSpec] = {
    "tokens": PartitionSpec(
        ROWS, None, None
    ),  # [B, T, C], between blocks: every channel of an example on one chip
    "hidden": PartitionSpec(ROWS, None, "tensor"),  # [B, T, F], inside a feed-forward
    "heads": PartitionSpec(ROWS, None, "tensor", None),  # [B, T, H, D]
}

_as_on: ContextVar[str | None] = ContextVar("platform", default=None)


def use_mesh(mesh: Mesh | None) -> AbstractContextManager[object]:
    """While a program is traced: the mesh that it will run on, for `constrain` and for attention's
    kernels.

    A program enters it itself. `jax.set_mesh` around the calls would do, too, but a caller who
    forgot it would get a program without any constraint, and no error.
    """
    return nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def current_mesh() -> AbstractMesh | None:
    """The mesh of `use_mesh`, as JAX keeps it."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


@contextmanager
def trace_for_platform(platform: str) -> Iterator[None]:
    """Traces as if for another platform: with `cpu`, products stand in the trace where there
    would be opaque kernels.
    """
    token = _as_on.set(platform)
    try:
        yield
    finally:
        _as_on.reset(token)


def platform() -> str:
    """What the program being traced will run on: `tpu`, `gpu` or `cpu`."""
    if (given := _as_on.get()) is not None:
        return given
    mesh = current_mesh()
    return jax.default_backend() if mesh is None else mesh.abstract_device.platform


OPTIONS = {
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
    "xla_tpu_scoped_vmem_limit_kib": "16384",
}
"""Options of the TPU compiler. The first ones gather matrices while other products run, as in
MaxText; without them the chip waits for every gather. The last one is the fast memory that a
kernel may use, at the default of v4 to v5p. The default of v6e is twice that, which doubles the
time to compile and, by the compiler's estimate, gains nothing."""


def compiler_options(mesh: Mesh | None) -> dict[str, bool | str] | None:
    """The compiler's options for programs on this mesh, as `jax.jit` takes them."""
    tpus = mesh is not None and mesh.size > 1 and mesh.devices.flat[0].platform == "tpu"
    return dict(OPTIONS) if tpus else None


def constrain(x: jax.Array, kind: Activation) -> jax.Array:
    """Lays an activation [B, ...] on the current mesh as the table says; without one, `x` itself.

    An axis that the mesh does not divide evenly stays whole.
    """
    mesh = current_mesh()
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, drop_indivisible(ACTIVATIONS[kind], x.shape, mesh))


def all_gather_fsdp(matrix: jax.Array, tensor_axis: TensorAxis) -> jax.Array:
    """Gathers a matrix [in, out] over fsdp for a product on the current mesh; `tensor` splits it
    as the table says.

    The gradient is scattered back into slices. This is never left to the partitioner. With a
    matrix that both fsdp and tensor split, it gave some products the rows of other examples (seen
    in JAX 0.10.2 and 0.12.0 where data > 1 and fsdp = tensor > 1), and it may send activations
    where sending the smaller weights would do.
    """
    mesh = current_mesh()
    if mesh is None or mesh.size == 1:
        return matrix
    sliced = drop_indivisible(MATRICES[tensor_axis], matrix.shape, mesh)
    whole = PartitionSpec(*(None if axis == "fsdp" else axis for axis in sliced))
    return _moved(matrix, whole, sliced)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _moved(x: jax.Array, there: PartitionSpec, back: PartitionSpec) -> jax.Array:
    """`x` in the sharding `there`; its gradient gets the sharding `back`."""
    return jax.lax.with_sharding_constraint(x, there)


_moved.defvjp(
    lambda x, there, back: (_moved(x, there, back), None),
    lambda there, back, _, gradient: (jax.lax.with_sharding_constraint(gradient, back),),
)


def drop_indivisible(
    spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """The spec without the axes that do not divide the shape."""
    return PartitionSpec(
        *(axes if size % _parts(axes, mesh) == 0 else None for axes, size in zip(spec, shape))
    )


def _parts(axes: str | tuple[str, ...] | None, mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts these mesh axes cut a dimension."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(mesh.shape[name] for name in names)


def make_mesh(
    data: int = 1,
    fsdp: int = -1,
    tensor: int = 1,
    *,
    devices: Sequence[Device] | None = None,
    heads: int = 0,
) -> Mesh:
    """A mesh over all devices (`jax.devices()` unless given); one axis may be -1 and takes what
    the others leave.

    Neighbours on the mesh are neighbours on the chips' network, the tensor axis closest. Several
    TPU slices are joined over `data` alone, whose traffic is the least. `tensor` has to divide
    `heads`, the transformer's (0: unknown): otherwise every chip of a group would compute the
    attention of all heads (our decision). Other sizes that an axis does not divide are not split.
    Raises InputError with the nearest meshes that work.
    """
    devices = jax.devices() if devices is None else devices
    sizes = (data, fsdp, tensor)
    wanted = format_mesh(sizes)
    if sum(size == -1 for size in sizes) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise InputError(
            f"a mesh of {wanted}: sizes are at least 1, "
            "and one of them may be -1 (all that is left)"
        )
    known = math.prod(size for size in sizes if size != -1)
    sizes = tuple(max(1, len(devices) // known) if size == -1 else size for size in sizes)
    slices = _slices(devices)
    if (problem := _problem(sizes, len(devices), slices, heads)) is not None:
        near = "; ".join(
            format_mesh(mesh)
            for mesh in nearest_meshes(len(devices), sizes, slices=slices, heads=heads)
        )
        raise InputError(f"a mesh of {wanted} {problem}. The nearest that work: {near or 'none'}")
    return Mesh(arrange_devices(devices, sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def arrange_devices(devices: Sequence[Device], sizes: Sequence[int]) -> np.ndarray:
    """Devices as an array [data, fsdp, tensor], as `make_mesh` describes it."""
    slices = _slices(devices)
    within = (sizes[0] // slices, *sizes[1:])
    # Splitting a physical axis is JAX's last resort, without which 2 x 8 on a torus of 4 x 4 has
    # no answer.
    if slices > 1:
        return mesh_utils.create_hybrid_device_mesh(
            within, (slices, 1, 1), devices=devices, allow_split_physical_axes=True
        )
    return mesh_utils.create_device_mesh(within, devices=devices, allow_split_physical_axes=True)


def _slices(devices: Sequence[Device]) -> int:
    """TPU slices that these devices lie on; other devices count as one."""
    return len(
        {
            getattr(device, "slice_index", None) if device.platform == "tpu" else None
            for device in devices
        }
    )


def nearest_meshes(
    devices: int, wanted: Sequence[int], *, slices: int = 1, heads: int = 0, most: int | None = 3
) -> list[tuple[int, int, int]]:
    """The (data, fsdp, tensor) over so many devices that `make_mesh` takes, nearest first; `most`
    None: all of them.

    The distance is the sum of |log(size / wanted size)| over the axes; of equals, the one with
    the smaller tensor axis comes first, then the one with the smaller data axis (our decision).
    """
    divisors = [size for size in range(1, devices + 1) if devices % size == 0]
    every = ((data, devices // (data * tensor), tensor) for tensor in divisors for data in divisors)
    fitting = [mesh for mesh in every if mesh[1] and _problem(mesh, devices, slices, heads) is None]

    def distance(mesh: tuple[int, int, int]) -> tuple[float, int, int]:
        factors = (abs(math.log(have / size)) for have, size in zip(mesh, wanted))
        return round(sum(factors), 9), mesh[2], mesh[0]

    return sorted(fitting, key=distance)[:most]


def _problem(sizes: Sequence[int], devices: int, slices: int, heads: int) -> str | None:
    """Why a mesh of these sizes cannot be, or None."""
    if math.prod(sizes) != devices:
        return f"needs {math.prod(sizes)} devices, there are {devices}"
    if sizes[0] % slices:
        return f"lies on {slices} slices, so data must be a multiple of {slices}"
    if heads % sizes[2]:
        return f"cuts heads: tensor={sizes[2]} does not divide the transformer's {heads}"
    return None


def format_mesh(sizes: Sequence[int]) -> str:
    """A mesh's sizes for people."""
    return ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes))


def parameter_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The table's row for a parameter; an axis that the mesh does not divide evenly stays whole."""
    spec = next(spec for pattern, spec in PARAMETERS if re.fullmatch(pattern, path))
    if len(spec) > len(shape):
        return PartitionSpec()
    return drop_indivisible(PartitionSpec(*(None,) * (len(shape) - len(spec)), *spec), shape, mesh)


def shardings(leaves: dict[str, PyTree], mesh: Mesh) -> dict[str, NamedSharding]:
    """A sharding for every leaf of a flat dict, by its dotted path."""
    return {
        path: NamedSharding(mesh, parameter_spec(path, leaf.shape, mesh))
        for path, leaf in leaves.items()
    }


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Examples split over data and fsdp."""
    return NamedSharding(mesh, BATCH)
