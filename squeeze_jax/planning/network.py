"""How fast the chips of a mesh can talk: links between neighbours within a slice, the hosts' network between slices."""

import numpy as np
from jax.sharding import Mesh

from squeeze_jax.planning.chips import Chip
from squeeze_jax.planning.collectives import Collective

WRAPPED = {2: 16, 3: 4}
"""From what extent on a torus closes into a ring: v5e and v6e (two axes) at 16, v4 and v5p (three) at multiples of 4."""


def link_rate(mesh: Mesh, axes: tuple[str, ...], chip: Chip) -> float:
    """Bytes/s that a chip can send to its group along those mesh axes, over the links that lead there.

    A chip has two links an axis of the torus and `chip.link_rate` is all of them. An axis that does not close into a ring
    has one for the chip at its end, which holds up the others. Chips that differ along no torus axis have all links.
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
    """Whether a group along those axes reaches beyond a slice."""
    devices = mesh.devices[tuple(slice(None) if axis in axes else 0 for axis in mesh.axis_names)].ravel()
    return len({getattr(device, "slice_index", 0) for device in devices}) > 1


def network_seconds(found: list[Collective], mesh: Mesh, chip: Chip) -> tuple[float, float, float]:
    """Seconds over links, over the network between slices, and how much of both nothing is computed beside.

    A collective that the compiler made asynchronous (`…-start`) counts as hidden behind computation; the others as
    waited for.
    """
    links = network = exposed = 0.0
    for one in found:
        outside = crosses_slices(mesh, one.axes)
        seconds = one.times * one.sent / (chip.network_rate if outside else link_rate(mesh, one.axes, chip))
        links, network = links + (not outside) * seconds, network + outside * seconds
        exposed += 0.0 if one.hidden else seconds
    return links, network, exposed
