"""Scores against plain loops over cosines in float64, and their properties."""

import numpy as np
import pytest

from squeeze_jax.evaluation.similarity import (
    Drawn,
    Subject,
    copy_scores,
    copying,
    estimate,
    group_means,
    overall_means,
    real_scores,
    score_prompts,
)


def features(count, width, seed, centre=None):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(count, width)) + (0 if centre is None else centre)
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


REAL = {"DINO": features(7, 8, 0), "CLIP": features(7, 6, 1)}
MADE = {"DINO": features(10, 8, 2), "CLIP": features(10, 6, 3)}
TEXTS = features(5, 6, 4)
DOG, CAT, ALONE = Subject((0, 1, 2), 1), Subject((3, 4, 5), 5), Subject((6,), 6)
DRAWN = [
    Drawn("dog", 0, (0, 1), 1, (DOG,)),
    Drawn("dog", 1, (2, 3), 1, (DOG,)),
    Drawn("cat", 2, (4, 5), 5, (CAT,)),
    Drawn("dog + cat", 3, (6, 7), 1, (DOG, CAT)),
    Drawn("alone", 4, (8, 9), 6, (ALONE,)),
]


def cosine(a, b):
    a, b = a.astype(np.float64), b.astype(np.float64)
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def test_each_score_is_the_mean_of_its_cosines():
    scores = score_prompts(DRAWN, MADE, REAL, TEXTS)
    for one, found in zip(DRAWN, scores):
        for metric, judge in (("DINO-I", "DINO"), ("CLIP-I", "CLIP")):
            pictures = [MADE[judge][i] for i in one.pictures]
            of_all = [
                np.mean([cosine(p, REAL[judge][r]) for p in pictures for r in subject.real])
                for subject in one.subjects
            ]
            of_one = [cosine(p, REAL[judge][s.fixed]) for s in one.subjects for p in pictures]
            assert found.scores[f"{metric} all"] == pytest.approx(np.mean(of_all), abs=1e-6)
            assert found.scores[f"{metric} fixed"] == pytest.approx(np.mean(of_one), abs=1e-6)
        of_text = [max(0, cosine(MADE["CLIP"][i], TEXTS[one.text])) for i in one.pictures]
        assert found.scores["CLIP-T"] == pytest.approx(np.mean(of_text), abs=1e-6)
    negative = [cosine(MADE["CLIP"][i], TEXTS[one.text]) < 0 for one in DRAWN for i in one.pictures]
    assert any(negative)  # so that the floor is looked at


def test_a_system_that_copies_scores_as_the_copied_reference():
    pasted = {k: REAL[k][[one.reference for one in DRAWN]] for k in REAL}
    drawn = [one._replace(pictures=(i,)) for i, one in enumerate(DRAWN)]
    found = score_prompts(drawn, pasted, REAL, TEXTS)
    assert found == copy_scores(DRAWN, REAL, TEXTS)
    assert found[0].scores["DINO-I fixed"] == pytest.approx(1)
    report = copying(drawn, pasted["DINO"], REAL["DINO"])["dog"]
    assert report.to_reference == pytest.approx(1) and report.above_closest == 1


def test_real_pictures_are_compared_with_the_others():
    found = real_scores(DRAWN, REAL, TEXTS)
    assert [one.group for one in found] == ["dog", "dog", "cat", "dog + cat"]
    pairs = [cosine(REAL["DINO"][i], REAL["DINO"][k]) for i, k in ((0, 1), (0, 2), (1, 2))]
    assert found[0].scores["DINO-I all"] == pytest.approx(np.mean(pairs), abs=1e-6)
    fixed = [cosine(REAL["DINO"][1], REAL["DINO"][k]) for k in (0, 2)]
    assert found[0].scores["DINO-I fixed"] == pytest.approx(np.mean(fixed), abs=1e-6)
    closest = copying(DRAWN, MADE["DINO"], REAL["DINO"])
    assert closest["dog"].closest_real == pytest.approx(max(pairs), abs=1e-6)
    assert closest["alone"].real is None


def test_text_alone_has_no_score_of_likeness():
    text = Drawn("all prompts", 0, (0, 1), None, ())
    (found,) = score_prompts([text], MADE, REAL, TEXTS)
    assert set(found.scores) == {"CLIP-T"}
    means = overall_means(score_prompts([text, *DRAWN], MADE, REAL, TEXTS))
    alone = overall_means(score_prompts(DRAWN, MADE, REAL, TEXTS))
    assert means["DINO-I all"] == alone["DINO-I all"] and means["CLIP-T"] != alone["CLIP-T"]
    assert copy_scores([text], REAL, TEXTS) == real_scores([text], REAL, TEXTS) == []


def test_all_subjects_count_the_same_however_many_prompts_they_have():
    scores = score_prompts(DRAWN, MADE, REAL, TEXTS)
    groups = group_means(scores)
    of_groups = [groups[name]["CLIP-T"].value for name in ("dog", "cat", "dog + cat", "alone")]
    assert overall_means(scores)["CLIP-T"].value == pytest.approx(np.mean(of_groups))
    assert groups["dog"]["CLIP-T"].value == pytest.approx(
        np.mean([scores[0].scores["CLIP-T"], scores[1].scores["CLIP-T"]])
    )


def test_an_interval_is_near_the_normal_one_and_the_same_each_time():
    values = list(np.random.default_rng(0).normal(0.7, 0.1, 200))
    found = estimate(values)
    half = 1.96 * np.std(values) / np.sqrt(len(values))
    assert found.low == pytest.approx(np.mean(values) - half, abs=0.1 * half)
    assert found.high == pytest.approx(np.mean(values) + half, abs=0.1 * half)
    assert estimate(values) == found
    assert estimate([0.5]) == (0.5, None, None)
