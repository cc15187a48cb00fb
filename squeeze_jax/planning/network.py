"""Time of collectives: over links between neighbouring chips in a slice, over the hosts' network
between slices."""

import numpy as np
from jax.sharding import Mesh

from squeeze_jax.planning.chips import Chip
from squeeze_jax.planning.collectives import Collective

WRAPPED = {2: 16, 3: 4}
"""Torus axes → extent of which an axis must be a multiple to close into a ring (v5e, v6e: 16;
v4, v5p: 4)."""


def link_rate(mesh: Mesh, axes: tuple[str, ...], chip: Chip) -> float:
    """Returns the bytes/s that a chip can send to its group along those mesh axes.

    `chip.link_rate` is that of all links: two for each torus axis. On an axis that is no ring the
    chip at the end has one link, which limits the others. Chips that differ along no torus axis use
    all links.
    """
    devices = mesh.devices[tuple(slice(None) if axis in axes else 0 for axis in mesh.axis_names)].ravel()
    coordinates = np.array([device.coords for device in devices])
    whole = np.array([device.coords for device in mesh.devices.ravel()])
    extents = [len(np.unique(column)) for column in coordinates.T]
    sizes = [len(np.unique(column)) for column in whole.T]
    closed = min(sizes) >= 4 if chip.torus_axes == 3 else True
    links = 0
    for extent, size in zip(extents, sizes):
        if extent > 1:
            ring = closed and extent == size and size % WRAPPED[chip.torus_axes] == 0
            links += 2 if ring else 1
    return chip.link_rate * (links or 2 * chip.torus_axes) / (2 * chip.torus_axes)


def crosses_slices(mesh: Mesh, axes: tuple[str, ...]) -> bool:
    """Returns whether a group along those axes has chips of several slices."""
    devices = mesh.devices[
        tuple(slice(None) if axis in axes else 0 for axis in mesh.axis_names)
    ].ravel()
    return len({getattr(device, "slice_index", 0) for device in devices}) > 1


def network_seconds(found: list[Collective], mesh: Mesh, chip: Chip) -> tuple[float, float, float]:
    """Returns seconds on links, on the network between slices, and the part during which chips
    wait.

    They wait for a collective unless the compiler made it asynchronous (`…-start`).
    """
    links = network = exposed = 0.0
    for one in found:
        outside = crosses_slices(mesh, one.axes)
        seconds = (
            one.times
            * one.sent
            / (chip.network_rate if outside else link_rate(mesh, one.axes, chip))
        )
        links, network = links + (not outside) * seconds, network + outside * seconds
        exposed += 0.0 if one.hidden else seconds
    return links, network, exposed
