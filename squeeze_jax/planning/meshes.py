"""Meshes that fit a number of chips: which there are, and the nearest to one that does not."""

import math
from collections.abc import Iterator

from squeeze_jax.errors import InputError
from squeeze_jax.sharding import AXES


def meshes(chips: int, slices: int = 1, heads: int | None = None) -> Iterator[tuple[int, ...]]:
    """Every (data, fsdp, tensor) of that many chips whose data axis the slices divide, and whose tensor axis the heads."""
    for data in range(1, chips + 1):
        if chips % data or data % slices:
            continue
        rest = chips // data
        for tensor in range(1, rest + 1):
            if rest % tensor == 0 and (heads is None or heads % tensor == 0):
                yield data, rest // tensor, tensor


def resolved(sizes: dict[str, int], chips: int, slices: int = 1, heads: int | None = None) -> tuple[int, ...]:
    """The sizes as (data, fsdp, tensor); one may be -1 and takes what the others leave.

    Raises InputError, which names the nearest that fit, where they need another number of chips, where slices would cut
    another axis than data, and where the tensor axis does not divide the attention's heads.
    """
    shape = [sizes[axis] for axis in AXES]
    if shape.count(-1) == 1:
        shape[shape.index(-1)] = max(1, chips // math.prod(size for size in shape if size != -1))
    fitting = list(meshes(chips, slices, heads))
    if tuple(shape) in fitting:
        return tuple(shape)
    if math.prod(shape) != chips:
        problem = f"needs {math.prod(shape)} chips, there are {chips}"
    elif shape[0] % slices:
        problem = f"on {slices} slices must have a data axis that {slices} divides, for slices hold copies of the model"
    else:
        problem = f"cuts {heads} heads into {shape[2]}"
    near = sorted(fitting, key=lambda other: sum(abs(math.log(max(a, 1) / b)) for a, b in zip(shape, other)))[:3]
    raise InputError(f"a mesh of {written(shape)} {problem}; nearest that fit: {' | '.join(map(written, near))}")


def written(shape: tuple[int, ...] | list[int]) -> str:
    """As `--mesh` takes it."""
    return ",".join(f"{axis}={size}" for axis, size in zip(AXES, shape))
