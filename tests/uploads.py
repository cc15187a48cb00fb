"""Files that the page is given and that are no references."""

import numpy as np
from PIL import Image

from squeeze_jax.app.session import MAX_BYTES


def broken_files(folder):
    """(file, a word of what is said about it)."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    noise.save(folder / "whole.jpg")
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:900])
    (folder / "notes.png").write_text("hello")
    (folder / "heavy.png").write_bytes(bytes(MAX_BYTES + 1))
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
    Image.new("1", (8_000, 8_000)).save(folder / "large.png")
    words = {"cut.jpg": "truncated", "notes.png": "not a picture", "heavy.png": "25 MB"}
    words |= {"bomb.png": "50000000", "large.png": "8000x8000"}
    return [(folder / name, word) for name, word in words.items()]
