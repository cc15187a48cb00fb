"""A tie is a miss: candidates that cannot be told apart are never retrieved."""

import numpy as np

from squeeze_jax.miniature.critters import pair_at
from squeeze_jax.miniature.scores import TASKS, score, true_targets


def test_a_tie_is_a_miss_in_every_task_and_for_every_factor():
    """Through a codec that makes all pictures one, the truth is as far as each of fifteen others."""
    pairs = [pair_at(1, index, "held_out") for index in range(3)]
    scores = score(true_targets(pairs), pairs, seed=0, codec=lambda images: np.full_like(images, 0.25))
    for task in TASKS:
        assert not scores.hits[task].any() and scores.share(task).value == 0, task
    assert [f.share.value for factors in scores.factors.values() for f in factors.values() if f.share.value > 0] == []


def test_a_tie_with_one_other_is_a_miss():
    """The truth's own picture once among the first pair's others: that task alone is lost, of that pair alone."""
    pairs = [pair_at(1, index, "held_out") for index in range(3)]
    plain = score(true_targets(pairs), pairs, seed=0)
    assert all(plain.share(task).value == 1 for task in TASKS)
    seen = {"first": True}

    def twice(images):  # of the first pair, the second candidate is shown as the first is: the truth
        if seen.pop("first", False):
            images = images.copy()
            images[1] = images[0]
        return images

    scores = score(true_targets(pairs), pairs, seed=0, codec=twice)
    assert scores.hits[TASKS[0]].tolist() == [False, True, True]
    assert all(scores.hits[task].all() for task in TASKS[1:])
