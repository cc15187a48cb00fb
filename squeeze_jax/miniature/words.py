"""Words about critters: prompts for scenes, captions of references, questions with answers.

The vocabulary is small (under 120 words) and a sentence names every factor it speaks of by that
factor's own word, so two scenes never share a prompt. Captions and answers leave the fine factors
out (`FINE_FACTORS`).
"""

import numpy as np

from squeeze_jax.miniature.factors import POSES, SCENE_FACTORS, SUBJECT_FACTORS, Scene, Subject

_PLACE = {
    "beach": "on the beach",
    "forest": "in the forest",
    "city": "in the city",
    "snow": "in the snow",
    "desert": "in the desert",
    "meadow": "in the meadow",
}
_TIME = {"day": "by day", "sunset": "at sunset", "night": "at night"}
_ACCESSORY = {
    "balloon": "with a red balloon",
    "flag": "with a blue flag",
    "box": "with a yellow box",
    "cape": "with a purple cape",
    "board": "with a green board",
}
_POSITION = {"left": "on the left", "middle": "in the middle", "right": "on the right"}

_PROMPTS = (
    "a {size} critter {pose} {place} {time}, {accessory}, {position}",
    "{place} {time}, a {size} critter {pose} {position}, {accessory}",
    "{position}, a {size} critter {accessory}, {pose} {place} {time}",
)


def _scene_phrases(scene: Scene) -> dict[str, str]:
    words = {
        factor: SCENE_FACTORS[factor][index]
        for factor, index in zip(Scene._fields, scene, strict=True)
    }
    return words | {
        "place": _PLACE[words["place"]],
        "time": _TIME[words["time"]],
        "accessory": _ACCESSORY[words["accessory"]],
        "position": _POSITION[words["position"]],
    }


def prompt(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """The scene in 14 to 16 words, in one of three orders (the first where there is no `rng`)."""
    template = _PROMPTS[int(rng.integers(len(_PROMPTS)))] if rng is not None else _PROMPTS[0]
    return template.format(**_scene_phrases(scene))


def _subject_words(subject: Subject) -> dict[str, str]:
    return {
        factor: SUBJECT_FACTORS[factor][index]
        for factor, index in zip(Subject._fields, subject, strict=True)
    }


def _facing(pose: int) -> str:
    return "left" if POSES[pose] == "running" else "right"


_CAPTIONS = (
    "a {pattern} {colour} {body} critter with {ears} ears and a {second} {tail} tail, {pose}",
    "a {pose} critter, {body}, {pattern} and {colour}, its ears {ears}, its tail a {second} {tail}",
    "a {body} critter {pose}, {colour} {pattern} in {second}, with a {tail} tail and {ears} ears",
)


def caption(subject: Subject, pose: int, rng: np.random.Generator | None = None) -> str:
    """What a coarse look at the reference tells: every subject factor but the fine ones, and the
    pose."""
    template = _CAPTIONS[int(rng.integers(len(_CAPTIONS)))] if rng is not None else _CAPTIONS[0]
    return template.format(**_subject_words(subject), pose=POSES[pose])


def questions(
    subject: Subject, shown: int | Scene, rng: np.random.Generator
) -> list[tuple[str, str]]:
    """Questions with short answers, in random order.

    With a pose (an int), they are about the reference picture in that pose. With a scene, they are
    about a reference picture (in whatever pose) and the scene's prompt together: what the picture
    to be made should show.
    """
    words = _subject_words(subject)
    if isinstance(shown, Scene):
        scene = _scene_phrases(shown)
        who = f"a {scene['size']} {words['pattern']} {words['colour']} {words['body']} critter with {words['ears']} ears"
        who += f" and a {words['second']} {words['tail']} tail"
        things = (scene["accessory"], scene["position"])
        critter = f"the {words['colour']} {words['body']} critter"
        asked = [
            (
                "what to draw?",
                ", ".join((f"{who}, {scene['pose']} {scene['place']} {scene['time']}", *things)),
            ),
            ("who is to be drawn?", who),
            ("where will it be?", f"{critter} is {scene['place']} {scene['time']}"),
            ("what will it do?", f"{critter} is {scene['pose']}"),
            (
                "what will it have?",
                f"{words['ears']} ears, a {words['second']} {words['tail']} tail, {things[0]}",
            ),
            (
                "on which side will it be?",
                f"the {scene['size']} {words['colour']} critter is {things[1]}",
            ),
            (
                "which coat will it have?",
                f"{words['colour']} {words['pattern']} in {words['second']}, {things[0]}",
            ),
        ]
    else:
        asked = [
            ("what is it?", caption(subject, shown)),
            ("which colour is it?", words["colour"]),
            ("which second colour does it have?", words["second"]),
            ("which coat?", f"{words['colour']} {words['pattern']} in {words['second']}"),
            ("which pattern?", words["pattern"]),
            ("which body?", words["body"]),
            ("which ears?", words["ears"]),
            ("which tail?", f"a {words['second']} {words['tail']} tail"),
            ("what does it do?", POSES[shown]),
            ("which side is it looking to?", _facing(shown)),
        ]
    return [asked[i] for i in rng.permutation(len(asked))]
