"""The world of emoji: who is held out, what a sentence says, where a subject is drawn, how pictures are judged."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from squeeze_jax.miniature.emoji import words
from squeeze_jax.miniature.emoji.make_sheets import ALIKE, thumbnail
from squeeze_jax.miniature.emoji.pairs import pair_at
from squeeze_jax.miniature.emoji.scenes import (
    FACTORS,
    Placement,
    Scene,
    bounds_of,
    bring_near,
    draw_copied,
    draw_reference,
    draw_scene,
)
from squeeze_jax.miniature.emoji.scores import judge_all
from squeeze_jax.miniature.emoji.subjects import (
    CHANNEL_ORDERS,
    LOOKS,
    SUBJECTS,
    colour_of,
    picture_of,
    split_of,
    subjects_of,
)
from squeeze_jax.miniature.emoji.world import EMOJI
from squeeze_jax.miniature.train_mllm import tokenizer_of

SIZES = ((64, 64), (48, 80), (80, 48), (64, 96), (96, 64))
TABLES = {
    "place": words.PLACES, "time": words.TIMES, "position": words.POSITIONS, "size": words.SIZES,
    "pose": words.POSES, "thing": words.THINGS,
}  # fmt: skip


def test_a_tenth_and_a_category_are_held_out_and_never_trained_on():
    held, train = subjects_of("held_out"), subjects_of("train")
    assert 0.07 < len(held) / (len(held) + len(train)) < 0.13
    assert {s.category for s in subjects_of("held_out_category")} == {"vehicle"}
    assert "vehicle" not in {s.category for s in held + train}
    for split in ("train", "held_out", "held_out_category"):
        seen = {
            one.subject
            for i in range(400)
            for one in pair_at(3, i, split, subjects=2).scene.placements
        }
        assert {split_of(subject) for subject in seen} == {split}
    # The exam shows pictures as they are; training shows other colours, too.
    assert {
        one.look
        for i in range(100)
        for one in pair_at(3, i, "held_out", subjects=2).scene.placements
    } == {0}
    assert {
        one.look for i in range(400) for one in pair_at(3, i, subjects=2).scene.placements
    } == set(range(LOOKS))


def test_no_two_subjects_look_alike():
    small = np.stack([thumbnail(picture_of(subject).convert("RGBA")) for subject in SUBJECTS])
    for place, one in enumerate(small[:-1]):
        assert np.sqrt(np.square(small[place + 1 :] - one).mean((1, 2, 3))).min() >= 0.9 * ALIKE, (
            SUBJECTS[place]
        )


def test_an_example_follows_from_seed_and_index_alone():
    pairs = [pair_at(5, i, subjects=2, sizes=SIZES) for i in range(30)]
    for pair in reversed(pairs):
        again = pair_at(5, pair.number, subjects=2, sizes=SIZES)
        assert again == pair
        assert np.array_equal(again.target(), pair.target())
        assert [r.tobytes() for r in again.references()] == [r.tobytes() for r in pair.references()]
        assert pair.target().size == (pair.width, pair.height)
        assert len(pair.references()) == len(pair.scene.placements) == 1 + pair.number % 2
    assert len({pair.prompt.text for pair in pairs}) == len(pairs)


def test_a_near_reference_shows_the_targets_pixels_and_only_in_training():
    """Where it differs by nothing, reference and target hold the same picture at the same place."""
    pairs = [pair_at(5, i, near=1.0) for i in range(40)]
    for pair in pairs:
        assert {one.pose for one in pair.scene.placements} == {"upright"}
        near = bring_near(pair.views[0], 0.0, pair.scene, pair.height, pair.width)
        ground = pair.scene._replace(thing="nothing")
        shown, target = (
            np.asarray(picture, float)
            for picture in (
                draw_reference(*pair.scene.placements[0][:2], near._replace(place=None)),
                draw_scene(ground, 64, 64),
            )
        )
        left, upper, right, lower = bounds_of(pair.scene, 0, 64, 64)
        opaque = np.abs(shown - np.asarray(near.colour)).sum(-1) > 60
        opaque[: upper + 1], opaque[lower - 1 :] = False, False
        opaque[:, : left + 1], opaque[:, right - 1 :] = False, False
        closest = min(
            np.abs(np.roll(shown, (down, across), (0, 1)) - target)[opaque].mean()
            for down in (-1, 0, 1)
            for across in (-1, 0, 1)
        )
        assert closest < 25, pair.prompt.text  # of 255; half-transparent edges show the ground
        far = bring_near(pair.views[0], 1.0, pair.scene, pair.height, pair.width)
        assert far.angle == pair.views[0].angle
        assert far.length == pytest.approx(pair.views[0].length)
        assert far.centre == pytest.approx(pair.views[0].centre, abs=0.02)
    assert pair_at(5, 0, "held_out", near=1.0) == pair_at(5, 0, "held_out")
    for near, share in ((0.0, 0.52), (0.5, 0.76)):  # 0.4 of all, and a fifth of the rest
        poses = [pair_at(5, i, near=near).scene.placements[0].pose for i in range(400)]
        assert abs(poses.count("upright") / 400 - share) < 0.07
    two = [pair_at(5, i, subjects=2, near=1.0) for i in range(1, 20, 2)]
    assert two == [pair_at(5, i, subjects=2) for i in range(1, 20, 2)]


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_a_prompt_says_what_its_scene_has_and_nothing_else(split):
    for index in range(600):
        pair = pair_at(2, index, split)
        scene, one, text = pair.scene, pair.scene.placements[0], f" {pair.prompt.text} "
        for factor, table in TABLES.items():
            value = getattr(scene if factor in Scene._fields else one, factor)
            phrases = [f" {phrase}" for phrase in table[value]]
            said = any(phrase in text for phrase in phrases)
            if factor in pair.prompt.said:
                assert said, (factor, value, text)
        if "place" in pair.prompt.said:
            others = [p for v, some in words.PLACES.items() if v != scene.place for p in some]
            assert not any(f" {phrase} " in text.replace(",", " ") for phrase in others), text


def test_two_subjects_are_said_to_be_where_they_are():
    """The words `left` and `right` are read back by a rule of our own, from names that occur once."""
    for template in words.PAIRS:
        text = template.format(a="A", b="B")
        # What is said of one side decides; the sentence without its commas is read word by word.
        if " to the left of " in text or " to the right of " in text:
            first, _, last = text.partition(" to the ")
            side, other = last.split(" of ")
            left = first if side == "left" else other
        elif "to its" in text:
            who, other = text.split(" with ")
            left = who if other.endswith("right") else other[0]
        elif text.startswith(("left ", "on the left ")):
            left = text.removeprefix("on the ").removeprefix("left ")[0]
        elif text.startswith("on the right "):
            left = "B" if text.removeprefix("on the right ")[0] == "A" else "A"
        else:
            clause = [
                part
                for part in text.replace(" and ", ", ").split(", ")
                if "left" in part or "right" in part
            ][-1]
            who = clause.split()[0]
            left = who if "left" in clause else {"A": "B", "B": "A"}[who]
        assert left == "A", text


def test_held_out_sentence_forms_are_not_trained_on():
    def forms(split: str) -> set[str]:
        found = set()
        for index in range(1500):
            rng = np.random.default_rng(index)
            scene = pair_at(4, index, subjects=2).scene
            form, _ = words._attempt(scene, rng, complete=False)
            if words.is_held_out_form(form) == (split == "held_out"):
                found.add(form)
        return found

    train, held = forms("train"), forms("held_out")
    assert not train & held
    assert 0.12 < len(held) / (len(held) + len(train)) < 0.28
    texts = {
        split: {pair_at(4, i, split, complete=True).prompt.text for i in range(300)}
        for split in ("train", "held_out")
    }
    assert not texts["train"] & texts["held_out"]


@pytest.mark.parametrize("size", SIZES)
def test_subjects_are_drawn_in_their_bounds(size):
    for index in range(12):
        pair = pair_at(6, index, subjects=2, sizes=(size,))
        scene, picture = pair.scene, np.asarray(pair.target(), int)
        for place in range(len(scene.placements)):
            left, upper, right, lower = bounds_of(scene, place, *size)
            assert 0 <= left < right <= size[1]
            assert 0 <= upper < lower <= size[0]
            other = list(scene.placements)
            order, mirrored = divmod(other[place].look, 2)
            look = 2 * ((order + 3) % len(CHANNEL_ORDERS)) + mirrored
            other[place] = other[place]._replace(look=look)  # the same outline in other colours
            changed = (
                np.abs(
                    np.asarray(draw_scene(scene._replace(placements=tuple(other)), *size), int)
                    - picture
                ).sum(-1)
                > 0
            )
            changed[upper:lower, left:right] = False
            assert not changed.any()


def test_every_factor_changes_the_picture():
    subject = next(s for s in SUBJECTS if s.name == "fox")
    scene = Scene("beach", "day", "nothing", (Placement(subject, 0, "middle", "big", "upright"),))
    base = np.asarray(draw_scene(scene, 64, 64), float)
    for factor, values in FACTORS.items():
        for value in values:
            changed = (
                scene._replace(**{factor: value}) if factor in Scene._fields
                else scene._replace(placements=(scene.placements[0]._replace(**{factor: value}),))
            )  # fmt: skip
            same = changed == scene
            assert (
                np.square(np.asarray(draw_scene(changed, 64, 64), float) - base).mean() == 0
            ) == same, value


def test_other_looks_keep_the_outline_and_move_the_colours():
    subject = next(s for s in SUBJECTS if s.name == "fox")
    own, mirrored, red_as_blue = (np.asarray(picture_of(subject, look)) for look in (0, 1, 10))
    assert np.array_equal(mirrored, own[:, ::-1])
    assert np.array_equal(red_as_blue, own[..., [2, 1, 0, 3]])
    assert colour_of(subject) in ("orange", "red", "brown")
    assert colour_of(subject, 10) in ("blue", "aqua", "purple")


def draw_exchanged(pair):
    """The two subjects of a pair in each other's places."""
    one, other = pair.scene.placements
    places = (one._replace(subject=other.subject), other._replace(subject=one.subject))
    return draw_scene(pair.scene._replace(placements=places), 64, 64)


def test_the_truth_is_found_and_a_pasted_reference_is_not():
    for subjects in (1, 2):
        indices = range(1, 97, 2) if subjects == 2 else range(48)
        pairs = [pair_at(7, i, "held_out", subjects=subjects, complete=True) for i in indices]
        blurred = ImageFilter.GaussianBlur(1)
        ways = {
            "truth": np.stack([np.asarray(pair.target()) for pair in pairs]),
            "blurred": np.stack([np.asarray(pair.target().filter(blurred)) for pair in pairs]),
            "moved": np.stack(
                [np.roll(np.asarray(pair.target()), (2, 2), (0, 1)) for pair in pairs]
            ),
            "pasted": np.stack([np.asarray(pair.references()[0]) for pair in pairs]),
            "noise": np.random.default_rng(0)
            .integers(0, 256, (len(pairs), 64, 64, 3))
            .astype(np.uint8),
        }
        ways["copied"] = np.stack([
            np.asarray(draw_copied(pair.scene, pair.views, pair.height, pair.width)) for pair in pairs
        ])  # fmt: skip
        scores = judge_all(ways, pairs)
        assert scores["copied"].copied().value == 1.0
        assert scores["truth"].copied().value == 0.0
        assert scores["truth"].subject().value == scores["truth"].scene().value == 1.0
        assert scores["blurred"].subject().value > 0.95
        assert scores["moved"].subject().value > 0.9
        assert scores["pasted"].subject().value < 0.6
        assert scores["noise"].subject().value < 0.3
        if subjects == 2:
            exchanged = np.stack([np.asarray(draw_exchanged(pair)) for pair in pairs])
            found = judge_all({"exchanged": exchanged}, pairs)["exchanged"]
            assert found.swapped().value == 1.0
            assert found.subject().value == 0.0


def test_what_the_prompt_leaves_free_is_not_judged():
    """Prompts name the size of one subject, and of two neither: there both sizes are right."""
    other = {"big": "small", "small": "big"}
    shares = []
    for subjects, indices in ((1, range(24)), (2, range(1, 49, 2))):
        pairs = [pair_at(8, i, "held_out", subjects=subjects, complete=True) for i in indices]
        resized = [
            pair.scene._replace(
                placements=tuple(one._replace(size=other[one.size]) for one in pair.scene.placements)
            )
            for pair in pairs
        ]
        drawn = np.stack([np.asarray(draw_scene(scene, 64, 64)) for scene in resized])
        (found,) = judge_all({"resized": drawn}, pairs).values()
        shares.append((found.subject().value, found.scene().value, found.swapped().value))
    assert shares[0][0] < 0.7 and shares[0][1] < 0.95
    assert shares[1] == (1.0, 1.0, 0.0)


def test_a_picture_of_another_size_is_not_judged():
    with pytest.raises(ValueError, match="wanted uint8"):
        judge_all({"small": np.zeros((1, 32, 32, 3), np.uint8)}, [pair_at(0, 0, "held_out")])


def test_the_tokenizer_writes_any_text():
    tokenizer = tokenizer_of(EMOJI, conversations=200)
    for text in ("the fox on the left", "zyzzyva in żółw, 狐狸!"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_a_conversation_is_about_its_pictures():
    for index in range(40):
        talk = EMOJI.talk(0, index, "train", np.random.default_rng(index))
        assert len(talk.pictures) == 1 + index % 2
        assert all(isinstance(picture, Image.Image) for picture in talk.pictures)
        pair = pair_at(0, index, subjects=2)
        answers = dict(talk.questions)
        if talk.prompt is not None and index % 2:
            left = next(i for i, one in enumerate(pair.scene.placements) if one.position == "left")
            assert answers["which is left?"] == ("first", "second")[left]
        if talk.prompt is None:
            assert answers["name the first"] == pair.scene.placements[0].subject.name
