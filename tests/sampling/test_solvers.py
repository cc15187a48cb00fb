"""Cheaper steps against diffusers' TaylorSeer and against flows whose end is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from squeeze_jax.diffusion.flow import no_shift
from squeeze_jax.errors import InputError
from squeeze_jax.sampling import caching
from squeeze_jax.sampling.caching import TaylorSeer, extrapolate, update_factors
from squeeze_jax.sampling.denoiser import Denoiser
from squeeze_jax.sampling.schedule import make_schedule
from squeeze_jax.sampling.solver_config import DEFAULT_SOLVER, SolverConfig
from squeeze_jax.sampling.solvers import SOLVERS, Step

SHAPE = (1, 3, 2)


class Field(Denoiser):
    """A denoiser whose velocity is a function of time and place."""

    def __init__(self, function, times):
        self.function, self.times, self.evaluated = function, times, []

    def velocity(self, i, x, stage):
        jax.debug.callback(lambda i: self.evaluated.append(int(i)), i)
        return self.function(self.times[i], x)


def drawn(config, velocity, steps, borders=(0,)):
    """x at t = 0 from x = 1 at t = 1, evenly spaced, stages beginning at `borders`; and the steps evaluated."""
    times = jnp.asarray(make_schedule(steps, 4, 0.9, 0.5, references=False, shift=no_shift).times)
    field, x = Field(velocity, times), jnp.ones(SHAPE)

    @jax.jit
    def take(i, start, x, before, cache):
        v, cache = config.cache.velocity(field, i, x, 0, start, cache)
        step = Step(times[jnp.maximum(i - 1, 0)], times[i], times[i + 1], i == start)
        return SOLVERS[config.solver](x, v, before, step), v, cache

    before, cache = jnp.zeros(SHAPE), config.cache.init(x, 0)
    for i in range(steps):
        x, before, cache = take(jnp.int32(i), jnp.int32(max(b for b in borders if b <= i)), x, before, cache)
    jax.effects_barrier()
    return float(x.mean()), field.evaluated


def error(config, steps):
    """Of dx/dt = x·cos(3t): x(0) = exp(−sin(3) / 3)."""
    return abs(drawn(config, lambda t, x: x * jnp.cos(3 * t), steps)[0] - np.exp(-np.sin(3) / 3))


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("multistep", 2)])
def test_the_order_of_a_solver(solver, order):
    """Twice as many steps divide the error by 2 to the order; multistep's first is Euler's."""
    ratio = error(SolverConfig(solver=solver), 20) / error(SolverConfig(solver=solver), 40)
    assert 2**order * 0.8 < ratio < 2**order * 1.3
    if order == 2:
        assert error(SolverConfig(solver=solver), 20) < error(DEFAULT_SOLVER, 20) / 3


def test_evaluations():
    field = lambda t, x: x  # noqa: E731
    assert drawn(DEFAULT_SOLVER, field, 7)[1] == list(range(7))
    assert drawn(SolverConfig(solver="multistep"), field, 7)[1] == list(range(7))
    # diffusers' defaults: three steps in any case, then every fifth; a stage begins with an evaluation
    assert drawn(SolverConfig(cache_interval=5), field, 13)[1] == [0, 1, 2, 5, 10]
    assert drawn(SolverConfig(cache_interval=5), field, 13, borders=(0, 4))[1] == [0, 1, 2, 4, 9]


@pytest.mark.parametrize("order", [0, 1, 2])
def test_expansion_equals_diffusers(order):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: parity tests are skipped")
    from diffusers.hooks.taylorseer_cache import TaylorSeerState

    theirs, rng = TaylorSeerState(torch.float32, order), np.random.default_rng(0)
    state = TaylorSeer(5, order).init(jnp.zeros(SHAPE), 0)
    for i in range(12):
        theirs.current_step = i
        if i in (0, 1, 2, 5, 9):
            v = rng.standard_normal(SHAPE).astype(np.float32)
            theirs.update((torch.from_numpy(v),))
            state = update_factors(state, jnp.asarray(v), jnp.int32(i))
        else:
            np.testing.assert_allclose(extrapolate(state, jnp.int32(i)), theirs.predict()[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", [1, 2])
def test_what_is_a_polynomial_is_extrapolated(order, monkeypatch):
    """Evenly evaluated, a velocity linear in the step is exact at order 1; a stage knows nothing of the one before."""
    exact = drawn(DEFAULT_SOLVER, lambda t, x: 0 * x + 3 * t, 12)[0]
    config = SolverConfig(cache_interval=3, max_order=order)
    assert drawn(config, lambda t, x: 0 * x + 3 * t, 12)[0] == pytest.approx(exact, abs=1e-6)
    monkeypatch.setattr(caching, "ALWAYS_EVALUATED", 0)
    known, asked = drawn(SolverConfig(cache_interval=4), lambda t, x: 0 * x + t, 8, borders=(0, 4))
    assert asked == [0, 4]
    assert known == pytest.approx(1 - (4 * 1.0 + 4 * 0.5) / 8)  # each stage goes on with its first velocity


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"cache_interval": 0}, "at least 1"), ({"max_order": 3}, "max_order 3"),
        ({"first_block_threshold": -0.1}, "at least 0"),
        ({"cache_interval": 2, "first_block_threshold": 0.1}, "choose one of them"),
    ],
)  # fmt: skip
def test_impossible_ways_are_refused(values, words):
    with pytest.raises(InputError, match=words):
        SolverConfig(**values)
