"""Meshes that fit: all of them, and the nearest to what was asked for."""

import math

import pytest

from squeeze_jax.errors import InputError
from squeeze_jax.planning.meshes import meshes, resolved


@pytest.mark.parametrize(("chips", "slices", "heads"), [(1, 1, 24), (16, 1, 24), (64, 2, 24), (48, 1, None), (12, 4, 2)])
def test_every_mesh_uses_all_chips_and_cuts_nothing_unevenly(chips, slices, heads):
    found = list(meshes(chips, slices, heads))
    assert len(set(found)) == len(found) > 0
    for data, fsdp, tensor in found:
        assert data * fsdp * tensor == chips
        assert data % slices == 0
        assert heads is None or heads % tensor == 0
    everything = [(a, b, c) for a in range(1, chips + 1) for b in range(1, chips + 1) for c in range(1, chips + 1)]
    fit = [m for m in everything if math.prod(m) == chips and m[0] % slices == 0 and not (heads and heads % m[2])]
    assert sorted(found) == sorted(fit)


def test_one_axis_takes_what_the_others_leave():
    assert resolved({"data": 4, "fsdp": -1, "tensor": 2}, 64) == (4, 8, 2)
    assert resolved({"data": -1, "fsdp": 2, "tensor": 1}, 8, slices=2) == (4, 2, 1)


@pytest.mark.parametrize(
    ("sizes", "chips", "slices", "message"),
    [
        ((1, 3, 1), 4, 1, "data=1,fsdp=3,tensor=1 needs 3 chips, there are 4; nearest that fit: data=1,fsdp=4,tensor=1"),
        ((1, -1, 3), 4, 1, "data=1,fsdp=1,tensor=3 needs 3 chips"),
        ((1, 8, 1), 8, 2, "on 2 slices must have a data axis that 2 divides, .*nearest that fit: data=2,fsdp=4,tensor=1"),
        ((1, 1, 16), 16, 1, "cuts 24 heads into 16; nearest that fit: data=1,fsdp=2,tensor=8"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_nearest_that_do(sizes, chips, slices, message):
    with pytest.raises(InputError, match=message) as error:
        resolved(dict(zip(("data", "fsdp", "tensor"), sizes)), chips, slices, heads=24)
    for offered in str(error.value).split("nearest that fit: ")[1].split(" | "):
        shape = dict(part.split("=") for part in offered.split(","))
        assert resolved({axis: int(size) for axis, size in shape.items()}, chips, slices, heads=24)
