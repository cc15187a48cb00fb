"""The staged sampler against closed forms and its masked twin."""

import dataclasses
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from naive_sampler import sample_naively
from parity import relative_error
from small_sampling import CACHED, CONFIG, NO_ENCODERS, random_system, some_latents
from tiny import row, tiny_batch

from squeeze_jax.batch import Context
from squeeze_jax.config import StageConfig, TrainingConfig
from squeeze_jax.diffusion.stages import time_steps
from squeeze_jax.models.backbone import Modulation
from squeeze_jax.models.system import System
from squeeze_jax.sampling.pipeline import Pipeline, Settings
from squeeze_jax.sampling.sampler import make_sampler
from squeeze_jax.sampling.schedule import MAX_STEPS, STAGES, make_schedule, noise_for

GRID, TOKENS = (2, 2), 4


# --- closed forms: systems whose velocity is known -------------------------------------------------------------------


class Field(System):
    """A velocity that is a formula of x, t and of which conditions have tokens."""

    def __init__(self, formula) -> None:
        self.formula = formula

    def aggregate(self, states):
        return Context(jnp.ones((states.text.shape[0], 1, 1)), jnp.ones((states.text.shape[0], 1), bool))

    def make_modulation(self, times, guidance=1.0):
        return Modulation((), (), ())

    def prepare_references(self, references, guidance=1.0):
        return references

    def velocity(self, target, target_grid, t, context, references, guidance=1.0, modulation=None):
        return self.formula(target, t[:, None, None], context.tokens.shape[1] > 0, references is not None)


BATCH = row(tiny_batch(mixed=False), 0)


NOISE = noise_for([0, 1], TOKENS, 3)


def sample(formula, schedule, scale=1.0, references=True, guided=(False, False, False)):
    graph, state = nnx.split(Field(formula))
    program = make_sampler(graph, target_grid=GRID, guided=guided, guidance=1.0)
    shown = BATCH.references if references else None
    return program((state,), NOISE, BATCH.hidden_states, shown, schedule, np.broadcast_to(np.float32(scale), 3))


@pytest.mark.parametrize("steps", [1, 7, MAX_STEPS])
def test_euler_on_a_linear_field(steps):
    """v = 2x: every step multiplies x by 1 + 2·(t_next − t)."""
    schedule = make_schedule(steps, TOKENS, 0.9, 0.5, references=True)
    factor = np.prod(1 + 2 * np.diff(time_steps(steps, TOKENS).astype(np.float64)))
    np.testing.assert_allclose(sample(lambda x, t, *_: 2 * x, schedule), NOISE * factor, rtol=1e-4, atol=1e-6)


def test_euler_on_a_field_of_time():
    """v = t: the left Riemann sum of the schedule, so a step uses the time at its start."""
    times = time_steps(9, TOKENS).astype(np.float64)
    schedule = make_schedule(9, TOKENS, 0.9, 0.5, references=True)
    out = sample(lambda x, t, *_: jnp.broadcast_to(t, x.shape), schedule)
    np.testing.assert_allclose(out, NOISE + np.sum(np.diff(times) * times[:-1]), atol=1e-5)


def test_a_straight_flow_lands_on_the_picture_whatever_the_steps():
    """v = (x − x_0) / t is what a perfect model of one picture says."""
    for steps in (1, 3, 25):
        schedule = make_schedule(steps, TOKENS, 0.9, 0.5, references=True)
        np.testing.assert_allclose(sample(lambda x, t, *_: (x - 0.7) / t, schedule), np.full(NOISE.shape, 0.7), atol=1e-5)


@pytest.mark.parametrize(
    ("tau1", "tau2", "references"),
    [
        (0.9, 0.4, True), (0.7, 0.7, True), (1.0, 0.0, True), (0.0, 0.0, True), (1.0, 1.0, True), (0.9, 0.4, False),
        (1.1, 0.0, True), (1.1, 0.5, True), (1.1, 1.1, True), (1.1, 0.0, False),
    ],
)
@pytest.mark.parametrize("guided", [(False, False, False), (True, True, True), (True, False, True)])
def test_each_step_sees_the_conditions_of_its_stage(tau1, tau2, references, guided):
    """A velocity of 1 for the MLLM, 10 for the references and 100 for neither adds up to the stages' lengths."""
    speed = lambda mllm, vae: 1.0 * mllm + 10.0 * vae + 100.0 * (not mllm and not vae)  # noqa: E731
    schedule = make_schedule(8, TOKENS, tau1, tau2, references=references)
    out = sample(lambda x, t, mllm, vae: jnp.full_like(x, speed(mllm, vae)), schedule, 2.5, references, guided)
    expected, times = np.asarray(NOISE, np.float64), time_steps(8, TOKENS)
    for t, t_next in pairwise(times):
        kept = (True, False) if not references or t >= np.float32(tau1) else (bool(t >= np.float32(tau2)), True)
        v = 100.0 + 2.5 * (speed(*kept) - 100.0) if guided[STAGES.index(kept)] else speed(*kept)
        expected = expected + (np.float64(t_next) - np.float64(t)) * v
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


# --- the real system, small ------------------------------------------------------------------------------------------

GUIDED = (True, True, True)


def scales(scale):
    return np.broadcast_to(np.float32(scale), 3)


@pytest.fixture(scope="module", params=["joint", "cached"])
def programs(system, request):
    """Ours, and the naive one: each compiled once for the whole module."""
    if request.param == "cached":
        system = random_system(CACHED)
    graph, state = nnx.split(system)
    batch = tiny_batch(rows=2)
    # The second sample's references are all padding in `tiny_batch` if chance has it so: give both some.
    batch.references.mask[:, :2] = True
    batch.references.tokens[:, :2] = np.random.default_rng(9).standard_normal((2, 2, 64))
    noise = noise_for([0, 1], TOKENS, 64)
    sampler = make_sampler(graph, target_grid=GRID, guided=GUIDED, guidance=1.0)

    def ours(schedule, scale=2.5, batch=batch, noise=noise):
        return sampler((state,), noise, batch.hidden_states, batch.references, schedule, scales(scale))

    @jax.jit
    def naive(state, schedule, scale):
        states, references = jax.tree.map(jnp.asarray, (batch.hidden_states, batch.references))
        return sample_naively(nnx.merge(graph, state), noise, GRID, states, references, schedule, scale)

    return batch, noise, (ours, sampler, state), lambda schedule, scale: naive(state, schedule, scales(scale))


@pytest.mark.parametrize(
    ("tau1", "tau2"),
    [(0.9, 0.4), (0.6, 0.6), (1.0, 0.3), (0.0, 0.0), (1.0, 1.0), (1.1, 0.0), (1.1, 1.1)],
    ids=[
        "three stages", "never both", "both early", "MLLM throughout", "VAE but for the first step",
        "both throughout", "VAE throughout",
    ],
)  # fmt: skip
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_conditions_left_out_equal_conditions_masked(programs, tau1, tau2, scale):
    _, noise, (left_out, *_), naive = programs
    schedule = make_schedule(6, TOKENS, tau1, tau2, references=True)
    short = left_out(schedule, scale)
    assert relative_error(short, naive(schedule, scale)) < 1e-5
    assert relative_error(short, noise) > 0.05


def test_tau_steps_and_guidance_matter_and_compile_nothing(programs):
    _, _, (left_out, sampler, _), _ = programs
    settings = [(6, 0.9, 0.4, 2.5), (6, 0.6, 0.4, 2.5), (6, 0.9, 0.6, 2.5), (9, 0.9, 0.4, 2.5), (6, 0.9, 0.4, 4.0)]
    found = [left_out(make_schedule(n, TOKENS, a, b, references=True), scale) for n, a, b, scale in settings]
    assert sampler.denoise._cache_size() == 1 and sampler.prepare._cache_size() == 1
    for i in range(1, len(found)):
        assert relative_error(found[i], found[0]) > 1e-3, settings[i]


def test_samples_of_a_batch_are_independent(programs):
    batch, noise, (left_out, *_), _ = programs
    schedule = make_schedule(6, TOKENS, 0.9, 0.4, references=True)
    both = left_out(schedule)
    swap = jnp.array([1, 0])
    swapped = left_out(schedule, batch=jax.tree.map(lambda x: x[swap], batch), noise=noise[swap])
    np.testing.assert_allclose(swapped[swap], both, rtol=1e-5, atol=1e-6)
    other = batch._replace(
        hidden_states=batch.hidden_states._replace(text=batch.hidden_states.text * np.float32([1, 2])[:, None, None, None])
    )
    changed = left_out(schedule, batch=other)
    np.testing.assert_allclose(changed[0], both[0], rtol=1e-5, atol=1e-6)
    assert relative_error(changed[1], both[1]) > 1e-3


def test_text_alone_equals_the_mllm_throughout(pipeline, programs):
    """Without references whatever τ is: the same as τ1 = τ2 = 0 with references that are never used."""
    batch, _, (left_out, *_), _ = programs
    mllm = left_out(make_schedule(6, TOKENS, 0.0, 0.0, references=True))
    text = pipeline.sample(batch.hidden_states, [[], []], [0, 1], Settings(cfg_scale=2.5))
    assert relative_error(text, mllm) < 1e-5


def test_a_checkpoint_of_stage_one_samples_without_references(system, pipeline, programs):
    """It has never seen reference tokens: the MLLM stays on throughout, whatever references are given."""
    stage = TrainingConfig(stages=(StageConfig(steps=1, references=False),))
    first = Pipeline.of(system, dataclasses.replace(CONFIG, training=stage), NO_ENCODERS)
    assert not first.uses_references and pipeline.uses_references
    first._programs.update(pipeline._programs)  # spares compiling them again
    states, references = programs[0].hidden_states, some_latents((4, 6))
    given, none = (first.sample(states, latents, [0, 1]) for latents in ([references, references], [[], []]))
    np.testing.assert_array_equal(given, none)
