"""Rotary positions against diffusers' FluxPosEmbed, and what makes them relative."""

import jax.numpy as jnp
import numpy as np
import pytest
from parity import relative_error

from squeeze_jax.layers import rope
from squeeze_jax.layers.rope import rotate, rotation

AXES = (4, 8, 12)


def some_tokens(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_equals_diffusers():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: parity tests are skipped")
    flux = pytest.importorskip("diffusers.models.transformers.transformer_flux")
    ids = np.random.default_rng(0).integers(0, 513, (1, 11, 3)).astype(np.int32)
    cos, sin = flux.FluxPosEmbed(theta=10_000, axes_dim=list(AXES))(torch.from_numpy(ids[0].astype(np.float32)))
    ours = rotation(ids, AXES)
    # Phases reach 512 radians, where float32 steps by 3e-5; the two round them at different places.
    for mine, theirs in zip(ours, (cos, sin)):
        np.testing.assert_allclose(mine[0, :, 0], theirs.numpy(), atol=6e-5)
    x = some_tokens(2, 11, 3, 24)
    from diffusers.models.embeddings import apply_rotary_emb

    theirs = apply_rotary_emb(torch.from_numpy(x), (cos, sin), sequence_dim=1)
    assert relative_error(rotate(x, ours), theirs) < 1e-5


def test_neighbouring_positions_stay_apart_in_bfloat16():
    x = np.broadcast_to(some_tokens(1, 1, 1, 24), (1, 2, 1, 24))
    by = rotation(np.array([[[0, 508, 508], [0, 509, 509]]], np.int32), AXES)
    exact = np.asarray(rotate(x, by))
    rounded = rotate(jnp.asarray(x, jnp.bfloat16), by)
    assert rounded.dtype == jnp.bfloat16
    rounded = np.asarray(rounded.astype(jnp.float32))
    step = np.linalg.norm(exact[0, 0] - exact[0, 1])
    assert step > 1.0  # the fastest pair of each axis turns by a radian
    assert np.linalg.norm(rounded[0, 0] - rounded[0, 1]) == pytest.approx(step, rel=1e-2)


def test_only_the_difference_of_positions_matters_to_attention():
    q, k = some_tokens(1, 1, 2, 24), some_tokens(1, 1, 2, 24, seed=1)

    def score(at, other):
        places = [rotation(np.array([[place]], np.int32), AXES) for place in (at, other)]
        return np.asarray(jnp.sum(rotate(q, places[0]) * rotate(k, places[1]), axis=-1))

    np.testing.assert_allclose(score((0, 3, 9), (0, 1, 2)), score((0, 13, 29), (0, 11, 22)), atol=1e-4)
    assert np.abs(score((0, 3, 9), (0, 1, 2)) - score((0, 3, 9), (0, 2, 1))).max() > 1e-2


def test_every_sample_has_positions_of_its_own():
    positions = np.array([[[0, 1, 2], [0, 3, 4]], [[0, 5, 6], [0, 7, 8]]], np.int32)
    x = some_tokens(2, 2, 1, 24)
    together = rotate(x, rotation(positions, AXES))
    for i in range(2):
        np.testing.assert_array_equal(together[i : i + 1], rotate(x[i : i + 1], rotation(positions[i : i + 1], AXES)))
    np.testing.assert_allclose(np.linalg.norm(together, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_product_that_tpus_take_gives_the_same_bits(dtype, monkeypatch):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 7, 3, 16)), dtype)
    by = rotation(jnp.asarray(rng.integers(0, 50, (2, 7, 3))), (4, 4, 8))
    elsewhere = rotate(x, by)
    monkeypatch.setattr(rope, "platform", lambda: "tpu")
    np.testing.assert_array_equal(np.asarray(rotate(x, by), np.float32), np.asarray(elsewhere, np.float32))
