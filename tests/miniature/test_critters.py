"""Critters: deterministic, split by subject, every factor to be seen, and named in words."""

import hashlib
import json
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from squeeze_jax.miniature.critters import (
    FINE_FACTORS,
    POSES,
    SCENE_COUNT,
    SCENE_FACTORS,
    SUBJECT_COUNT,
    SUBJECT_FACTORS,
    Scene,
    Subject,
    caption,
    draw_reference,
    draw_scene,
    is_held_out,
    pair_at,
    pairs,
    prompt,
    questions,
    scene_distractors,
    subject_at,
    subject_distractors,
    write_manifest,
)
from squeeze_jax.miniature.factors import scene_from_number, subject_from_number, subject_number

ROOT = Path(__file__).parents[2]
VISIBLE = 0.004
"""Least mean squared difference, on [0, 1], between two values of a factor, averaged over scenes at the small size."""

DIGEST = """
import hashlib
from squeeze_jax.miniature.critters import pairs
digest = hashlib.sha256()
for split in ("train", "held_out"):
    for pair, reference, target in pairs(seed=3, start=5, stop=9, split=split):
        digest.update(repr(pair).encode() + reference.tobytes() + target.tobytes())
print(digest.hexdigest())
"""


def digest_here() -> str:
    digest = hashlib.sha256()
    for split in ("train", "held_out"):
        for pair, reference, target in pairs(seed=3, start=5, stop=9, split=split):
            digest.update(repr(pair).encode() + reference.tobytes() + target.tobytes())
    return digest.hexdigest()


def random_subject(rng: np.random.Generator) -> Subject:
    return subject_from_number(int(rng.integers(SUBJECT_COUNT)))


def random_scene(rng: np.random.Generator) -> Scene:
    return scene_from_number(int(rng.integers(SCENE_COUNT)))


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(((a.astype(np.float32) - b.astype(np.float32)) ** 2).mean() / 255**2)


# --- what follows from (seed, index), and nothing else --------------------------------------------------------------


def test_another_process_draws_the_same_and_imports_no_jax():
    code = DIGEST + "import sys; print('jax' in sys.modules)"
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert out.split() == [digest_here(), "False"]


def test_global_random_state_and_order_do_not_matter():
    np.random.seed(0)
    first = digest_here()
    state = np.random.get_state()[1].tolist()
    np.random.seed(1)
    assert digest_here() == first
    np.random.seed(0)
    digest_here()
    assert np.random.get_state()[1].tolist() == state, "drawing used the global generator"
    backwards = [pair_at(3, index) for index in reversed(range(20))]
    assert backwards[::-1] == [pair for pair, *_ in pairs(3, 0, 20)]


def test_seeds_and_indices_give_different_pairs():
    drawn = {(p.subject, p.scene) for seed in range(3) for p in (pair_at(seed, i) for i in range(200))}
    assert len(drawn) >= 599  # of 600: two alike among 3.7e8 combinations would be chance, three a fault


def test_counts_are_exact_and_numbers_invert():
    assert SUBJECT_COUNT == 6 * 7 * 5 * 5 * 5 * 5 * 5 >= 100_000
    assert SCENE_COUNT == 6 * 3 * 4 * 5 * 3 * 2 == 2160
    assert tuple(SUBJECT_FACTORS) == Subject._fields
    assert tuple(SCENE_FACTORS) == Scene._fields
    for number in (0, 1, 77_777, SUBJECT_COUNT - 1):
        assert subject_number(subject_from_number(number)) == number
    assert len({scene_from_number(n) for n in range(SCENE_COUNT)}) == SCENE_COUNT


def test_split_is_by_subject_and_about_one_in_twenty():
    train = {subject_at(seed, i, "train") for seed in range(2) for i in range(500)}
    held_out = {subject_at(seed, i, "held_out") for seed in range(2) for i in range(500)}
    assert not train & held_out
    assert all(is_held_out(s) for s in held_out)
    assert not any(is_held_out(s) for s in train)
    share = np.mean([is_held_out(subject_from_number(n)) for n in range(0, SUBJECT_COUNT, 7)])
    assert abs(share - 0.05) < 0.005  # 18,750 subjects: three standard deviations
    # Held-out subjects must not lack a value, or that value would never be judged.
    for field, values in SUBJECT_FACTORS.items():
        assert {getattr(s, field) for s in held_out} == set(range(len(values)))


def test_reference_pose_is_another_and_all_occur():
    seen = {(p.reference_pose, p.scene.pose) for p in (pair_at(0, i) for i in range(300))}
    assert seen == {(a, b) for a in range(4) for b in range(4) if a != b}


# --- pictures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [*SUBJECT_FACTORS, *SCENE_FACTORS])
def test_every_pair_of_values_is_visibly_different(factor):
    rng = np.random.default_rng(0)
    values = len((SUBJECT_FACTORS | SCENE_FACTORS)[factor])
    found: dict[tuple[int, int], list[float]] = {pair: [] for pair in combinations(range(values), 2)}
    for _ in range(12):
        subject, scene = random_subject(rng), random_scene(rng)._replace(size=1)
        if factor in SUBJECT_FACTORS:
            drawn = [draw_scene(subject._replace(**{factor: v}), scene) for v in range(values)]
        else:
            drawn = [draw_scene(subject, scene._replace(**{factor: v})) for v in range(values)]
        for i, j in found:
            found[i, j].append(difference(drawn[i], drawn[j]))
    means = {pair: np.mean(differences) for pair, differences in found.items()}
    assert min(means.values()) >= VISIBLE, means
    assert min(min(differences) for differences in found.values()) > 0.0005  # in no scene does a value vanish


@pytest.mark.parametrize("pose", range(len(POSES)))
def test_the_reference_shows_every_factor_in_every_pose(pose):
    rng = np.random.default_rng(pose)
    for factor, values in SUBJECT_FACTORS.items():
        for _ in range(4):
            subject = random_subject(rng)
            drawn = [draw_reference(subject._replace(**{factor: v}), pose) for v in range(len(values))]
            assert min(difference(a, b) for a, b in combinations(drawn, 2)) > 0.0015, (factor, subject)


def test_fine_factors_fade_in_a_thumbnail_and_the_coarse_stay():
    rng = np.random.default_rng(0)
    kept = {}
    for factor, values in SUBJECT_FACTORS.items():
        full, thumbnail = [], []
        for _ in range(12):
            subject = random_subject(rng)
            drawn = [Image.fromarray(draw_reference(subject._replace(**{factor: v}), 0)) for v in range(len(values))]
            small = [np.asarray(picture.reduce(8)) for picture in drawn]
            full += [difference(np.asarray(a), np.asarray(b)) for a, b in combinations(drawn, 2)]
            thumbnail += [difference(a, b) for a, b in combinations(small, 2)]
        kept[factor] = np.mean(thumbnail) / np.mean(full)
    fine = max(kept[factor] for factor in FINE_FACTORS)
    assert fine < 0.2, kept  # at 8x8 pixels less than a fifth of the difference is left
    assert kept["colour"] > 2 * fine, kept
    assert kept["second"] > 2 * fine, kept


def test_edges_are_antialiased():
    # A white critter part on the plain ground: besides the flat colours there must be many in-between ones.
    picture = draw_reference(Subject(0, 1, 0, 1, 0, 4, 0), 0)
    assert len(np.unique(picture.mean(axis=2).round())) > 60
    flat, counts = np.unique(picture.reshape(-1, 3), axis=0, return_counts=True)
    assert counts.max() > 1000  # and yet the ground is one flat colour
    assert len(flat) > 100


def test_another_size_is_the_same_picture():
    rng = np.random.default_rng(0)
    for _ in range(5):
        subject, scene = random_subject(rng), random_scene(rng)
        large = draw_scene(subject, scene, 128)
        assert large.shape == (128, 128, 3)
        assert large.dtype == np.uint8
        reduced = np.asarray(Image.fromarray(large).reduce(2))
        assert difference(reduced, draw_scene(subject, scene, 64)) < 0.003  # edges alone
    with pytest.raises(ValueError, match="64"):
        draw_reference(subject, 0, 32)


def test_drawing_twice_does_not_touch_the_first_picture():
    subject, scene = subject_from_number(5), scene_from_number(700)
    first = draw_scene(subject, scene)
    kept = first.copy()
    draw_scene(subject_from_number(9), scene)
    assert np.array_equal(first, kept)
    assert np.array_equal(draw_scene(subject, scene), kept)


# --- words ----------------------------------------------------------------------------------------------------------


def test_a_prompt_names_every_scene_factor():
    rng = np.random.default_rng(0)
    plain = {prompt(scene_from_number(n)) for n in range(SCENE_COUNT)}
    assert len(plain) == SCENE_COUNT
    owner: dict[str, Scene] = {}
    for n in range(SCENE_COUNT):
        scene = scene_from_number(n)
        for _ in range(3):
            text = prompt(scene, rng)
            words = text.replace(",", "").split()
            for factor, values in SCENE_FACTORS.items():
                assert [v for v in values if v in words] == [values[getattr(scene, factor)]], (text, factor)
            assert owner.setdefault(text, scene) == scene, text
            assert len(words) <= 16


def test_captions_and_answers_name_the_coarse_and_keep_the_fine_to_themselves():
    rng = np.random.default_rng(0)
    vocabulary, fine_words = set(), {"slit", "sleepy", "ring", "cross"}  # "round" is a body and ears too
    for i in range(500):
        pair = pair_at(0, i)
        text = caption(pair.subject, pair.reference_pose, rng)
        words = set(text.replace(",", "").split())
        for factor in set(SUBJECT_FACTORS) - set(FINE_FACTORS):
            assert SUBJECT_FACTORS[factor][getattr(pair.subject, factor)] in words
        assert POSES[pair.reference_pose] in words
        asked = questions(pair.subject, pair.reference_pose, rng) + questions(pair.subject, pair.scene, rng)
        assert len({question for question, _ in asked}) == len(asked)  # one picture, one question, one answer
        for line in (text, pair.prompt, *(part for qa in asked for part in qa)):
            vocabulary |= set(line.replace(",", "").replace("?", "").split())
    assert not vocabulary & fine_words
    assert len(vocabulary) < 120


def test_questions_about_both_need_both():
    rng = np.random.default_rng(0)
    pair = pair_at(0, 0)
    answers = dict(questions(pair.subject, pair.scene, rng))
    drawn = answers["what to draw?"]
    for factor, values in SCENE_FACTORS.items():
        assert values[getattr(pair.scene, factor)] in drawn
    assert SUBJECT_FACTORS["colour"][pair.subject.colour] in drawn


# --- distractors ----------------------------------------------------------------------------------------------------


def test_hard_distractors_differ_in_exactly_one_factor_evenly():
    rng = np.random.default_rng(0)
    for _ in range(50):
        for truth, others in (
            (s := random_subject(rng), subject_distractors(s, 15, rng, hard=True)),
            (c := random_scene(rng), scene_distractors(c, 15, rng, hard=True)),
        ):
            assert len(set(others)) == 15
            changed = np.array([np.flatnonzero(np.array(o) != truth).tolist() for o in others])
            assert changed.shape == (15, 1)
            covered = np.bincount(changed[:, 0], minlength=len(truth))
            if isinstance(truth, Subject):
                assert covered.min() == 2
                assert covered.max() == 3
            else:
                assert covered.min() >= 1  # size has one other value, all of whose neighbours are taken
    with pytest.raises(ValueError, match="17"):
        scene_distractors(c, 18, rng, hard=True)


def test_easy_distractors_are_others_and_repeatable():
    subject, scene = subject_from_number(11), scene_from_number(11)
    for seed in range(20):
        subjects = subject_distractors(subject, 15, np.random.default_rng(seed), hard=False)
        scenes = scene_distractors(scene, 15, np.random.default_rng(seed), hard=False)
        assert len(set(subjects)) == len(set(scenes)) == 15
        assert subject not in subjects
        assert scene not in scenes
        assert subjects == subject_distractors(subject, 15, np.random.default_rng(seed), hard=False)


# --- files ----------------------------------------------------------------------------------------------------------


def test_manifest_is_unos_and_can_be_redrawn(tmp_path):
    path = write_manifest(tmp_path / "set", count=6, seed=2, split="held_out", references=2, processes=1)
    rows = json.loads(path.read_text())
    assert len(rows) == 6
    for index, row in enumerate(rows):
        pair = pair_at(2, index, "held_out")
        assert row["prompt"] == pair.prompt
        assert row["critter"] == {
            "subject": list(pair.subject),
            "scene": list(pair.scene),
            "reference_pose": pair.reference_pose,
        }
        target = np.asarray(Image.open(path.parent / row["image_tgt_path"]))
        assert np.array_equal(target, draw_scene(pair.subject, pair.scene))
        references = [np.asarray(Image.open(path.parent / name)) for name in row["image_paths"]]
        assert len(references) == 2
        assert np.array_equal(references[0], draw_reference(pair.subject, pair.reference_pose))
        assert not np.array_equal(references[0], references[1])
        assert not np.array_equal(references[1], draw_reference(pair.subject, pair.scene.pose))
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["manifest.json", "references", "targets"]


def test_processes_do_not_change_the_manifest(tmp_path):
    one = write_manifest(tmp_path / "one", count=400, processes=1)
    two = write_manifest(tmp_path / "two", count=400, processes=2)
    assert one.read_bytes() == two.read_bytes()
    for name in ("targets/000399.png", "references/000000_0.png"):
        assert (one.parent / name).read_bytes() == (two.parent / name).read_bytes()


def test_too_many_references_are_refused(tmp_path):
    with pytest.raises(ValueError, match="references is 4"):
        write_manifest(tmp_path, count=1, references=4)
