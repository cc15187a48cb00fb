"""Training batches straight from pictures and prompts, for programs that run the frozen encoders
themselves.

The order of examples is that of records (`pipeline.py`); decoding, resizing and tokenising happen
in threads.
"""

from collections.abc import Sequence
from hashlib import sha256
from typing import Any, NamedTuple

import grain
import numpy as np
from PIL import Image

from squeeze_jax.batch import RawBatch
from squeeze_jax.config import Config
from squeeze_jax.data.buckets import Bucket, Padding, first_records
from squeeze_jax.data.chat import build_input, load_tokenizer, pad_inputs, tile_pixels
from squeeze_jax.data.images import resize_for_reference, resize_for_target, to_uint8
from squeeze_jax.data.mllm import bucket
from squeeze_jax.data.order import Order
from squeeze_jax.data.pipeline import Arrays, BatchIterator
from squeeze_jax.data.sources import Examples
from squeeze_jax.data.sources.contract import captions_of, parts_of
from squeeze_jax.errors import InputError
from squeeze_jax.interop.load import encoder_folder, internvl_source

THREADS = 8
"""That read pictures ahead (our decision)."""


class RawShape(NamedTuple):
    """The sizes that all batches of raw examples share."""

    references: int
    """Most references of an example."""
    reference_size: tuple[int, int]
    """Height and width of all of them, in pixels."""
    text: int
    """Text tokens to pad to."""


class ReadRaw:
    """Numbers of captions, counted over all examples, to the arrays of a `RawBatch`."""

    def __init__(self, rows: Examples, config: Config) -> None:
        self.rows, self.data = rows, config.data
        self.captions = [len(captions_of(rows, index)) for index in range(len(rows))]
        self.first = first_records(self.captions)
        folder = encoder_folder(config.model.mllm, "mllm")
        self.tokenizer, mllm = load_tokenizer(folder), internvl_source(folder).config
        self.tile, self.per_tile = mllm.vision.image_size, mllm.image_tokens
        self.shape = self._shape()

    def _shape(self) -> RawShape:
        """From every prompt and number of references, and the first reference's size; no other
        picture is looked at."""
        counts = [self.rows.references(i) for i in range(len(self.rows))]
        first = next((i for i, count in enumerate(counts) if count), None)
        if first is None:
            raise InputError(
                "no example has a reference; on-line extraction is for examples with references"
            )
        size = resize_for_reference(
            self.rows[first].references[0], self.data.reference_long_side
        ).shape[:2]
        asked = {
            (caption, count): i
            for i, count in enumerate(counts)
            for caption in captions_of(self.rows, i)
        }
        text = 0
        for (prompt, count), row in asked.items():
            try:
                text = max(
                    text, len(self._ids(prompt, [self.per_tile] * count)) - count * self.per_tile
                )
            except InputError as error:
                raise InputError(f"{self.rows.name(row)}: {error}") from None
        return RawShape(max(counts), (size[0], size[1]), bucket(text, self.data.max_text_tokens))

    def _ids(self, prompt: str, images: Sequence[int]) -> list[int]:
        data = self.data
        return build_input(
            self.tokenizer,
            prompt,
            images,
            data.system_text,
            max_text_tokens=data.max_text_tokens,
        )

    def __call__(self, numbers: tuple[int, np.ndarray]) -> Arrays:
        wanted, data, shape = numbers[1].tolist(), self.data, self.shape
        most = shape.references * data.tiles_per_reference
        arrays: Arrays = {
            "target": np.zeros((len(wanted), data.height, data.width, 3), np.uint8),
            "references": np.zeros(
                (len(wanted), shape.references, *shape.reference_size, 3), np.uint8
            ),
            "reference_count": np.zeros(len(wanted), np.int32),
            "tiles": np.zeros((len(wanted), most, self.tile, self.tile, 3), np.uint8),
            "index": np.array(wanted, np.int32),
        }
        sequences = []
        for row, caption in enumerate(wanted):
            number = int(np.searchsorted(self.first, caption, side="right")) - 1
            example = self.rows[number]
            captions = (example.prompt, *example.other_captions)
            arrays["target"][row] = to_uint8(
                resize_for_target(example.target, data.height, data.width)
            )
            tiles = [tile_pixels(image, self.tile, data.max_tiles) for image in example.references]
            for place, image in enumerate(example.references):
                arrays["references"][row, place] = self._reference(image, number)
            arrays["reference_count"][row] = len(example.references)
            if tiles:
                arrays["tiles"][row, : sum(map(len, tiles))] = np.concatenate(tiles)
            sequences.append(
                self._ids(
                    captions[caption - self.first[number]],
                    [self.per_tile * len(of_image) for of_image in tiles],
                )
            )
        ids, valid = pad_inputs(sequences, shape.text + most * self.per_tile)
        return arrays | {"ids": ids, "valid": valid}

    def _reference(self, image: Image.Image, number: int) -> np.ndarray:
        pixels = to_uint8(resize_for_reference(image, self.data.reference_long_side))
        if pixels.shape[:2] != self.shape.reference_size:
            here, there = (
                "x".join(map(str, size)) for size in (pixels.shape[:2], self.shape.reference_size)
            )
            raise InputError(
                f"{self.rows.name(number)}: a reference becomes {here} pixels, others {there}; "
                "on-line extraction wants "
                "one size: cut the references to one aspect ratio, or extract records "
                "(data.online false)"
            )
        return pixels


def make_online(
    rows: Examples,
    config: Config,
    *,
    batch: int,
    seed: int,
    own: Sequence[int] | np.ndarray | None = None,
) -> BatchIterator:
    """Raw batches of `batch` examples, reshuffled every epoch; `own` [rows] as `rows` of
    `pipeline.make_dataset`.

    Raises InputError where a prompt is empty or too long, or references have several sizes (then
    when they are read).
    """
    if parts_of(rows) is not None:
        raise InputError(
            "data.online reads examples in any order, which archives and row groups cannot; "
            "extract records (data.online false)"
        )
    height, width = config.target_grid
    read = ReadRaw(rows, config)
    captions = np.array(read.captions) if max(read.captions) > 1 else None
    buckets = (Bucket(read.first, height * width, Padding(0, 0, 0), captions),)
    order = Order(buckets, batch, seed, np.arange(batch) if own is None else np.asarray(own))
    data = config.data
    settings = (data.height, data.width, data.reference_long_side, data.max_tiles)
    # Else the limit changes no prompt.
    cut = (data.max_text_tokens,) if data.long_captions == "cut" else ()
    described = repr((rows.source, settings, data.system_text, *cut))
    described = sha256(described.encode()).hexdigest()[:16]
    identity: dict[str, Any] = {
        "version": 1,
        "records": len(rows),
        "data": described,
        "seed": seed,
        "batch": batch,
    }
    batches = grain.MapDataset.source(order).map(read)
    said = (
        f"{len(rows):,} examples, encoded as they come; up to {read.shape.references} references "
        "of "
        + "x".join(map(str, read.shape.reference_size))
    )
    return BatchIterator(
        batches, identity, THREADS, 0, buckets, finish=lambda arrays: RawBatch(**arrays), about=said
    )
