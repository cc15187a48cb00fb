"""Which mesh to sample on: one of this process's devices, chosen for the images drawn together."""

import math
from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from squeeze_jax.array_types import Device
from squeeze_jax.sharding import make_mesh


def sampling_mesh(
    heads: int,
    images: int = 1,
    *,
    data: int | None = None,
    fsdp: int | None = None,
    tensor: int | None = None,
    devices: Sequence[Device] | None = None,
) -> Mesh | None:
    """The mesh for weights and images, or None for one device (the default one).

    With no size given it takes all `devices` (default: this process's) as `default_sizes` has it.
    With some given, the others are 1, and `fsdp` is what they leave; sizes that multiply to less
    than there are take the first devices. `heads` are the transformer's, which tensor divides.
    Raises InputError with the nearest meshes that work.
    """
    found = list(jax.local_devices() if devices is None else devices)
    if data is None and fsdp is None and tensor is None:
        sizes = default_sizes(len(found), heads, images)
    else:
        given, rest = (data, fsdp, tensor), (1, -1, 1)
        sizes = tuple(other if size is None else size for size, other in zip(given, rest))
    if min(sizes) >= 1:
        found = found[: math.prod(sizes)]
    if len(found) == 1 and set(sizes) <= {1, -1} and found[0] == jax.local_devices()[0]:
        return None
    return make_mesh(*sizes, devices=found, heads=heads)


def default_sizes(count: int, heads: int, images: int = 1) -> tuple[int, int, int]:
    """Sizes of (data, fsdp, tensor) over `count` devices (our decision).

    As many places for images as there are images, since places send least; the devices of a place
    share its images by heads (tensor). Weights are cut over both. Where the heads do not divide so,
    the fewest places above that.
    """
    places = [
        size for size in range(1, count + 1) if count % size == 0 and heads % (count // size) == 0
    ]
    within = [size for size in places if size <= images]
    fsdp = max(within) if within else min(places)
    return 1, fsdp, count // fsdp
