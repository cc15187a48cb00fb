"""The staged sampler: leaving tokens out equals masking them, and what is (not) part of a compiled program's key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import randomised, row, tiny_batch, tiny_config

from squeeze_jax.errors import InputError
from squeeze_jax.sampling.sampler import make_sampler, make_schedule, noise_for

CONFIG = tiny_config()
SCALE = np.float32(2.5)


@pytest.fixture(scope="module")
def parts():
    graph, state = nnx.split(randomised(CONFIG))
    one = row(tiny_batch(mixed=False), 0)
    samplers = {
        masked: make_sampler(graph, target_grid=(2, 2), guided=True, guidance=1.0, masked=masked)
        for masked in (False, True)
    }
    return (state,), one, samplers


def schedule(tau1=0.9, tau2=0.5, steps=6, references=True):
    return make_schedule(steps, 4, tau1, tau2, references=references)


def test_tokens_left_out_equal_tokens_masked_in_all_three_stages(parts):
    leaves, one, samplers = parts
    plan = schedule()
    assert all(np.diff([0, *plan.borders]) > 0), "every stage has a step"
    noise = noise_for([0, 1], 4, 64)
    short, long = (samplers[m](leaves, noise, one.hidden_states, one.references, plan, SCALE) for m in (False, True))
    assert np.linalg.norm(short - long) / np.linalg.norm(long) < 1e-5
    assert np.linalg.norm(short - noise) / np.linalg.norm(noise) > 0.1


def test_an_image_does_not_depend_on_its_batch_and_new_numbers_compile_nothing(parts):
    leaves, one, samplers = parts
    sampler = samplers[False]
    both = sampler(leaves, noise_for([0, 1], 4, 64), one.hidden_states, one.references, schedule(), SCALE)
    swapped = sampler(leaves, noise_for([1, 5], 4, 64), one.hidden_states, one.references, schedule(), SCALE)
    np.testing.assert_allclose(both[1], swapped[0], rtol=1e-5, atol=1e-5)
    compiled = sampler._cache_size()
    other = schedule(tau1=0.7, tau2=0.7, steps=9)
    sampler(leaves, noise_for([3, 4], 4, 64), one.hidden_states, one.references, other, np.float32(4.0))
    assert sampler._cache_size() == compiled


def test_noise_comes_from_the_seed_alone():
    np.testing.assert_array_equal(noise_for([7, 8], 4, 64)[1], noise_for([8], 4, 64)[0])
    np.testing.assert_array_equal(noise_for([8], 4, 64)[0], jax.random.normal(jax.random.key(8), (4, 64)))


def test_euler_follows_a_known_field():
    """dx/dt = a has the solution x(0) = x(1) − a, whatever the steps."""
    plan = schedule(steps=13)
    x = jnp.full((1, 4, 64), 3.0)
    for i in range(13):
        x = x + (plan.times[i + 1] - plan.times[i]) * 2.0
    np.testing.assert_allclose(x, 1.0, rtol=1e-5)


@pytest.mark.parametrize("bad", [{"steps": 0}, {"steps": 101}, {"tau1": 0.5, "tau2": 0.9}, {"tau1": 1.5}])
def test_impossible_numbers_are_refused(bad):
    with pytest.raises(InputError, match="must"):
        schedule(**bad)


def test_text_only_keeps_the_mllm_on():
    assert schedule(references=False, steps=10).borders.tolist() == [10, 10, 10]
    assert schedule(tau1=0.0, tau2=0.0, steps=10).borders.tolist() == [10, 10, 10]
    assert schedule(tau1=1.0, tau2=0.0, steps=10).borders.tolist() == [1, 10, 10]
