"""Words about scenes of emoji: prompts in many forms, and questions with one form of answer.

A prompt speaks of some of a scene's factors, in one of several ways each, in any order; what it
leaves out is free. A *form* is the order of a prompt's parts with its opening and its verb; one
form in five is held out from training (by a hash), so that an exam can ask in sentences that were
never heard. The tables are our decision.
"""

import zlib
from typing import NamedTuple

import numpy as np

from squeeze_jax.miniature.emoji.scenes import Placement, Scene
from squeeze_jax.miniature.emoji.subjects import Split, colour_of

OPENINGS = (
    "", "", "a picture of ", "a drawing of ", "draw ", "please draw ", "paint ", "show me ",
    "show ", "an image of ", "i want to see ", "make a picture of ", "a photo of ",
    "an illustration of ", "let us see ", "create ", "generate ", "imagine ", "can you draw ",
    "here is ",
)  # fmt: skip
VERBS = ("", "", "is ", "standing ", "placed ", "seen ", "sitting ", "resting ", "put ")

PLACES = {
    "beach": ("on the beach", "at the beach", "by the sea", "on the sand", "at the seaside"),
    "forest": ("in the forest", "in a forest", "in the woods", "among the trees", "between trees"),
    "city": ("in the city", "in a city", "in town", "in front of houses", "on a street"),
    "snow": ("in the snow", "on snow", "in winter", "in the snowy mountains", "where it is snowy"),
    "desert": ("in the desert", "in a desert", "on the dunes", "among sand dunes", "in dry land"),
    "meadow": ("in the meadow", "on a meadow", "on the grass", "in a field", "on green hills"),
}
TIMES = {
    "day": ("by day", "in daylight", "at noon", "on a sunny day", "in the daytime"),
    "sunset": ("at sunset", "in the evening", "at dusk", "while the sun sets", "under a red sky"),
    "night": ("at night", "by night", "in the dark", "under the moon", "after dark"),
}
POSITIONS = {
    "left": ("on the left", "at the left", "on the left side", "to the left"),
    "middle": ("in the middle", "in the centre", "at the centre", "in the center"),
    "right": ("on the right", "at the right", "on the right side", "to the right"),
}
SIZES = {
    "big": ("big", "large", "huge", "great"),
    "small": ("small", "little", "tiny", "mini"),
}
POSES = {
    "upright": ("upright", "straight", "standing straight", "not turned"),
    "leaning left": ("leaning left", "tilted to the left", "leaning to the left"),
    "leaning right": ("leaning right", "tilted to the right", "leaning to the right"),
    "upside down": ("upside down", "on its head", "turned over", "flipped over"),
    "mirrored": ("mirrored", "facing the other way", "turned around", "looking the other way"),
}
THINGS = {
    "nothing": ("with nothing else", "alone", "all alone", "by itself"),
    "balloon": ("with a red balloon", "with a balloon", "beside a balloon", "next to a balloon"),
    "flag": ("with a blue flag", "with a flag", "beside a flag", "next to a flag"),
    "box": ("with a yellow box", "with a box", "beside a box", "next to a box"),
    "ball": ("with a green ball", "with a ball", "beside a ball", "next to a ball"),
    "star": ("with a purple star", "with a star", "beside a star", "next to a star"),
}
ONE = ("it", "this", "this one", "the same", "the same one", "the subject", "this thing")
"""A single subject without its name."""
DETERMINERS = ("the", "the", "a", "this", "my", "that")
FIRST = ("the first one", "the first", "the first thing", "picture one", "the first picture")
SECOND = ("the second one", "the second", "the second thing", "picture two", "the second picture")

PAIRS = (
    "{a} on the left and {b} on the right",
    "{b} on the right and {a} on the left",
    "{a} on the left, {b} on the right",
    "{a} to the left of {b}",
    "{b} to the right of {a}",
    "{a} left, {b} right",
    "left {a}, right {b}",
    "on the left {a}, on the right {b}",
    "on the right {b}, on the left {a}",
    "{a} at the left side and {b} at the right side",
    "{a} beside {b}, {a} on the left",
    "{a} and {b}, {b} on the right",
    "{a} next to {b}, {b} at the right",
    "{a} with {b} to its right",
    "{b} with {a} to its left",
    "{a} and {b} together, {a} at the left",
)
"""How two subjects are placed: {a} is on the left."""


class Prompt(NamedTuple):
    """A sentence, and what it says of its scene."""

    text: str
    said: frozenset[str]
    """The factors of `FACTORS` that it names; others are free."""


def is_held_out_form(form: str) -> bool:
    """Whether training never sees this form: one in five, by a checksum."""
    return zlib.crc32(form.encode()) % 5 == 0


def write_prompt(
    scene: Scene, rng: np.random.Generator, split: Split, complete: bool = False
) -> Prompt:
    """A random sentence about the scene; two subjects are named in the order of `placements`,
    or as the first and the second, where `scene.placements` lists the references in order.

    split: training uses forms that are not held out, the others those that are. complete: the
    sentence leaves nothing out.
    """
    while True:
        form, prompt = _attempt(scene, rng, complete)
        if is_held_out_form(form) == (split != "train"):
            return prompt


def _attempt(scene: Scene, rng: np.random.Generator, complete: bool) -> tuple[str, Prompt]:
    def one_of(values: tuple[str, ...]) -> str:
        return values[int(rng.integers(len(values)))]

    two = len(scene.placements) == 2
    parts = {
        "place": one_of(PLACES[scene.place]),
        "time": one_of(TIMES[scene.time]),
    }
    if not two:
        parts |= {
            "thing": one_of(THINGS[scene.thing]),
            "pose": one_of(POSES[scene.placements[0].pose]),
            "position": one_of(POSITIONS[scene.placements[0].position]),
        }
    # Two prompts in five say everything, so that enough of each factor is heard.
    whole = rng.random() < 0.4 or complete
    kept = [name for name in parts if whole or rng.random() < 0.65]
    order = [kept[i] for i in rng.permutation(len(kept))]
    said = set(order)
    opening, verb = one_of(OPENINGS), one_of(VERBS)
    if two:
        subject, how = _two_subjects(scene.placements, rng)
        said |= {"position"}
        verb = ""
    else:
        sized = whole or rng.random() < 0.6
        subject = _one_subject(scene.placements[0], sized, rng)
        how = ""
        if sized:
            said |= {"size"}
    # Up to one part may come first: "at night, the fox is on the beach".
    front = int(bool(order) and rng.random() < 0.3)
    opening = "" if front else opening
    glue = one_of((" ", ", "))
    tail = glue.join(parts[name] for name in order[front:])
    head = "".join(parts[name] + ", " for name in order[:front])
    joint = glue if two else " "
    text = f"{head}{opening}{subject}{joint if tail else ''}{verb if tail else ''}{tail}"
    form = "|".join([opening, verb, how, glue, str(front), *order])
    return form, Prompt(" ".join(text.split()), frozenset(said))


def _noun(subject: Placement, rng: np.random.Generator) -> str:
    """Its name, or its category as a noun."""
    kind = subject.subject.category
    return subject.subject.name if rng.random() < 0.7 else kind


def _one_subject(one: Placement, sized: bool, rng: np.random.Generator) -> str:
    sizes = SIZES[one.size]
    size = sizes[int(rng.integers(len(sizes)))]
    if rng.random() < 0.25:
        word = ONE[int(rng.integers(len(ONE)))]
        return f"{word}, {size}," if sized else word
    determiner = DETERMINERS[int(rng.integers(len(DETERMINERS)))]
    noun = _noun(one, rng)
    return f"{determiner} {size} {noun}" if sized else f"{determiner} {noun}"


def _two_subjects(placements: tuple[Placement, ...], rng: np.random.Generator) -> tuple[str, str]:
    """The phrase, and its template."""
    template = PAIRS[int(rng.integers(len(PAIRS)))]
    names = [one.subject.name for one in placements]
    kinds = [one.subject.category for one in placements]
    way = rng.random()
    if way < 0.35 or names[0] == names[1]:
        words = [FIRST[int(rng.integers(len(FIRST)))], SECOND[int(rng.integers(len(SECOND)))]]
    elif way < 0.55 and kinds[0] != kinds[1]:
        words = [f"the {kind}" for kind in kinds]
    else:
        words = [f"the {name}" for name in names]
    on_left = 0 if placements[0].position == "left" else 1
    return template.format(a=words[on_left], b=words[1 - on_left]), template


# --- what the MLLM is asked
# -----------------------------------------------------------------------------------------------


def describe(one: Placement) -> str:
    """What a coarse look tells: the main colour, the name, the category."""
    return f"{colour_of(one.subject, one.look)} {one.subject.name}, {one.subject.category}"


def questions_about_references(
    placements: tuple[Placement, ...], rng: np.random.Generator
) -> list[tuple[str, str]]:
    """Questions about the pictures alone, with their answers, in random order."""
    asked: list[tuple[str, str]] = []
    for one, which in zip(placements, ("first", "second"), strict=False):
        asked += [
            (f"what is the {which}?", describe(one)),
            (f"which colour is the {which}?", colour_of(one.subject, one.look)),
            (f"of what kind is the {which}?", one.subject.category),
            (f"name the {which}", one.subject.name),
        ]
    return [asked[i] for i in rng.permutation(len(asked))]


def questions_about_scene(
    scene: Scene, said: frozenset[str], rng: np.random.Generator
) -> list[tuple[str, str]]:
    """Questions about the picture that a prompt asks for; what it leaves out is `any`."""

    def value(factor: str, word: str) -> str:
        return word if factor in said else "any"

    first = scene.placements[0]
    place, time = value("place", scene.place), value("time", scene.time)
    asked = [("where?", place), ("when?", time)]
    if len(scene.placements) == 2:
        left = 0 if first.position == "left" else 1
        by_side = (scene.placements[left], scene.placements[1 - left])
        order = ("first", "second") if left == 0 else ("second", "first")
        for side, one, which in zip(("left", "right"), by_side, order, strict=True):
            asked += [
                (f"which is {side}?", which),
                (f"what is {side}?", f"{which}, {describe(one)}"),
            ]
        everything = (f"{describe(by_side[0])} left", f"{describe(by_side[1])} right")
        asked.append(("what to draw?", ", ".join([*everything, place, time])))
    else:
        pose, size = value("pose", first.pose), value("size", first.size)
        position, thing = value("position", first.position), value("thing", scene.thing)
        asked += [
            ("with what?", thing),
            ("what?", describe(first)),
            ("which side?", position),
            ("how big?", size),
            ("how?", pose),
            (
                "what to draw?",
                ", ".join([describe(first), size, pose, position, place, time, thing]),
            ),
        ]
    return [asked[i] for i in rng.permutation(len(asked))]
