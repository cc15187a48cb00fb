"""What a source holds and what its records will take: `data describe`."""

import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from squeeze_jax.config import Config
from squeeze_jax.data.chat import build_input, load_tokenizer, tile_grid
from squeeze_jax.data.codec import CODECS
from squeeze_jax.data.images import nearest_size, reference_size
from squeeze_jax.data.record_writer import Example
from squeeze_jax.data.sources import open_source
from squeeze_jax.data.sources.contract import Examples, Options, captions_of, parts_of
from squeeze_jax.errors import InputError
from squeeze_jax.interop.load import encoder_folder, internvl_source

SHOWN = 16
"""Examples that are read: their sizes are told, and they are on the contact sheet."""
MEASURED = 10_000
"""Most examples whose captions' tokens are counted, evenly spread."""
IMAGE_TOKENS, TILE = 256, 448
"""Of InternVL3: tokens of a tile, and its side in pixels."""


@dataclass
class Captions:
    """Lengths in text tokens, template included."""

    measured: int
    limit: int
    """`data.max_text_tokens`."""
    too_long: int
    """Of those that were measured."""
    tokens: dict[str, int]
    """min, median, p95, max and mean."""
    tokenizer: str


@dataclass
class Description:
    """What is known of a source without making records of it."""

    source: str
    rows: int
    examples: int
    kept: int
    dropped: dict[str, int]
    """Reason → examples."""
    problems: list[str]
    """The first rows that cannot be used."""
    warnings: list[str]
    captions: Captions | None = None
    sizes: dict[str, dict[str, int]] = field(default_factory=dict)
    """`target` and `reference` → width x height → pictures, of the examples that were read."""
    unreadable: list[str] = field(default_factory=list)
    """Of the examples that were read, those that could not be."""
    disk: dict[str, int] = field(default_factory=dict)
    """Codec and layers kept → bytes of all records, before shards are compressed."""


def describe(text: str, options: Options, config: Config) -> tuple[Description, Image.Image]:
    """A source and a sheet of `SHOWN` of its examples. config: its limits, tokenizer and sizes."""
    opened = open_source(text, options._replace(skip_bad=True))
    rows, report = opened.rows, opened.report
    found = Description(
        text,
        report.rows,
        report.examples,
        report.kept,
        dict(report.dropped),
        report.listed(),
        [line for line in report.warnings if not line.startswith("skipped ")],
    )
    if not len(rows):
        return found, Image.new("RGB", (1, 1), "white")
    shown: list[tuple[str, Example | str]] = []
    looked_at = spread(rows)
    first = rows.between(0, looked_at[-1] + 1, rows.source)
    for index in looked_at:
        try:
            shown.append((rows.name(index), first[index]))
        except InputError as error:
            shown.append((rows.name(index), str(error)))
            found.unreadable.append(str(error))
    examples = [example for _, example in shown if isinstance(example, Example)]
    found.sizes = {
        "target": _count_sizes([example.target for example in examples]),
        "reference": _count_sizes([r for example in examples for r in example.references]),
    }
    found.captions = measure_captions(rows, config)
    if examples:
        records = round(len(rows) * found.captions.measured / min(MEASURED, len(rows)))
        found.disk = disk(records, examples, found.captions.tokens["mean"], config)
    return found, contact_sheet(shown)


def spread(rows: Examples) -> list[int]:
    """The examples to show: over all of a list, near the beginning where parts are read in
    order."""
    count = min(SHOWN, len(rows))
    if parts_of(rows) is None:
        return [index * len(rows) // count for index in range(count)]
    return [index * min(3, len(rows) // count) for index in range(count)]


def _count_sizes(images: Sequence[Image.Image]) -> dict[str, int]:
    return dict(Counter(f"{image.width}x{image.height}" for image in images).most_common())


def measure_captions(rows: Examples, config: Config) -> Captions:
    """Counts the text tokens of the captions of at most `MEASURED` examples."""
    data, count = config.data, min(MEASURED, len(rows))
    tokenizer = load_tokenizer(encoder_folder(config.model.mllm, "mllm"))
    lengths = []
    for place in range(count):
        index = place * len(rows) // count
        images = [0] * rows.references(index)
        for caption in captions_of(rows, index):
            ids = build_input(tokenizer, caption, images, data.system_text, max_text_tokens=2**62)
            lengths.append(len(ids))
    tokens = np.array(lengths)
    shares = {"min": 0.0, "median": 0.5, "p95": 0.95, "max": 1.0}
    return Captions(
        len(lengths),
        data.max_text_tokens,
        int((tokens > data.max_text_tokens).sum()),
        {name: int(np.quantile(tokens, share)) for name, share in shares.items()}
        | {"mean": round(tokens.mean())},
        str(config.model.mllm),
    )


def disk(count: int, examples: Sequence[Example], text: int, config: Config) -> dict[str, int]:
    """Bytes of `count` records like these examples, by codec and by which layers they keep."""
    data, width = config.data, config.aggregator.width
    mllm = internvl_source(config.model.mllm).config
    tile, per_tile = TILE, IMAGE_TOKENS  # of InternVL3, unless the config has another at hand
    if mllm.text.hidden_size == width:
        tile, per_tile = mllm.vision.image_size, mllm.image_tokens
    image = latents = 0.0
    for example in examples:
        for picture in example.references:
            rows, columns = tile_grid(picture.height, picture.width, tile, data.max_tiles)
            image += per_tile * (rows * columns + (rows * columns > 1))
            latents += np.prod(
                reference_size(picture.height, picture.width, data.reference_long_side)
            )
        sizes = list(data.buckets) or [(data.height, data.width)]
        latents += np.prod(nearest_size(example.target.height, example.target.width, sizes))
    channels = config.model.dit.in_channels // 4
    of_latents = latents / len(examples) / config.model.latent_pixels**2 * channels * 4
    kept = {"all": config.aggregator.layers[-1] + 1, "read": len(config.aggregator.reads)}
    return {
        f"{name} {which}": int(
            count
            * (of_latents + layers * (text + image / len(examples)) * _token_bytes(name, width))
        )
        for name in CODECS
        for which, layers in kept.items()
    }


def _token_bytes(codec: str, width: int) -> int:
    """Bytes of one token's hidden state of one layer."""
    layout = CODECS[codec].layout(width).values()
    return sum(np.dtype(kind).itemsize * int(np.prod(size)) for kind, size in layout)


CELL, LINES = 160, 5
"""Side of a picture on the sheet in pixels, and lines of a caption."""


def contact_sheet(shown: Sequence[tuple[str, Example | str]]) -> Image.Image:
    """Four columns; each cell has a first reference, the target and the caption, or what is
    wrong."""
    columns, font = 4, ImageFont.load_default(10)
    height = CELL + 13 * (LINES + 1) + 6
    rows = -(-len(shown) // columns)
    sheet = Image.new("RGB", (columns * (2 * CELL + 8), rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (name, example) in enumerate(shown):
        x, y = place % columns * (2 * CELL + 8), place // columns * height
        said = example
        if isinstance(example, Example):
            for offset, image in (
                (0, next(iter(example.references), None)),
                (CELL, example.target),
            ):
                if image is not None:
                    sheet.paste(ImageOps.contain(image, (CELL, CELL)), (x + offset, y))
            said = example.prompt
        lines = [name, *textwrap.wrap(str(said), 58, max_lines=LINES)]
        draw.multiline_text((x + 2, y + CELL + 2), "\n".join(lines), "black", font, spacing=2)
    return sheet
