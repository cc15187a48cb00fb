"""The path, the schedule and the times, against diffusers' scheduler and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from squeeze_jax.diffusion.flow import (
    add_noise,
    empirical_shift,
    euler_step,
    loss_per_sample,
    no_shift,
    sample_times,
    schedule_shift,
    shift_time,
)
from squeeze_jax.diffusion.stages import time_steps


def pair(batch=3):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((batch, 4, 5)), jnp.float32) for _ in range(2)]


def test_shift_is_linear_in_the_target_tokens():
    assert schedule_shift(256) == pytest.approx(0.5)  # 256 x 256 pixels
    assert schedule_shift(4096) == pytest.approx(1.15)  # 1024 x 1024
    assert schedule_shift(1024) == pytest.approx(0.63)
    assert schedule_shift(16) == pytest.approx(0.5 - 240 * 0.65 / 3840)  # extrapolated below
    assert schedule_shift(16_384) == pytest.approx(1.15 + 12_288 * 0.65 / 3840)  # and above
    assert no_shift(1024, 4) == 0.0  # schnell's


@pytest.mark.parametrize("tokens", [16, 256, 1024, 4096, 9216])
@pytest.mark.parametrize("steps", [1, 4, 25])
def test_schedule_equals_diffusers(tokens, steps):
    pytest.importorskip("torch", reason="PyTorch is not installed: parity tests are skipped")
    diffusers = pytest.importorskip("diffusers")
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    mu = calculate_shift(tokens, 256, 4096, 0.5, 1.15)
    assert schedule_shift(tokens) == pytest.approx(mu)
    sigmas = np.linspace(1.0, 1 / steps, steps)  # what the FLUX pipeline hands over
    dev = diffusers.FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15,
        base_image_seq_len=256, max_image_seq_len=4096,
    )  # fmt: skip
    dev.set_timesteps(sigmas=sigmas, mu=mu)
    np.testing.assert_allclose(time_steps(steps, tokens), dev.sigmas.numpy(), atol=2e-7)
    schnell = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False)
    schnell.set_timesteps(sigmas=sigmas)
    np.testing.assert_allclose(
        time_steps(steps, tokens, no_shift), schnell.sigmas.numpy(), atol=2e-7
    )


@pytest.mark.parametrize("tokens", [16, 256, 1024, 4096, 4300, 4301, 9216])
@pytest.mark.parametrize("steps", [1, 4, 10, 50, 200])
def test_flux2s_schedule_equals_diffusers(tokens, steps):
    pytest.importorskip("torch", reason="PyTorch is not installed: parity tests are skipped")
    diffusers = pytest.importorskip("diffusers")
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    mu = compute_empirical_mu(tokens, steps)
    assert empirical_shift(tokens, steps) == pytest.approx(mu, rel=1e-12)
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)  # as the pipeline does
    ours = shift_time(1 - np.arange(steps + 1) / steps, empirical_shift(tokens, steps))
    np.testing.assert_allclose(ours.astype(np.float32), theirs.sigmas.numpy(), rtol=3e-7, atol=0)


def test_shifted_times_keep_both_ends_and_their_order():
    s = np.linspace(0, 1, 101)
    for mu in (0.0, 0.5, 1.15, 3.0):
        t = shift_time(s, mu)
        assert (t[0], t[-1]) == (0, 1)
        assert (np.diff(t) > 0).all()
        np.testing.assert_allclose(t, 1 - shift_time(1 - s, -mu), atol=1e-12)
        np.testing.assert_allclose(shift_time(t, -mu), s, atol=1e-12)
        # The published form of it.
        np.testing.assert_allclose(t[1:], np.exp(mu) / (np.exp(mu) + 1 / s[1:] - 1), rtol=1e-12)


@pytest.mark.parametrize("mu", [0.5, 1.15])
def test_times_are_drawn_by_the_shift_of_their_distribution(mu):
    """Undoing the shift gives uniform times, or times whose logit is standard normal."""
    count = 20_000
    t = sample_times(jax.random.key(0), count, "shifted_uniform", mu)
    assert t.shape == (count,)
    assert float(t.min()) >= 0 and float(t.max()) <= 1
    s = np.sort(np.asarray(shift_time(t, -mu), np.float64))
    distance = np.abs(s - (np.arange(count) + 0.5) / count).max()  # Kolmogorov and Smirnov's
    assert distance < 1.95 / np.sqrt(count)  # exceeded once in a thousand times
    logit = sample_times(jax.random.key(1), count, "logit_normal", mu)
    assert float(logit.min()) > 0 and float(logit.max()) < 1
    z = np.asarray(jax.scipy.special.logit(logit), np.float64) - mu
    assert abs(z.mean()) < 4 / np.sqrt(count)
    assert abs(z.std() - 1) < 4 / np.sqrt(2 * count)
    assert abs((np.abs(z) < 1).mean() - 0.6827) < 0.015


def test_times_come_from_their_key():
    def draw(seed):
        return np.asarray(sample_times(jax.random.key(seed), 8, "shifted_uniform", 0.5))

    np.testing.assert_array_equal(draw(3), draw(3))
    assert (draw(3) != draw(4)).all()


def test_the_path_runs_straight_from_picture_to_noise():
    clean, noise = pair()
    np.testing.assert_array_equal(add_noise(clean, noise, jnp.zeros(3)), clean)
    np.testing.assert_array_equal(add_noise(clean, noise, jnp.ones(3)), noise)
    t = jnp.array([0.1, 0.5, 0.8])
    _, slope = jax.jvp(lambda t: add_noise(clean, noise, t), (t,), (jnp.ones(3),))
    np.testing.assert_allclose(
        slope, noise - clean, rtol=1e-6
    )  # the velocity that the model learns
    alone = add_noise(clean[1:2], noise[1:2], t[1:2])
    np.testing.assert_array_equal(add_noise(clean, noise, t)[1:2], alone)


def test_a_step_along_the_true_velocity_lands_on_the_path():
    clean, noise = pair()
    x = add_noise(clean, noise, jnp.full(3, 0.8))
    there = euler_step(x, noise - clean, jnp.float32(0.8), jnp.float32(0.3))
    np.testing.assert_allclose(there, add_noise(clean, noise, jnp.full(3, 0.3)), atol=1e-6)
    np.testing.assert_allclose(
        euler_step(x, noise - clean, jnp.float32(0.8), jnp.float32(0.0)), clean, atol=1e-6
    )


def test_loss_is_the_mean_square_of_the_velocitys_error():
    clean, noise = pair()
    np.testing.assert_array_equal(loss_per_sample(noise - clean, clean, noise), np.zeros(3))
    error = jnp.array([0.0, 1.0, -3.0])[:, None, None]
    np.testing.assert_allclose(
        loss_per_sample(noise - clean + error, clean, noise), [0, 1, 9], rtol=1e-5
    )
    rounded = loss_per_sample((noise - clean + error).astype(jnp.bfloat16), clean, noise)
    assert rounded.dtype == jnp.float32
    np.testing.assert_allclose(rounded, [0, 1, 9], atol=2e-2)
