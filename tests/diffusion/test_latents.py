"""Packing against diffusers, its inverse, and UNO's positions."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from squeeze_jax.diffusion.latents import (
    grid_positions,
    latent_grid,
    pack,
    reference_origins,
    reference_positions,
    timed_reference_positions,
    unpack,
)

# Other work on the machine must not fail a test: no time limits on single examples.
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
SIDES = st.integers(1, 5)


def some_latents(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_pack_equals_diffusers():
    torch = pytest.importorskip("torch")
    flux = pytest.importorskip("diffusers").FluxPipeline
    latents = some_latents(2, 6, 4, 16)
    theirs = flux._pack_latents(torch.tensor(latents).permute(0, 3, 1, 2), 2, 16, 6, 4).numpy()
    np.testing.assert_array_equal(pack(latents), theirs)
    np.testing.assert_array_equal(pack(jnp.asarray(latents)), theirs)


@UNHURRIED
@given(rows=SIDES, columns=SIDES, batch=st.lists(st.integers(1, 3), max_size=2))
def test_unpack_is_the_inverse(rows, columns, batch):
    latents = some_latents(*batch, 2 * rows, 2 * columns, 3)
    tokens = pack(latents)
    assert tokens.shape == (*batch, rows * columns, 12)
    assert latent_grid(latents) == (rows, columns)
    np.testing.assert_array_equal(unpack(tokens, (rows, columns)), latents)


def test_odd_latents_and_a_wrong_grid_are_refused():
    with pytest.raises(ValueError, match="3x4"):
        pack(some_latents(1, 3, 4, 16))
    with pytest.raises(ValueError, match="6 tokens do not fill a grid of 2x2"):
        unpack(some_latents(1, 6, 64), (2, 2))


def test_grid_positions_run_row_by_row():
    assert grid_positions(2, 3, (4, 5)).tolist() == [[4, 5], [4, 6], [4, 7], [5, 5], [5, 6], [5, 7]]


@pytest.mark.parametrize("grids", [[(2, 3)], [(2, 3), (4, 1), (1, 1)]])
def test_timed_references_equal_diffusers(grids):
    torch = pytest.importorskip("torch")
    from diffusers import Flux2KleinPipeline

    latents = [torch.zeros(1, 1, *grid) for grid in grids]
    theirs = Flux2KleinPipeline._prepare_image_ids(latents)[0].numpy()
    assert not theirs[:, 3].any()  # l, the text's axis
    np.testing.assert_array_equal(timed_reference_positions(grids), theirs[:, :3])
    assert timed_reference_positions([]).shape == (0, 3)


def test_references_shift_diagonally_and_add_up():
    assert reference_origins((4, 4), [(2, 3), (1, 1)]) == [(4, 4), (6, 7)]
    assert reference_origins((4, 4), []) == []
    assert reference_positions((4, 4), []).shape == (0, 2)
    assert reference_positions((4, 4), [(1, 2), (1, 1)]).tolist() == [[4, 4], [4, 5], [5, 6]]


@UNHURRIED
@given(st.tuples(SIDES, SIDES), st.lists(st.tuples(SIDES, SIDES), max_size=4))
def test_no_two_pictures_share_a_row_or_a_column(target, references):
    grids = [grid_positions(*target)]
    grids += [grid_positions(*g, o) for g, o in zip(references, reference_origins(target, references), strict=True)]
    for axis in (0, 1):
        used = [set(grid[:, axis].tolist()) for grid in grids]
        assert sum(map(len, used)) == len(set().union(*used))
