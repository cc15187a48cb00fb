"""From examples to feature records: the frozen encoders run once over everything, shard by shard.

Each shard is a fixed slice of the rows, written whole. A killed extraction, started again,
continues at the first shard that is missing or cut short; several machines share the work with
`shard=(i, n)`, and whoever finishes last writes the metadata.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from etils import epath
from jaxtyping import Float, Int32
from PIL import Image

from squeeze_jax.data.images import nearest_size, resize_for_reference, resize_for_target
from squeeze_jax.data.record_format import FeatureRecord
from squeeze_jax.data.record_summary import Metadata
from squeeze_jax.data.records import shard_summary, write_metadata, write_shard
from squeeze_jax.data.references import PictureEncoder, encode_pictures
from squeeze_jax.errors import InputError
from squeeze_jax.interop.tensors import read_json
from squeeze_jax.storage import write_json

SETTINGS_FILE = "extraction.json"
Progress = Callable[[int, int], None]
"""Called with the rows done so far and the rows in all."""


class Example(NamedTuple):
    """One row: RGB pictures, the references in the order the prompt speaks of them."""

    prompt: str
    references: list[Image.Image]
    target: Image.Image
    other_captions: tuple[str, ...] = ()
    """Further descriptions of the target, each as good as `prompt`: a record each."""


@runtime_checkable
class Rows(Protocol):
    """Examples by number, so that an extraction can go on where it was killed.

    Those of `sources/`, or a list.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...


class EncodedPrompt(NamedTuple):
    """What the MLLM makes of one sample; floats are float32 or bf16."""

    text: Float[np.ndarray, "M Lt C"]
    text_positions: Int32[np.ndarray, " Lt"]
    image: Float[np.ndarray, "M Li C"]
    image_positions: Int32[np.ndarray, " Li"]


@runtime_checkable
class Encoders(PictureEncoder, Protocol):
    """The frozen encoders as extraction needs them."""

    @property
    def settings(self) -> dict[str, Any]:
        """JSON values that decide what comes out.

        Names, digests of the weights, settings of the chat template.
        """
        ...

    def hidden_states(
        self, prompts: list[str], images: list[list[Image.Image]]
    ) -> list[EncodedPrompt]:
        """One result a sample, from its prompt and its references as they are (not yet resized)."""
        ...


class RowError(InputError):
    """One row cannot be used, which others do not suffer from. The message names it."""


class Slice(NamedTuple):
    """The rows of one shard."""

    first: int
    last: int
    """Not included."""
    turn: int
    """Process i of n makes the shards whose turn is i modulo n."""


def slices(count: int, parts: Sequence[int] | None, most: int) -> list[Slice]:
    """The shards of `count` rows, in order, whoever makes them.

    parts: rows that only one process reads, in order (`sources.contract.parts_of`); a shard has
    rows of one of them. None: shards take turns. most: rows of a shard.
    """
    made: list[Slice] = []
    start = 0
    for part, rows in enumerate([count] if parts is None else parts):
        for first in range(start, start + rows, most):
            turn = len(made) if parts is None else part
            made.append(Slice(first, min(first + most, start + rows), turn))
        start += rows
    return made


def own_slices(
    rows: Rows, parts: Sequence[int] | None, most: int, shard: tuple[int, int]
) -> list[tuple[int, Slice]]:
    """The numbers and rows of the shards that process i of n makes; `shard` is (i, n).

    Raises InputError for an impossible share.
    """
    i, n = shard
    if not 0 <= i < n:
        raise InputError(f"shard {i}/{n}: the first number must be from 0 to {n - 1}")
    return [one for one in enumerate(slices(len(rows), parts, most)) if one[1].turn % n == i]


def extract(
    rows: Rows,
    encoders: Encoders,
    out_dir: epath.PathLike,
    *,
    target_size: tuple[int, int],
    buckets: Sequence[tuple[int, int]] = (),
    reference_long_side: int,
    examples_per_shard: int = 1024,
    batch: int = 32,
    shard: tuple[int, int] = (0, 1),
    source: str = "",
    codec: str = "bf16",
    layers: Sequence[int] | None = None,
    parts: Sequence[int] | None = None,
    noted: Mapping[str, Any] | None = None,
    skip: Callable[[RowError], object] | None = None,
    progress: Progress | None = None,
) -> Metadata | None:
    """Writes the feature records of all rows into `out_dir`.

    target_size: (height, width) of every target in pixels. buckets: several of them instead; a
    target gets the one that is nearest in aspect ratio (`nearest_size`), and batches go by size and
    number of references (`buckets.py`). codec: how hidden states are kept, of `codec.CODECS`.
    layers: the MLLM's hidden states to keep, ascending; None keeps all. source: a fingerprint of
    the rows (a manifest's digest, a generator's seed), kept so that a folder is never continued
    with other rows. shard: (i, n) does every n-th shard from i; of rows in `parts` (see `slices`),
    those of every n-th part. noted: further settings to note. skip: told of each row that cannot be
    used, which then is left out; None: the first one ends the extraction.
    Returns the metadata, or None while other parts are missing.
    Raises InputError where `out_dir` holds an extraction of other rows or other settings.
    """
    own = own_slices(rows, parts, examples_per_shard, shard)
    if len(rows) == 0:
        raise InputError("nothing to extract: there are no rows")
    folder = epath.Path(out_dir)
    settings = {
        "rows": len(rows),
        "source": source,
        "examples_per_shard": examples_per_shard,
        "encoders": encoders.settings,
        **sizes_and_codec(target_size, buckets, reference_long_side, codec, layers),
        **(noted or {}),
    }
    _claim(folder, settings)

    shards = len(slices(len(rows), parts, examples_per_shard))
    sizes = list(buckets) or [target_size]
    done = 0
    for number, (first, last, _) in own:
        if shard_summary(folder, number, shards) is None:
            batches = _batches(rows, range(first, last), batch, skip)
            records = _records(batches, encoders, sizes, reference_long_side, batch, layers)
            counted = _counted(records, done, len(rows), progress)
            write_shard(folder, number, shards, counted, codec, bool(buckets))
        done += last - first
        if progress:
            progress(done, len(rows))
    if any(shard_summary(folder, number, shards) is None for number in range(shards)):
        return None
    return write_metadata(folder, shards, settings, codec, layers)


def sizes_and_codec(
    target_size: tuple[int, int],
    buckets: Sequence[tuple[int, int]],
    reference_long_side: int,
    codec: str = "bf16",
    layers: Sequence[int] | None = None,
) -> dict[str, Any]:
    """What a folder notes of these arguments of `extract`."""
    noted: dict[str, Any] = {
        "target_size": [list(size) for size in buckets] if buckets else list(target_size),
        "reference_long_side": reference_long_side,
    }
    # Only where they are not the default: extractions from before there was a choice go on being
    # continued.
    noted |= {"codec": codec} if codec != "bf16" else {}
    return noted | ({"layers": list(layers)} if layers is not None else {})


def differing(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """The settings in which two extractions differ, so that their records do not mix.

    Unless captions are cut to it, no record depends on the limit of text tokens.
    """
    ignored = () if "long_captions" in {*there, *wanted} else ("max_text_tokens",)
    names = [name for name in dict.fromkeys([*there, *wanted]) if name not in ignored]
    return [name for name in names if there.get(name) != wanted.get(name)]


def _claim(folder: epath.Path, settings: dict[str, Any]) -> None:
    """Notes the settings in a new folder, or checks that its extraction has the same."""
    path = folder / SETTINGS_FILE
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        write_json(path, settings)
        return
    there, wanted = read_json(path), json.loads(json.dumps(settings))
    if names := differing(there, wanted):
        listed = ", ".join(
            f"{name} {there.get(name)!r} there and {wanted.get(name)!r} now" for name in names
        )
        raise InputError(
            f"{folder} holds an extraction with {listed}; choose another folder or delete it"
        )


def _batches(
    rows: Rows, numbers: range, batch: int, skip: Callable[[RowError], object] | None
) -> Iterator[list[Example]]:
    """The examples of a shard, `batch` rows at a time, without those that are skipped."""
    for start in range(0, len(numbers), batch):
        examples: list[Example] = []
        for number in numbers[start : start + batch]:
            try:
                examples.append(rows[number])
            except RowError as error:
                if skip is None:
                    raise
                skip(error)
        if examples:
            yield examples


def _records(
    batches: Iterator[list[Example]],
    encoders: Encoders,
    target_sizes: Sequence[tuple[int, int]],
    reference_long_side: int,
    batch: int,
    layers: Sequence[int] | None,
) -> Iterator[FeatureRecord]:
    kept = slice(None) if layers is None else list(layers)
    for examples in batches:
        references = [list(example.references) for example in examples]
        captions = [[example.prompt, *example.other_captions] for example in examples]
        encoded = iter([*_read_captions(encoders, captions, references, batch)])
        targets = [example.target for example in examples]
        pictures = [
            resize_for_target(target, *nearest_size(target.height, target.width, target_sizes))
            for target in targets
        ]
        shown = [
            resize_for_reference(picture, reference_long_side)
            for sample in references
            for picture in sample
        ]
        latents = encode_pictures(encoders, pictures, batch)
        of_references = iter(encode_pictures(encoders, shown, batch, on_canvases=True))
        for own, target, sample in zip(captions, latents, references):
            of_sample = tuple(next(of_references) for _ in sample)
            for number, caption in enumerate(own):
                prompt = next(encoded)
                yield FeatureRecord(
                    prompt=caption,
                    text=prompt.text[kept],
                    text_positions=prompt.text_positions,
                    image=prompt.image[kept],
                    image_positions=prompt.image_positions,
                    target=target,
                    references=of_sample,
                    caption=number,
                )


def _read_captions(
    encoders: Encoders,
    captions: Sequence[Sequence[str]],
    references: Sequence[list[Image.Image]],
    batch: int,
) -> Iterator[EncodedPrompt]:
    """What the MLLM makes of each caption with its example's references, `batch` at a time."""
    pairs = [(one, images) for own, images in zip(captions, references) for one in own]
    for start in range(0, len(pairs), batch):
        some = pairs[start : start + batch]
        yield from encoders.hidden_states([one for one, _ in some], [images for _, images in some])


def _counted(
    records: Iterator[FeatureRecord], done: int, total: int, progress: Progress | None
) -> Iterator[FeatureRecord]:
    count = 0
    for record in records:
        yield record
        count += record.caption == 0
        if progress:
            progress(done + count, total)
