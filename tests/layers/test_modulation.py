"""Embeddings of time and guidance, and AdaLN, against diffusers' own modules."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parity import randomise, relative_error
from small_dit import CONFIG, like_twin, random_dit, torch_twin

from squeeze_jax.layers.modulation import AdaLN, add_gated, modulate, sinusoidal

TIMES = np.array([0.001, 0.5, 0.999], np.float32)


def test_sinusoidal_equals_diffusers():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: parity tests are skipped")
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    for values in (TIMES, np.array([1.0, 3.5, 30.0], np.float32)):  # times, and guidance values
        theirs = embeddings.get_timestep_embedding(
            torch.from_numpy(values) * 1000, 256, flip_sin_to_cos=True, downscale_freq_shift=0
        )
        # The two may round a phase differently, by one step of float32: 6e-5 at t = 1, 2e-3 at a guidance of 30.
        step = np.spacing(1000 * values)[:, None]
        assert np.all(np.abs(np.asarray(sinusoidal(values)) - theirs.numpy()) <= step + 1e-7)


def test_times_750_and_752_stay_apart_in_a_bfloat16_model():
    """bfloat16 would round both to 0.75: what modulates the blocks is float32 from the time on."""
    dit = random_dit(dtype=jnp.bfloat16)
    t = np.array([0.750, 0.752], np.float32)
    assert float(jnp.abs(jnp.diff(sinusoidal(t), axis=0)).max()) > 0.5  # two radians on the fastest channel
    vec = dit.embed_timestep(t, np.ones(2, np.float32))
    assert vec.dtype == jnp.float32
    assert float(jnp.abs(jnp.diff(vec, axis=0)).max()) > 1e-2


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_a_bfloat16_model_sees_the_same_embedding_as_a_float32_one(param_dtype):
    """Whatever the activations' dtype, time, guidance, modulation and rotary phases are computed in float32."""
    half = random_dit(dtype=jnp.bfloat16, param_dtype=param_dtype)
    full = random_dit(dtype=jnp.float32, param_dtype=param_dtype)
    guidance = np.full(3, 3.5, np.float32)
    vec = half.embed_timestep(TIMES, guidance)
    assert vec.dtype == jnp.float32
    np.testing.assert_array_equal(vec, full.embed_timestep(TIMES, guidance))
    for one, other in zip(half.final_layer.adaLN_modulation(vec), full.final_layer.adaLN_modulation(vec)):
        assert one.dtype == jnp.float32
        np.testing.assert_array_equal(one, other)
    positions = jnp.asarray([[[0, 508], [0, 509], [2000, 1]]])
    for one, other in zip(half._rope(positions, 1), full._rope(positions, 1)):
        assert one.dtype == jnp.float32
        np.testing.assert_array_equal(one, other)


def test_time_and_guidance_are_scaled_by_1000_once():
    torch, twin = torch_twin()
    dit, _ = like_twin(twin)
    pooled = np.random.default_rng(0).standard_normal((3, CONFIG.pooled_width)).astype(np.float32)
    guidance = np.array([1.0, 2.5, 3.5], np.float32)
    with torch.no_grad():  # the transformer hands 1000·t and 1000·guidance to this module
        theirs = twin.time_text_embed(*(torch.from_numpy(x) for x in (1000 * TIMES, 1000 * guidance, pooled)))
        plain = twin.time_text_embed(*(torch.from_numpy(x) for x in (1000 * TIMES, 1000 * guidance, np.zeros_like(pooled))))
    assert relative_error(dit.embed_timestep(TIMES, guidance, pooled), theirs) < 1e-5
    assert relative_error(dit.embed_timestep(TIMES, guidance), plain) < 1e-5  # no pooled vector: zeros through the embedder


def test_modulated_norm_and_gate_equal_diffusers():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: parity tests are skipped")
    normalization = pytest.importorskip("diffusers.models.normalization")
    theirs = normalization.AdaLayerNormZero(CONFIG.width)
    randomise(theirs)
    modulation = AdaLN(CONFIG.width, 6, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    modulation.lin.kernel.set_value(jnp.asarray(theirs.linear.weight.detach().numpy().T))
    modulation.lin.bias.set_value(jnp.asarray(theirs.linear.bias.detach().numpy()))
    rng = np.random.default_rng(0)
    # An offset and a scale that an epsilon of 1e-5 instead of 1e-6 would show on.
    x = (3 + 3e-3 * rng.standard_normal((2, 4, CONFIG.width))).astype(np.float32)
    vec = jnp.asarray(rng.standard_normal((2, CONFIG.width)), jnp.float32)
    with torch.no_grad():
        y, gate, *_ = theirs(torch.from_numpy(x), emb=torch.tensor(np.asarray(vec)))
    shift, scale, ours_gate, *_ = modulation(vec)
    ours = modulate(x, shift, scale)
    assert relative_error(ours, y) < 1e-4  # subtracting the mean of 3 leaves four digits of x
    assert relative_error(ours_gate[:, 0], gate) < 1e-5
    update = np.asarray(y)
    assert relative_error(add_gated(x, ours_gate, update), x + gate.numpy()[:, None] * update) < 1e-6
