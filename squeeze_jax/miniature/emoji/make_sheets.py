"""Makes the sheets of pictures beside this file from a folder of Noto Emoji.

    npm pack emoji-datasource-google@16.0.0 && tar xzf emoji-datasource-google-16.0.0.tgz
    python -m squeeze_jax.miniature.emoji.make_sheets package

The package has one PNG of 64 x 64 pixels an emoji (Google's Noto Emoji, Apache-2.0) and a list with
their names and categories. Taken are things, animals, plants, food, vehicles, buildings and faces;
left out are flags, signs, clocks, arrows, letters, people, and whatever looks like one that is
taken already (our decision).
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 64
COLUMNS = 16

CATEGORIES = {
    "animal": "animal-mammal animal-bird animal-amphibian animal-reptile animal-marine animal-bug",
    "plant": "plant-flower plant-other",
    "food": "food-fruit food-vegetable food-prepared food-asian food-marine food-sweet drink",
    "vehicle": "transport-ground transport-water transport-air",
    "building": "place-building place-religious place-other place-geographic",
    "toy": "event game sport award-medal arts_&_crafts sky_&_weather other-object",
    "clothing": "clothing",
    "instrument": "musical-instrument sound music",
    "device": "phone computer light_&_video science medical",
    "tool": "tool household lock dishware office writing mail money book-paper",
    "face": "face-affection face-concerned face-costume face-glasses face-hand face-hat "
    "face-negative face-neutral-skeptical face-sleepy face-smiling face-tongue face-unwell "
    "cat-face monkey-face",
}
"""A category's name, which prompts may use as a noun, to the list's subcategories."""

LEFT_OUT = re.compile(
    r"\b(flag|sign|symbol|clock|watch|arrow|letter|moon|chart|calendar|atm|traffic light|busstop|"
    r"bus stop|label|tag|ticket|tickets|note|notes|card|cards|index|clipboard|bookmark|"
    r"speech|mahjong|joker|receipt|page|document|newspaper|mailbox|envelope|e-mail|"
    r"construction|barrier|crossing|track|railway|motorway|cityscape|sunrise|sunset|night|"
    r"fireworks|sparkler|fog|map|bridge at|milky|inbox|outbox|closed|open lock|floppy|volume|"
    r"muted|mute|low|loud|banknote|vibration|silhouette|number|hole|tanabata|carp|"
    r"without mouth|decoration|shinto|kaaba|slot|placard|ballot|station|person|woman|man|womans|womens)\b",
    re.IGNORECASE,
)
"""Names with one of these words are no pictures of one nameable thing, or hold letters."""

FACES = frozenset(
    [
        "face-affection",
        "face-concerned",
        "face-glasses",
        "face-hand",
        "face-hat",
        "face-negative",
        "face-neutral-skeptical",
        "face-sleepy",
        "face-smiling",
        "face-tongue",
        "face-unwell",
    ]
)
"""Subcategories whose names are adjectives."""

ALIKE = 0.085
"""Pictures whose thumbnails of 12 x 12 pixels are nearer than this (root mean square, 0 to 1, on
grey) count as one."""


def name_of(row: dict) -> str:
    """The words that a prompt may use: `FOX FACE` → `fox`."""
    name = row["name"].lower().replace("-", " ").replace("’", "")
    name = re.sub(r"\b(face|head|front|emoji|black|white|heavy|with .*|of .*|and .*)\b", "", name)
    name = re.sub(r"[^a-z ]", "", name)
    if row["subcategory"] in FACES:
        name += " face"
    return " ".join(name.split()) or row["short_name"].replace("-", " ").replace("_", " ")


def thumbnail(picture: Image.Image) -> np.ndarray:
    ground = Image.new("RGBA", picture.size, (128, 128, 128, 255))
    ground.alpha_composite(picture)
    small = ground.convert("RGB").resize((12, 12), Image.Resampling.BOX)
    return np.asarray(small, np.float32) / 255


def cropped(picture: Image.Image) -> Image.Image:
    """The drawing alone, scaled so that its longer side fills the square."""
    drawing = picture.crop(
        picture.getchannel("A").point([255 * (a > 8) for a in range(256)]).getbbox()
    )
    scale = SIDE / max(drawing.size)
    size = [max(1, round(side * scale)) for side in drawing.size]
    drawing = drawing.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")
    whole = Image.new("RGBA", (SIDE, SIDE))
    whole.paste(drawing, ((SIDE - size[0]) // 2, (SIDE - size[1]) // 2))
    return whole


def main(folder: Path) -> None:
    rows = json.loads((folder / "emoji.json").read_text())
    category = {
        sub.replace("_", " "): name for name, subs in CATEGORIES.items() for sub in subs.split()
    }
    rows = [
        row
        for row in sorted(rows, key=lambda row: row["sort_order"])
        if row["has_img_google"]
        and row["subcategory"] in category
        and not LEFT_OUT.search(row["name"])
    ]
    taken: dict[str, list[tuple[str, Image.Image]]] = {name: [] for name in CATEGORIES}
    thumbnails: list[np.ndarray] = []
    names: set[str] = set()
    for row in rows:
        picture = cropped(Image.open(folder / "img/google/64" / row["image"]).convert("RGBA"))
        small, name = thumbnail(picture), name_of(row)
        if name in names:
            name = re.sub(r"[^a-z ]", "", row["short_name"].replace("-", " ").replace("_", " "))
        alike = any(np.sqrt(np.square(small - other).mean()) < ALIKE for other in thumbnails)
        if alike:
            continue
        thumbnails.append(small)
        names.add(name)
        taken[category[row["subcategory"]]].append((name, picture))
    here = Path(__file__).parent
    for kind, subjects in taken.items():
        lines = -(-len(subjects) // COLUMNS)
        sheet = Image.new("RGBA", (COLUMNS * SIDE, lines * SIDE))
        for place, (_, picture) in enumerate(subjects):
            sheet.paste(picture, (place % COLUMNS * SIDE, place // COLUMNS * SIDE))
        sheet.save(here / f"{kind}.webp", lossless=True, quality=100, method=6)
    words = {kind: [name for name, _ in subjects] for kind, subjects in taken.items()}
    (here / "names.json").write_text(json.dumps(words, indent=1) + "\n")
    print({kind: len(names) for kind, names in words.items()}, sum(map(len, words.values())))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
