"""What the MLLM reads: a prompt and pictures as token ids, and each picture as one normalised tile.

The form of the sequence is frozen, because feature records are made with it:

    [<|im_start|>system ⏎ SYSTEM <|im_end|> ⏎]
    <|im_start|>user ⏎ {<img> <IMG_CONTEXT> × n </img> ⏎ for every reference} PROMPT <|im_end|> ⏎

There is no assistant header and, unless asked for, no system turn: the `-hf` files of InternVL3
have no default one (the original code has). Token ids equal those of the published processor for
the same conversation.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt8
from PIL import Image

from squeeze_jax.config_data import MAX_TEXT_TOKENS
from squeeze_jax.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
IMAGE_START, IMAGE, IMAGE_END = "<img>", "<IMG_CONTEXT>", "</img>"
SPECIAL_TOKENS = (TURN_START, TURN_END, IMAGE_START, IMAGE_END, IMAGE)

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def build_input(
    tokenizer: Any,
    prompt: str,
    images: Sequence[int] = (),
    system: str | None = None,
    *,
    max_text_tokens: int = MAX_TEXT_TOKENS,
) -> list[int]:
    """Token ids of one prompt with its references.

    tokenizer: a `tokenizers.Tokenizer`, or a fast tokenizer of transformers. images: the number of
    image tokens of every reference, in order (256 a tile for InternVL3). system: the text of a
    system turn; None leaves the turn out, "" keeps it, empty. What prompt and system say is text: a
    special token's name in them is spelled out like any other word.
    Raises InputError for an empty prompt, or where the sequence has more than `max_text_tokens`
    besides its image tokens, which are never cut.
    """
    check_prompt(prompt)
    vocabulary = Vocabulary(tokenizer)
    ids: list[int] = []
    if system is not None:
        ids += vocabulary.turn("system\n" + system)
    # Text between two special tokens is encoded in one piece, as the published processor does.
    parts: list[int | str] = [vocabulary.special(TURN_START), "user\n"]
    for _ in images:
        parts += [vocabulary.special(IMAGE_START), vocabulary.special(IMAGE_END), "\n"]
    parts[-1] = f"{parts[-1]}{prompt}"
    parts += [vocabulary.special(TURN_END), "\n"]
    for part in parts:
        ids += vocabulary.text(part) if isinstance(part, str) else [part]
    check_text_length(len(ids), max_text_tokens)
    return expand_images(vocabulary, ids, images)


def check_prompt(prompt: str) -> None:
    """Raises InputError for an empty prompt."""
    if not prompt.strip():
        raise InputError("the prompt is empty; say what the picture should show")


def check_text_length(tokens: int, most: int) -> None:
    """Raises InputError where a sequence has more tokens, besides its image tokens, than `most`."""
    if tokens > most:
        raise InputError(
            f"the prompt is too long: with its template it has {tokens} text tokens, the limit "
            f"is {most}; "
            f"shorten it by about {tokens - most} tokens"
        )


def expand_images(vocabulary: "Vocabulary", ids: list[int], images: Sequence[int]) -> list[int]:
    """Puts the image tokens of each reference after its `<img>`."""
    start, image, counts = vocabulary.special(IMAGE_START), vocabulary.special(IMAGE), iter(images)
    return [
        token
        for one in ids
        for token in ([one] + [image] * next(counts) if one == start else [one])
    ]


class Vocabulary:
    """A tokenizer as the chat template needs it: text that is only text, and special tokens by
    name."""

    def __init__(self, tokenizer: Any) -> None:
        self.backend: Tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
        self.added = frozenset(self.backend.get_added_tokens_decoder())

    def text(self, text: str) -> list[int]:
        """Ids of a text, none of which is a special (or otherwise added) token, whatever the text
        says.

        Added tokens are found by the tokenizer's outermost step, which is left out here:
        normaliser, pre-tokenizer and model run one after the other. Raises InputError where a text
        is not valid Unicode, or the tokenizer makes added tokens of plain text.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError(f"the text {text!r} is not valid Unicode; retype it") from None
        backend = self.backend
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        pieces = (
            [text]
            if backend.pre_tokenizer is None
            else [p for p, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
        )
        ids = [token.id for piece in pieces for token in backend.model.tokenize(piece)]
        if clash := self.added.intersection(ids):
            raise InputError(
                f"this tokenizer makes added tokens of plain text (ids {sorted(clash)}); use "
                "another one"
            )
        return ids

    def special(self, name: str) -> int:
        """The id of a special token. Raises InputError if the tokenizer lacks it."""
        token = self.backend.token_to_id(name)
        if token is None or token not in self.added:
            raise InputError(
                f"the tokenizer has no special token {name}; it is not one of InternVL3's `-hf` "
                "layout"
            )
        return token

    def turn(self, content: str) -> list[int]:
        """One turn of a conversation; `content` begins with the role and a line break."""
        return [
            self.special(TURN_START),
            *self.text(content),
            self.special(TURN_END),
            *self.text("\n"),
        ]


def pad_inputs(
    sequences: Sequence[Sequence[int]], length: int | None = None, pad_id: int = 0
) -> tuple[Int32[np.ndarray, "B L"], Bool[np.ndarray, "B L"]]:
    """Sequences of token ids as one array, padded on the right to `length` (default: the longest),
    and the valid ones. Raises InputError where a sequence is longer than `length`."""
    longest = max(map(len, sequences))
    length = longest if length is None else length
    if longest > length:
        raise InputError(
            f"a sequence has {longest} tokens, but only {length} fit; shorten the prompt"
        )
    ids = np.full((len(sequences), length), pad_id, np.int32)
    mask = np.zeros((len(sequences), length), bool)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)], mask[row, : len(sequence)] = sequence, True
    return ids, mask


def preprocess_image(image: Image.Image, size: int) -> Float32[np.ndarray, "size size 3"]:
    """One tile of size x size pixels as the vision tower reads it: stretched, bicubic with
    antialiasing, normalised.

    Equal to `GotOcr2ImageProcessorPil` of transformers for one tile with InternVL3's published
    settings.
    """
    return normalised(np.asarray(resized(image, size, size)))


def image_tiles(
    image: Image.Image, size: int, most: int = 1
) -> Float32[np.ndarray, "tiles size size 3"]:
    """A picture as up to `most` tiles, row by row, and the whole as a last one where they are
    several.

    The same processor's dynamic tiling. With `most` 1 it is one tile (`preprocess_image`).
    """
    return normalised(tile_pixels(image, size, most))


def tile_pixels(
    image: Image.Image, size: int, most: int = 1
) -> UInt8[np.ndarray, "tiles size size 3"]:
    """`image_tiles` before their values are normalised."""
    rows, columns = tile_grid(image.height, image.width, size, most)
    pixels = np.asarray(resized(image, columns * size, rows * size)).reshape(
        rows, size, columns, size, 3
    )
    tiles = pixels.swapaxes(1, 2).reshape(-1, size, size, 3)
    if len(tiles) > 1:
        tiles = np.concatenate([tiles, np.asarray(resized(image, size, size))[None]])
    return tiles


def tile_grid(height: int, width: int, size: int, most: int) -> tuple[int, int]:
    """Rows and columns of at most `most` tiles whose shape is nearest to the picture's.

    Between equally near grids the larger one wins where the picture has more than half of its
    pixels.
    """
    grids = [
        (rows, columns) for columns in range(1, most + 1) for rows in range(1, most // columns + 1)
    ]
    best, nearest = (1, 1), float("inf")
    for rows, columns in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        distance = abs(width / height - columns / rows)
        enough = height * width > 0.5 * size * size * rows * columns
        if distance < nearest or (distance == nearest and enough):
            best, nearest = (rows, columns), distance
    return best


def resized(image: Image.Image, width: int, height: int) -> Image.Image:
    """An RGB picture of this size in pixels, bicubic as InternVL's processor has it."""
    return image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)


def normalised(pixels: UInt8[np.ndarray, "*B 3"]) -> Float32[np.ndarray, "*B 3"]:
    """0 .. 255 to ImageNet's mean 0 and deviation 1 in each channel."""
    unit = (np.asarray(pixels, np.float64) / 255.0).astype(np.float32)
    return (unit - np.array(IMAGENET_MEAN, np.float32)) / np.array(IMAGENET_STD, np.float32)


def load_tokenizer(folder: Any) -> "Tokenizer":
    """The tokenizer in a folder's `tokenizer.json` (published InternVL3 `-hf` folders have one, and
    so has the demo). Raises InputError where it is missing or damaged."""
    from pathlib import Path

    from tokenizers import Tokenizer

    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{path}: no such file; the folder of an MLLM needs its tokenizer.json")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises plain Exception
        raise InputError(
            f"{path}: cannot be read as a tokenizer ({error}); download it again"
        ) from error
