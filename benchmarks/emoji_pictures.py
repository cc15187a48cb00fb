"""The pictures of the miniature of emoji: references that ship, and sheets for README and docs.

python benchmarks/emoji_pictures.py references           # squeeze_jax/demo_emoji/references
python benchmarks/emoji_pictures.py sheet [CHECKPOINT]   # docs/emoji.png
python benchmarks/emoji_pictures.py free [CHECKPOINT]    # docs/emoji_prompts.png
"""

import argparse
import json
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from squeeze_jax.data.images import load_image
from squeeze_jax.data.record_writer import Example
from squeeze_jax.evaluation.grids import sample_examples
from squeeze_jax.interop.load import EMOJI
from squeeze_jax.miniature.emoji.evaluation import PARTS, pairs_of
from squeeze_jax.miniature.emoji.scenes import draw_reference, draw_view
from squeeze_jax.miniature.emoji.subjects import subjects_of
from squeeze_jax.sampling.pipeline import Pipeline, Settings

ROOT = Path(__file__).parents[1]
REFERENCES = EMOJI / "references"
SHOWN = (
    "zebra", "wolf", "eagle", "rose", "blueberries", "waffle", "hiking boot", "accordion", "drum",
    "ghost", "package", "postbox",
)  # fmt: skip
"""Held-out subjects that ship as references."""
FREE = ROOT / "benchmarks" / "emoji_prompts.json"
"""Prompts that were written without a look at the grammar: `prompt`, `image_paths`."""
SCALE = 2


def write_references() -> None:
    REFERENCES.mkdir(parents=True, exist_ok=True)
    known = {subject.name: subject for subject in subjects_of("held_out")}
    for number, name in enumerate(SHOWN):
        view = draw_view(np.random.default_rng(number), away_from="")
        path = REFERENCES / f"{name.replace(' ', '-')}.png"
        draw_reference(known[name], 0, view).save(path)
        print(path)


def sheet_of(columns: list[list[Image.Image]], captions: list[str], path: Path) -> None:
    """Columns of pictures, centred, with a caption below each."""
    wide, gap = 96 * SCALE, 8
    rows = max(map(len, columns))
    high = [max(c[r].height for c in columns if r < len(c)) * SCALE + gap for r in range(rows)]
    page = Image.new("RGB", (len(columns) * (wide + gap), sum(high) + 108), "white")
    draw = ImageDraw.Draw(page)
    for place, (column, caption) in enumerate(zip(columns, captions)):
        left, top = place * (wide + gap), 0
        for row, picture in enumerate(column):
            size = (picture.width * SCALE, picture.height * SCALE)
            big = picture.resize(size, Image.Resampling.NEAREST)
            page.paste(big, (left + (wide - size[0]) // 2, top))
            top += high[row]
        lines = textwrap.wrap(caption, 30)[:6]
        draw.multiline_text((left + 4, sum(high)), "\n".join(lines), "black", font_size=13)
    page.save(path)
    print(path)


def side_by_side(pictures: list[Image.Image]) -> Image.Image:
    """References in a row, brought to one picture of 96 pixels at most."""
    row = Image.new("RGB", (sum(p.width for p in pictures) + 4 * (len(pictures) - 1), 64), "white")
    left = 0
    for picture in pictures:
        row.paste(picture, (left, 0))
        left += picture.width + 4
    row.thumbnail((96, 64))
    return row


def draw_sheet(checkpoint: str) -> None:
    """One subject, then two: references, what is drawn, the true target."""
    pipeline = Pipeline.load(checkpoint)
    columns, captions = [], []
    for part, count in ((PARTS[0], 5), (PARTS[4], 4)):
        pairs = pairs_of(part, count)
        examples = [Example(p.prompt.text, p.references(), p.target()) for p in pairs]
        height, width = part.size
        drawn = sample_examples(pipeline, examples, Settings(height=height, width=width))
        for example, picture in zip(examples, drawn):
            shown = side_by_side(example.references)
            columns.append([shown, Image.fromarray(picture), example.target])
            captions.append(example.prompt)
    sheet_of(columns, captions, ROOT / "docs" / "emoji.png")


def draw_free(checkpoint: str) -> None:
    """Prompts in anybody's words: references, and what is drawn."""
    pipeline = Pipeline.load(checkpoint)
    rows = json.loads(FREE.read_text(encoding="utf-8"))
    columns, captions = [], []
    for row in rows:
        references = [load_image(REFERENCES / name) for name in row["image_paths"]]
        example = Example(row["prompt"], references, references[0])
        size = (64, 96) if len(references) == 2 else (64, 64)
        picture = sample_examples(pipeline, [example], Settings(height=size[0], width=size[1]))[0]
        columns.append([side_by_side(references), Image.fromarray(picture)])
        captions.append(row["prompt"])
    half = len(columns) // 2
    parts = []
    for name, chosen in (("a", slice(0, half)), ("b", slice(half, None))):
        parts.append(ROOT / "docs" / f"emoji_prompts_{name}.png")
        sheet_of(columns[chosen], captions[chosen], parts[-1])
    pages = [Image.open(part) for part in parts]
    whole = Image.new("RGB", (max(p.width for p in pages), sum(p.height for p in pages)), "white")
    whole.paste(pages[0], (0, 0))
    whole.paste(pages[1], (0, pages[0].height))
    whole.save(ROOT / "docs" / "emoji_prompts.png")
    for part in parts:
        part.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("references", "sheet", "free"))
    parser.add_argument("checkpoint", nargs="?", default="emoji")
    given = parser.parse_args()
    if given.what == "references":
        write_references()
    else:
        {"sheet": draw_sheet, "free": draw_free}[given.what](given.checkpoint)


if __name__ == "__main__":
    main()
