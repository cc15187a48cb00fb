"""Scores of critters: the truth wins, copies and noise do not, intervals are what the formulas say."""

import json

import numpy as np
import pytest

from squeeze_jax.miniature.critters import SCENE_FACTORS, SUBJECT_FACTORS, Pair, draw_scene, pair_at
from squeeze_jax.miniature.scores import (
    CHANCE,
    CODEC_BATCH,
    TASKS,
    Scores,
    paired_difference,
    references_pasted,
    render,
    score,
    score_settings,
    true_targets,
    wilson,
)

COUNT = 64


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    return [pair_at(1, index, "held_out") for index in range(COUNT)]


@pytest.fixture(scope="module")
def scores(pairs) -> dict[str, Scores]:
    rng = np.random.default_rng(0)
    targets = true_targets(pairs)
    wrong_eyes = [p.subject._replace(eyes=(p.subject.eyes + 1) % 5) for p in pairs]
    settings = {
        "truth": targets,
        "noisy": np.clip(targets / 255 + 0.1 * rng.normal(size=targets.shape), 0, 1),
        "pasted": references_pasted(pairs),
        "random": rng.random(targets.shape, dtype=np.float32),
        "wrong eyes": np.stack([draw_scene(s, p.scene) for s, p in zip(wrong_eyes, pairs, strict=True)]),
    }
    return score_settings(settings, pairs, seed=0)


def test_the_true_target_is_always_found(scores):
    for name in ("truth", "noisy"):
        for task in TASKS:
            assert scores[name].share(task).value == 1, (name, task)
        for factors in scores[name].factors.values():
            assert all(f.share.value == 1 and f.misses == 0 for f in factors.values())


def test_a_pasted_reference_and_a_random_picture_are_no_better_than_chance(scores):
    for name, task in [("pasted", "scene easy"), ("pasted", "scene hard"), ("random", "scene hard")]:
        assert scores[name].share(task).low <= CHANCE, (name, task)
    for task in ("subject easy", "scene easy"):
        share = scores["random"].share(task)
        assert share.low <= CHANCE <= share.high
    assert scores["pasted"].share("subject easy").low > CHANCE  # its colours are the subject's


def test_a_wrong_factor_is_blamed(scores):
    eyes = scores["wrong eyes"].factors["subject hard"]["eyes"]
    others = [f for name, f in scores["wrong eyes"].factors["subject hard"].items() if name != "eyes"]
    missed = COUNT - int(scores["wrong eyes"].hits["subject hard"].sum())
    assert missed == eyes.misses + sum(f.misses for f in others)
    assert missed > COUNT / 3  # two or three of four wrong kinds of eyes are candidates: half the time it is this one
    assert eyes.misses > 0.9 * missed
    assert eyes.share.value < 0.8 < 0.95 < min(f.share.value for f in others)
    assert scores["wrong eyes"].share("scene hard").value == 1


def test_scores_need_not_be_taken_together_and_follow_the_seed(pairs, scores):
    alone = score(references_pasted(pairs[:20]), pairs[:20], seed=0)
    for task in TASKS:
        assert np.array_equal(alone.hits[task], scores["pasted"].hits[task][:20])
    reseeded = score(references_pasted(pairs[:40]), pairs[:40], seed=5)
    assert not np.array_equal(reseeded.hits["subject easy"], scores["pasted"].hits["subject easy"][:40])


def test_processes_do_not_change_the_scores(pairs, scores, monkeypatch):
    monkeypatch.setattr("squeeze_jax.miniature.scores._POOL_FROM", 2)
    spread = score(references_pasted(pairs[:20]), pairs[:20], seed=0)
    for task in TASKS:
        assert np.array_equal(spread.hits[task], scores["pasted"].hits[task][:20])


def test_candidates_pass_through_the_codec_in_full_batches(pairs):
    shapes = []

    def darken(images: np.ndarray) -> np.ndarray:
        shapes.append(images.shape)
        assert images.min() >= 0
        assert images.max() <= 1
        return images * 0.5

    some = pairs[:5]
    images = true_targets(some) / 255 * 0.5
    shared = score(images, some, seed=0, codec=darken)
    assert all(shared.share(task).value == 1 for task in TASKS)
    assert set(shapes) == {(CODEC_BATCH, 64, 64, 3)}
    plain = score(images, some, seed=0)
    assert plain.share("scene easy").value < 1


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (10, 10), (3, 96), (480, 512)])
def test_wilson_solves_its_defining_equation(successes, trials):
    share = wilson(float(successes), trials)
    p = successes / trials
    for bound in (share.low, share.high):
        if 1e-9 < bound < 1 - 1e-9:  # the score test at the bound is exactly at z
            assert abs(p - bound) / np.sqrt(bound * (1 - bound) / trials) == pytest.approx(1.959963984540054)
    assert share.low <= p <= share.high
    assert (share.low, share.high) != (p, p)


def test_wilson_against_published_values():
    # Newcombe 1998, table I, method 3: 81/263 and 0/20.
    assert wilson(81.0, 263)[1:] == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0.0, 20)[1:] == pytest.approx((0.0, 0.1611), abs=5e-5)


def made_up(hits: np.ndarray, first: int = 0) -> Scores:
    return Scores(0, np.arange(first, first + len(hits)), dict.fromkeys(TASKS, hits), {})


def test_paired_difference_against_the_normal_approximation():
    rng = np.random.default_rng(0)
    a = rng.random(2000) < 0.8
    b = a & (rng.random(2000) < 0.8)  # b misses wherever a does: the pairing halves the interval
    found = paired_difference(made_up(a), made_up(b), "subject hard")
    d = a.astype(float) - b
    half = 1.96 * d.std() / np.sqrt(len(d))
    assert found.value == pytest.approx(d.mean())
    assert found.low == pytest.approx(d.mean() - half, abs=0.15 * half)
    assert found.high == pytest.approx(d.mean() + half, abs=0.15 * half)
    assert paired_difference(made_up(a), made_up(a), "scene hard") == (0, 0, 0)
    with pytest.raises(ValueError, match="same pairs"):
        paired_difference(made_up(a), made_up(a, first=1), "scene hard")


def test_reports_hold_every_number(scores):
    report = json.loads(json.dumps(scores["pasted"].to_json()))
    assert set(report["tasks"]) == set(TASKS)
    assert set(report["factors"]["subject hard"]) == set(SUBJECT_FACTORS)
    assert set(report["factors"]["scene hard"]) == set(SCENE_FACTORS)
    hits = report["tasks"]["subject easy"]["hits"]
    assert hits.count("1") / len(hits) == report["tasks"]["subject easy"]["value"]
    table = render({"the reference pasted": scores["pasted"], "true targets": scores["truth"]})
    assert "| true targets | 100.0 (94.3–100.0) |" in table
    assert table.count("the reference pasted") == 3
    assert "6.25" in table


def test_images_that_cannot_be_scored_are_refused(pairs):
    targets = true_targets(pairs[:2])
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        score(targets / 127.5 - 1, pairs[:2], seed=0)
    with pytest.raises(ValueError, match="for 3 pairs"):
        score(targets, pairs[:3], seed=0)
    with pytest.raises(ValueError, match="finite"):
        score(np.full(targets.shape, np.nan), pairs[:2], seed=0)
