"""Pictures from files and back: one way to decode, to resize and to save, used by every command.

Decoded pictures are upright 8-bit RGB. Arrays are float32 [height, width, 3] in [-1, 1].
"""

import json
import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from squeeze_jax.errors import InputError

MAX_PIXELS = 100_000_000
"""Largest picture that is decoded (about 300 MB as RGB); refused before its pixels are read."""
MULTIPLE = 16
"""Sides are multiples of this: 8 from the autoencoder times 2 from the latent patches."""


def load_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture in a file, fully decoded, upright and RGB (see `to_rgb`).

    Raises InputError naming the file where it is missing, unreadable, truncated or larger than
    `max_pixels`.
    """
    path = Path(path)
    if not path.is_file():
        found = "a folder, not a picture" if path.is_dir() else "no such file"
        raise InputError(f"{path}: {found}; give the path of a picture")
    with path.open("rb") as file:
        return decode_image(file, str(path), max_pixels)


FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""What is taken for a picture, by content. Pillow reads more, some of it with programs of others:
an EPS file would run Ghostscript (our decision)."""


def _formats() -> list[str]:
    """Those of `FORMATS` that this Pillow can read."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def decode_image(file: BufferedIOBase, name: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture in an open file, as `load_image`; `name` is what messages call it. Raises
    InputError as it does."""
    try:
        # Pillow warns of large pictures (here an error with a limit of ours) and of junk in EXIF
        # (which harms nobody).
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file, formats=_formats()) as image:  # pyright: ignore[reportArgumentType]
                if image.width * image.height > max_pixels:
                    raise InputError(
                        f"{name}: {image.width}x{image.height} pixels are more than the limit of "
                        f"{max_pixels}; "
                        "scale the picture down"
                    )
                image.load()
                return to_rgb(image)
    except InputError:
        raise
    except Image.DecompressionBombError:
        raise InputError(
            f"{name}: more than the limit of {max_pixels} pixels; scale the picture down"
        ) from None
    except UnidentifiedImageError:
        raise InputError(
            f"{name}: not a picture, or of an unknown format; replace or re-save the file"
        ) from None
    except (
        Exception
    ) as error:  # decoders raise many kinds (OSError, SyntaxError, struct.error …) on broken files
        reason = str(error).replace(name, "the file") or type(error).__name__
        raise InputError(
            f"{name}: cannot be read as a picture ({reason}); replace or re-save the file"
        ) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """An upright 8-bit RGB picture of any Pillow picture.

    The orientation in EXIF is applied; of an animation the first frame is taken; transparency
    (RGBA, LA, a palette's or a colour key) is laid on white; 16-bit grey is scaled from 0 .. 65535,
    so a ramp stays a ramp; CMYK, YCbCr and grey are converted as Pillow does. Colour profiles are
    not applied. Raises InputError for floating-point pictures and for values above 65535, whose
    range nobody knows.
    """
    if getattr(image, "is_animated", False):
        image.seek(0)
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise InputError(
            "a picture of floating-point values has no known range; save it with 8 or 16 bits"
        )
    if image.mode == "I" and np.asarray(image).max(initial=0) > 65535:
        raise InputError("a picture of 32-bit values has no known range; save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # `convert` would clip at 255 and turn the ramp white
        grey = np.clip(np.asarray(image, np.float32) / 257.0, 0, 255)
        return Image.fromarray(np.rint(grey).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def to_float(image: Image.Image) -> Float32[np.ndarray, "height width 3"]:
    """An RGB picture as float32 in [-1, 1]."""
    return np.asarray(image, np.float32) / 127.5 - 1.0


def to_uint8(array: Float[Any, "*B height width 3"]) -> UInt8[np.ndarray, "*B height width 3"]:
    """Pictures in [-1, 1] (clipped to it) as 0 .. 255; the inverse of `to_float`."""
    scaled = (np.asarray(array, np.float32) + 1.0) * 127.5
    return np.rint(np.clip(scaled, 0.0, 255.0)).astype(np.uint8)


def resize_for_target(
    image: Image.Image, height: int, width: int
) -> Float32[np.ndarray, "height width 3"]:
    """Scaled until it covers height x width, the middle of it cut out: what the model learns to
    draw has one size."""
    scale = max(height / image.height, width / image.width)
    cut_width, cut_height = width / scale, height / scale
    left, top = (image.width - cut_width) / 2, (image.height - cut_height) / 2
    # Rounding may put an edge a hair outside, which Pillow refuses.
    box = (
        max(left, 0),
        max(top, 0),
        min(left + cut_width, image.width),
        min(top + cut_height, image.height),
    )
    return to_float(image.resize((width, height), Image.Resampling.BICUBIC, box=box))


def nearest_size(height: int, width: int, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The (height, width) whose aspect ratio is nearest a picture's, in logarithms, so that least
    is cut away.

    Of several with that ratio, the largest that need not enlarge the picture, else the smallest
    (our decision).
    """

    def order(size: tuple[int, int]) -> tuple[float, bool, int]:
        distance = abs(math.log(size[0] / size[1]) - math.log(height / width))
        enlarges = size[0] > height or size[1] > width
        return round(distance, 6), enlarges, size[0] * size[1] * (1 if enlarges else -1)

    return min(sizes, key=order)


def reference_size(
    height: int, width: int, long_side: int, multiple: int = MULTIPLE
) -> tuple[int, int]:
    """Height and width that `resize_for_reference` gives a picture."""
    scale = min(1.0, long_side / max(height, width))
    most = long_side // multiple * multiple

    def fit(side: int) -> int:
        return max(multiple, min(most, round(side * scale / multiple) * multiple))

    return fit(height), fit(width)


def resize_for_reference(
    image: Image.Image, long_side: int, multiple: int = MULTIPLE
) -> Float32[np.ndarray, "height width 3"]:
    """The whole picture at its own aspect ratio, nothing cut away: long side at most `long_side`,
    never enlarged.

    Each side is rounded to the nearest multiple, at least one; that stretches the picture by at
    most half a multiple a side (8 pixels of 16), more only where the short side is below one
    multiple.
    """
    height, width = reference_size(image.height, image.width, long_side, multiple)
    return to_float(image.resize((width, height), Image.Resampling.BICUBIC))


def parse_size(text: str) -> tuple[int, int]:
    """`512x768` (height x width) or `512` (a square) as (height, width).

    Raises InputError, with the nearest size that works, unless both are multiples of 16 and
    positive.
    """
    found = re.fullmatch(r"\s*(\d{1,6})\s*(?:[xX×]\s*(\d{1,6})\s*)?", text)
    if found is None:
        raise InputError(
            f"size {text!r} is not understood; write HEIGHTxWIDTH in pixels, for instance "
            "512x768, or 512"
        )
    height, width = int(found[1]), int(found[2] or found[1])
    if height % MULTIPLE or width % MULTIPLE or not (height and width):
        near = [
            max(MULTIPLE, (side + MULTIPLE // 2) // MULTIPLE * MULTIPLE) for side in (height, width)
        ]
        raise InputError(
            f"size {height}x{width} (height x width): both must be multiples of {MULTIPLE}; "
            f"the nearest size is {near[0]}x{near[1]}"
        )
    return height, width


def save_png(path: str | Path, array: Any, text: Mapping[str, Any]) -> None:
    """Writes a picture ([height, width, 3], uint8 or float in [-1, 1]) as PNG with `text` embedded
    as PNG text.

    Values of `text` that are not strings are written as JSON. The file appears whole or not at all.
    Raises InputError where the path does not end in .png or cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise InputError(f"{path}: pictures are written as PNG; end the name in .png")
    array = np.asarray(array)
    picture = Image.fromarray(array if array.dtype == np.uint8 else to_uint8(array))
    info = PngInfo()
    for key, value in text.items():
        said = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        # A file's name may be no Unicode; in JSON the escape says the same.
        info.add_text(key, said.encode(errors="backslashreplace").decode())
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            picture.save(beside, format="PNG", pnginfo=info)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror or error}); choose another place"
        ) from error
