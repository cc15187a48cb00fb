"""Cheaper steps against diffusers' TaylorSeer and against flows whose end is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from squeeze_jax.errors import InputError
from squeeze_jax.sampling import solvers as cheaper_steps
from squeeze_jax.sampling.sampler import make_schedule
from squeeze_jax.sampling.solvers import PLAIN, Cheaper, empty, first_state, foretold, remembered, step

SHAPE = (1, 3, 2)


def drawn(cheaper, velocity, steps, borders=(0,)):
    """x at t = 0 from x = 1 at t = 1, evenly spaced, stages beginning at `borders`; and how often it was evaluated."""
    times, asked = jnp.asarray(make_schedule(steps, 4, 0.9, 0.5, references=False, shifted=False).times), []

    def seen(i, x):
        jax.debug.callback(lambda i: asked.append(int(i)), i)
        return velocity(times[i], x)

    state = first_state(jnp.ones(SHAPE), cheaper)
    take = jax.jit(lambda i, begin, state: step(cheaper, seen, times, i, begin, state))
    for i in range(steps):
        state = take(jnp.int32(i), jnp.int32(max(b for b in borders if b <= i)), state)
    jax.effects_barrier()
    return float(state[0].mean()), asked


def error(cheaper, steps):
    """Of dx/dt = x·cos(3t): x(0) = exp(−sin(3) / 3)."""
    return abs(drawn(cheaper, lambda t, x: x * jnp.cos(3 * t), steps)[0] - np.exp(-np.sin(3) / 3))


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("multistep", 2)])
def test_the_order_of_a_solver(solver, order):
    """Twice as many steps divide the error by 2 to the order; Heun's last step and multistep's first are Euler's."""
    ratio = error(Cheaper(solver=solver), 20) / error(Cheaper(solver=solver), 40)
    assert 2**order * 0.8 < ratio < 2**order * 1.3
    if order == 2:
        assert error(Cheaper(solver=solver), 20) < error(PLAIN, 20) / 3


def test_evaluations():
    field = lambda t, x: x  # noqa: E731
    assert drawn(PLAIN, field, 7)[1] == list(range(7))
    assert len(drawn(Cheaper(solver="heun"), field, 7)[1]) == 13
    assert drawn(Cheaper(solver="multistep"), field, 7)[1] == list(range(7))
    # diffusers' defaults: three steps in any case, then every fifth; a stage begins with an evaluation
    assert drawn(Cheaper(cache_interval=5), field, 13)[1] == [0, 1, 2, 5, 10]
    assert drawn(Cheaper(cache_interval=5), field, 13, borders=(0, 4))[1] == [0, 1, 2, 4, 9]


@pytest.mark.parametrize("order", [0, 1, 2])
def test_expansion_equals_diffusers(order):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: parity tests are skipped")
    from diffusers.hooks.taylorseer_cache import TaylorSeerState

    theirs, rng = TaylorSeerState(torch.float32, order), np.random.default_rng(0)
    memory = empty(jnp.zeros(SHAPE), Cheaper(max_order=order))
    for i in range(12):
        theirs.current_step = i
        if i in (0, 1, 2, 5, 9):
            v = rng.standard_normal(SHAPE).astype(np.float32)
            theirs.update((torch.from_numpy(v),))
            memory = remembered(memory, jnp.asarray(v), jnp.int32(i))
        else:
            np.testing.assert_allclose(foretold(memory, jnp.int32(i)), theirs.predict()[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", [1, 2])
def test_what_is_a_polynomial_is_foretold(order, monkeypatch):
    """Evenly evaluated, a velocity linear in the step is exact at order 1; a stage knows nothing of the one before."""
    exact = drawn(PLAIN, lambda t, x: 0 * x + 3 * t, 12)[0]
    cheaper = Cheaper(cache_interval=3, max_order=order)
    assert drawn(cheaper, lambda t, x: 0 * x + 3 * t, 12)[0] == pytest.approx(exact, abs=1e-6)
    monkeypatch.setattr(cheaper_steps, "EVALUATED", 0)
    known, asked = drawn(Cheaper(cache_interval=4), lambda t, x: 0 * x + t, 8, borders=(0, 4))
    assert asked == [0, 4]
    assert known == pytest.approx(1 - (4 * 1.0 + 4 * 0.5) / 8)  # each stage goes on with its first velocity


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"cache_interval": 0}, "at least 1"), ({"max_order": 3}, "max_order 3"),
        ({"solver": "heun", "cache_interval": 2}, "choose one of them"),
        ({"first_block_threshold": -0.1}, "at least 0"),
        ({"solver": "multistep", "first_block_threshold": 0.1}, "choose one of them"),
    ],
)  # fmt: skip
def test_impossible_ways_are_refused(values, words):
    with pytest.raises(InputError, match=words):
        Cheaper(**values)
