"""Rates between chips: published ones on closed tori, less where there are fewer links."""

from dataclasses import dataclass

import numpy as np
import pytest
from jax.sharding import Mesh

from squeeze_jax.planning.chips import CHIPS
from squeeze_jax.planning.collectives import Collective
from squeeze_jax.planning.network import crosses_slices, link_rate, network_seconds


@dataclass(frozen=True)
class Device:
    """What is read of a chip."""

    coords: tuple[int, ...]
    slice_index: int
    platform: str = "tpu"
    device_kind: str = "described"
    process_index: int = 0


def mesh(torus, shape, slices=1):
    """Chips at their places, slice after slice, as `shape`."""
    each = [Device(tuple(place), number) for number in range(slices) for place in np.ndindex(*torus)]
    devices = np.empty(len(each), object)
    for i, device in enumerate(each):
        devices[i] = device
    return Mesh(devices.reshape(shape), ("data", "fsdp", "tensor"))


@pytest.mark.parametrize(
    ("chip", "torus", "shape", "share"),
    [
        ("v5p", (4, 4, 4), (1, 64, 1), 1),  # two links on each of three axes: all that is published
        ("v5p", (4, 4, 4), (4, 16, 1), 2 / 3),  # a plane of it
        ("v5p", (4, 4, 4), (16, 4, 1), 1 / 3),
        ("v5p", (2, 2, 1), (1, 4, 1), 2 / 6),  # one neighbour on each of two axes
        ("v5p", (4, 4, 4), (8, 8, 1), 3 / 6),  # a ring, and half an axis
        ("v5e", (4, 4, 1), (1, 16, 1), 2 / 4),  # no ring below 16
        ("v5e", (16, 16, 1), (1, 256, 1), 1),
        ("v5e", (16, 16, 1), (16, 16, 1), 1 / 2),
    ],
)
def test_links_that_lead_to_the_group(chip, torus, shape, share):
    rate = CHIPS[chip].link_rate
    assert link_rate(mesh(torus, shape), ("fsdp",), CHIPS[chip]) == pytest.approx(rate * share)


def test_between_slices_it_is_the_network_and_asynchronous_ones_are_not_waited_for():
    chip, two = CHIPS["v5p"], mesh((2, 2, 1), (2, 4, 1), slices=2)
    assert crosses_slices(two, ("data",))
    assert not crosses_slices(two, ("fsdp",))
    gather = Collective("all-gather", ("fsdp",), sent=10**9, times=3, largest=1)
    reduce = Collective("all-reduce", ("data",), sent=10**9, times=1, largest=1)
    links, network, exposed = network_seconds([gather, reduce], two, chip)
    assert links == pytest.approx(3e9 / (chip.link_rate / 3))
    assert network == pytest.approx(1e9 / chip.network_rate)
    assert exposed == pytest.approx(links + network)
    hidden = gather._replace(hidden=True)
    assert network_seconds([hidden, reduce], two, chip) == pytest.approx((links, network, network))
