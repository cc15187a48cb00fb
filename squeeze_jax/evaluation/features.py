"""Features of pictures and texts, kept in a folder as they are computed.

    FOLDER/DIGEST OF THE JUDGE/….safetensors      64 vectors a file, each named by what it is of

A picture is known by the SHA-256 of its file, a text by its own, so a picture that was replaced is
looked at again, and a scoring that was killed goes on.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from squeeze_jax.data.images import load_image
from squeeze_jax.errors import InputError
from squeeze_jax.evaluation.judges import Features, Judge
from squeeze_jax.interop.tensors import TensorFolder, write_tensors
from squeeze_jax.training.metrics import progress_bar

CHUNK = 64
"""Pictures judged and written together."""
Item = TypeVar("Item")


def picture_features(judge: Judge, paths: Sequence[Path], folder: Path, what: str) -> Features:
    """Features of picture files, in order; `what` they are is said beside the progress."""

    def compute(some: Sequence[Path]) -> Features:
        return judge.pictures([load_image(path) for path in some])

    keys = [_digest_file(path) for path in paths]
    return _cached(judge, f"{judge.name}: {what}", keys, paths, compute, folder)


def text_features(judge: Judge, texts: Sequence[str], folder: Path) -> Features:
    """Features of prompts, in order, by a judge that reads."""
    assert judge.texts is not None
    keys = ["text " + hashlib.sha256(text.encode()).hexdigest() for text in texts]
    return _cached(judge, f"{judge.name}: prompts", keys, texts, judge.texts, folder)


def _cached(
    judge: Judge,
    label: str,
    keys: Sequence[str],
    items: Sequence[Item],
    compute: Callable[[Sequence[Item]], Features],
    folder: Path,
) -> Features:
    place = folder / judge.digest
    known: dict[str, np.ndarray] = {}
    for path in sorted(place.glob("*.safetensors")):
        stored = TensorFolder(path)
        known.update({name: stored.read(name) for name in stored.names()})
    todo = {key: item for key, item in zip(keys, items) if key not in known}
    with progress_bar() as bar:
        task = bar.add_task(label, total=len(set(keys)), figures="")
        bar.advance(task, len(set(keys)) - len(todo))
        for start in range(0, len(todo), CHUNK):
            some = list(todo)[start : start + CHUNK]
            new = dict(zip(some, compute([todo[key] for key in some]), strict=True))
            for key, vector in new.items():
                if not np.isfinite(vector).all():
                    raise InputError(f"{judge.name} gives no number for {todo[key]}")
            name = hashlib.sha256(" ".join(some).encode()).hexdigest()[:16]
            write_tensors(place / f"{name}.safetensors", new)
            known |= new
            bar.advance(task, len(some))
    return np.stack([known[key] for key in keys])


def _digest_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
