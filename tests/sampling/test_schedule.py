"""Schedules, noise and padded references, from their rules alone."""

import numpy as np
import pytest
from small_sampling import some_latents

from squeeze_jax.diffusion.flow import no_shift, schedule_shift
from squeeze_jax.diffusion.latents import pack, reference_positions
from squeeze_jax.diffusion.stages import plan_stages, time_steps
from squeeze_jax.errors import InputError
from squeeze_jax.sampling.batching import REFERENCE_BUCKET, pad_references
from squeeze_jax.sampling.schedule import MAX_STEPS, make_schedule, noise_for

GRID, TOKENS = (2, 2), 4


def test_noise_comes_from_the_seed_alone():
    noise = noise_for([3, 4], TOKENS, 64)
    np.testing.assert_array_equal(noise_for([9, 4, 3], TOKENS, 64)[1:], noise[::-1])
    assert abs(float(noise_for(list(range(50)), 16, 64).std()) - 1) < 0.01


def test_the_schedule_is_padded_and_ends_where_its_stages_end():
    schedule = make_schedule(25, 1024, 0.95, 0.85, references=True)
    assert schedule.times.shape == (MAX_STEPS + 1,)
    np.testing.assert_array_equal(schedule.times[:26], time_steps(25, 1024))
    assert not schedule.times[25:].any()
    assert schedule.borders.tolist() == [stage.steps[1] for stage in plan_stages(time_steps(25, 1024), 0.95, 0.85)]
    assert make_schedule(25, 1024, 0.95, 0.85, references=False).borders.tolist() == [25, 25, 25]
    assert make_schedule(10, TOKENS, 0.5, 0.5, references=True, shift=no_shift).borders.tolist() == [6, 6, 10]
    assert schedule_shift(TOKENS) < schedule_shift(1024)


@pytest.mark.parametrize(
    ("steps", "tau1", "tau2", "message"),
    [
        (0, 0.9, 0.5, "steps is 0"), (MAX_STEPS + 1, 0.9, 0.5, "steps is 101"), (4, 0.5, 0.9, "tau2 0.9 is"),
        (4, 1.2, 0.5, "tau1 is 1.2"), (4, 0.5, -0.1, "tau2 is -0.1"), (4, float("nan"), 0.5, "tau1 is nan"),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(steps, tau1, tau2, message):
    with pytest.raises(InputError, match=message):
        make_schedule(steps, TOKENS, tau1, tau2, references=True)


def test_references_of_several_sizes_make_one_padded_row():
    one, two = some_latents((4, 6), (2, 2)), some_latents((8, 8), seed=1)
    references = pad_references([one, two, []], GRID)
    assert references.tokens.shape == (3, REFERENCE_BUCKET, 64)
    np.testing.assert_array_equal(references.mask.sum(axis=1), [6 + 1, 16, 0])
    np.testing.assert_array_equal(references.tokens[0, :7], np.concatenate([pack(latent) for latent in one]))
    np.testing.assert_array_equal(references.positions[0, :7], reference_positions(GRID, [(2, 3), (1, 1)]))
    np.testing.assert_array_equal(references.positions[1, :16], reference_positions(GRID, [(4, 4)]))
    assert pad_references([[], []], GRID) is None
    assert pad_references([some_latents((8, 10))], GRID).tokens.shape[1] == 2 * REFERENCE_BUCKET
