"""When which condition is on: stages of sampling as a partition, dropout as frequencies."""

from itertools import pairwise

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from squeeze_jax.diffusion.flow import no_shift, schedule_shift
from squeeze_jax.diffusion.stages import MAX_TAU, ConditionDropout, plan_stages, time_steps
from squeeze_jax.errors import InputError

# Other work on the machine must not fail a test: no time limits on single examples.
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
TAU = st.floats(0, MAX_TAU)


def by_hand(t, tau1, tau2):
    """The table of docs/decisions.md, "Multi-stage denoising", for one step."""
    return (True, False) if t >= tau1 else (True, True) if t >= tau2 else (False, True)


@UNHURRIED
@given(st.integers(1, 60), st.sampled_from([16, 256, 1024, 4096]), TAU, TAU, st.booleans())
def test_stages_partition_the_steps(steps, tokens, a, b, references):
    tau1, tau2 = max(a, b), min(a, b)
    times = time_steps(steps, tokens)
    stages = plan_stages(times, tau1, tau2, references)
    ends = [stage.steps for stage in stages]
    assert ends[0][0] == 0 and ends[-1][1] == steps
    assert all(first[1] == second[0] for first, second in pairwise(ends))
    assert all(start < stop for start, stop in ends)
    for stage in stages:
        for i in range(*stage.steps):
            expected = (
                by_hand(times[i], np.float32(tau1), np.float32(tau2))
                if references
                else (True, False)
            )
            assert (stage.mllm, stage.vae) == expected


def test_the_papers_defaults_at_512_pixels():
    stages = plan_stages(time_steps(25, 1024), 0.95, 0.85)
    assert [(stage.mllm, stage.vae) for stage in stages] == [
        (True, False),
        (True, True),
        (False, True),
    ]
    # At 1,024 tokens the times begin 1, .978, .956 | .932, .908, .882, .856 | .828 …
    assert [stage.steps for stage in stages] == [(0, 3), (3, 7), (7, 25)]


def test_the_mllm_alone_throughout():
    times = time_steps(10, 64)
    alone = (((True, False), (0, 10)),)
    assert tuple(((s.mllm, s.vae), s.steps) for s in plan_stages(times, 0.0, 0.0)) == alone
    assert (
        tuple(((s.mllm, s.vae), s.steps) for s in plan_stages(times, 0.95, 0.85, references=False))
        == alone
    )


def test_a_border_on_a_step_belongs_to_the_earlier_stage():
    times = np.array([1.0, 0.75, 0.5, 0.25, 0.0], np.float32)
    assert [s.steps for s in plan_stages(times, 0.75, 0.25)] == [(0, 2), (2, 4)]
    assert [s.steps for s in plan_stages(times, 1.0, 0.5)] == [(0, 1), (1, 3), (3, 4)]


@pytest.mark.parametrize(
    ("tau1", "tau2", "kept"),
    [(1.1, 0.0, (True, True)), (1.01, 0.0, (True, True)), (1.1, 1.1, (False, True))],
)
@pytest.mark.parametrize("steps", [1, 2, 25])
def test_no_step_reaches_a_threshold_above_one(steps, tau1, tau2, kept):
    """Not even the first, t = 1: both conditions throughout, or the VAE alone throughout."""
    for shifted in (True, False):
        stages = plan_stages(time_steps(steps, 1024, schedule_shift if shifted else no_shift), tau1, tau2)
        assert [(stage.mllm, stage.vae) for stage in stages] == [kept]
        assert stages[0].steps == (0, steps)


@pytest.mark.parametrize(
    ("tau1", "tau2", "message"),
    [
        (0.8, 0.9, r"tau2 0\.9 is larger than tau1 0\.8; it must not be"),
        (1.2, 0.9, r"tau1 is 1\.2; it must be from 0 to 1\.1"),
        (0.8, -0.1, r"tau2 is -0\.1; it must be from 0 to 1\.1"),
        (float("nan"), 0.1, r"tau1 is nan; it must be from 0 to 1\.1"),
    ],
)
def test_impossible_thresholds_are_refused(tau1, tau2, message):
    with pytest.raises(InputError, match=message):
        plan_stages(time_steps(4, 16), tau1, tau2)


# The paper's stage 2, stage 1, and a corner with zeros.
CASES = [
    ConditionDropout(),
    ConditionDropout(0.9, 0.0, 0.0, 0.1),
    ConditionDropout(0.0, 0.7, 0.3, 0.0),
]


@pytest.mark.parametrize("dropout", CASES)
def test_dropout_has_its_probabilities(dropout):
    count = 40_000
    mllm, vae = (np.asarray(x) for x in dropout.draw(jax.random.key(0), count))
    found = [(mllm & vae).mean(), (mllm & ~vae).mean(), (~mllm & vae).mean(), (~mllm & ~vae).mean()]
    for frequency, probability in zip(
        found, (dropout.both, dropout.mllm, dropout.vae, dropout.neither)
    ):
        assert abs(frequency - probability) <= 4 * np.sqrt(probability * (1 - probability) / count)


def test_without_references_the_mllm_is_kept_by_both_and_mllm():
    """Stage 1: dropped one time in ten (docs/decisions.md, "Condition dropout")."""
    mllm, _ = ConditionDropout(0.9, 0.0, 0.0, 0.1).draw(jax.random.key(1), 40_000)
    assert float(mllm.mean()) == pytest.approx(0.9, abs=0.006)


def test_draws_come_from_their_key():
    one, two, other = (ConditionDropout().draw(jax.random.key(seed), 64) for seed in (0, 0, 1))
    assert all((a == b).all() for a, b in zip(one, two))
    assert not all((a == b).all() for a, b in zip(one, other))


@pytest.mark.parametrize(
    "values",
    [
        (0.6, 0.1, 0.2, 0.2),
        (0.6, 0.1, 0.2, 0.0),
        (1.1, -0.1, 0.0, 0.0),
        (float("nan"), 0.1, 0.2, 0.1),
    ],
)
def test_impossible_probabilities_are_refused(values):
    with pytest.raises(ValueError, match="probabilities that sum to 1"):
        ConditionDropout(*values)
