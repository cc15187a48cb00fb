"""Feature records: what the frozen encoders make of an example, their codec, and the folder they are kept in.

A folder holds ArrayRecord shards that TFDS reads (`tfds.builder_from_directory(DIR).as_data_source()`), and:

    squeeze.json                the data set's `Metadata`, written last: a folder without it is unfinished
    dataset_info.json           TFDS's own description of splits and shards
    features.json               TFDS's own description of a record
    squeeze-train.array_record-00003-of-00010         one shard
    squeeze-train.array_record-00003-of-00010.json    its `ShardSummary`, written after it: the shard is whole

A folder may lie in object storage (`gs://bucket/…`). No TensorFlow and no JAX is imported here, since data workers run
this file.
"""

import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]
from etils import epath
from jaxtyping import Float, Int32
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from squeeze_jax.data.buckets import Sizes
from squeeze_jax.data.codec import CODECS, Codec
from squeeze_jax.data.storage import remove_parts, write_json, write_whole
from squeeze_jax.diffusion.latents import PATCH
from squeeze_jax.errors import InputError

METADATA_FILE = "squeeze.json"
_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"


class FeatureRecord(NamedTuple):
    """One example as the frozen encoders see it; axis letters as in `array_types`."""

    prompt: str
    text: Float[np.ndarray, "M Lt C"]
    """Hidden states of the text tokens, bf16."""
    text_positions: Int32[np.ndarray, " Lt"]
    """Place of each text token in the MLLM's sequence, 0 .. Lt + Li - 1."""
    image: Float[np.ndarray, "M Li C"]
    """Hidden states of the image tokens, bf16; Li = 0 without references."""
    image_positions: Int32[np.ndarray, " Li"]
    target: Float[np.ndarray, "height width c"]
    """Latent of the target after shift and scale, float32."""
    references: tuple[Float[np.ndarray, "_ _ c"], ...]
    """Latents of the references, each of its own size, float32."""
    number: int = -1
    """The record's place in the data set; set by reading."""


@dataclass(frozen=True)
class Shape:
    """The sizes that all records of a data set share."""

    layers: int
    """M: hidden states a token has in the record."""
    width: int
    """C."""
    target: tuple[int | None, int | None, int]
    """Height, width and channels of the target's latent; height and width None where targets are of several sizes."""


@dataclass(frozen=True)
class ShardSummary:
    """Count and largest sizes of one shard's records (or, merged, of a data set's)."""

    records: int
    shape: Shape
    max_text: int
    max_image: int
    max_references: int
    max_reference_tokens: int
    """Largest number of packed reference tokens of a record, all its references together."""
    sizes: tuple[Sizes, ...] = ()
    """Each record's; empty in folders from before they were kept."""


@dataclass(frozen=True)
class Metadata:
    """What a reader must know of a data set before it reads a record."""

    summary: ShardSummary
    shards: tuple[int, ...]
    """Records of each shard."""
    settings: dict[str, Any] = field(default_factory=dict)
    """How it was extracted: sizes, fingerprints of the encoders, chat-template settings."""
    codec: str = "bf16"
    """Of `CODECS`."""
    layers: tuple[int, ...] = ()
    """Which of the MLLM's hidden states the records hold, ascending, 0 = input embeddings."""

    @property
    def target_shapes(self) -> list[tuple[int, int, int]]:
        """Heights, widths and channels that targets' latents have."""
        height, width, channels = self.summary.shape.target
        if height is None or width is None:
            return [(*size, channels) for size in sorted({(one.height, one.width) for one in self.summary.sizes})]
        return [(height, width, channels)]


# Encoding


def record_features(shape: Shape, codec: Codec) -> tfds.features.FeaturesDict:
    """TFDS's description of a record."""

    def tensor(size: tuple[int | None, ...], dtype: type) -> tfds.features.Tensor:
        return tfds.features.Tensor(shape=size, dtype=dtype, encoding="bytes")

    states = {
        name + suffix: tensor((shape.layers, None, *size), dtype)
        for name in STATES
        for suffix, (dtype, size) in codec.layout(shape.width).items()
    }
    return tfds.features.FeaturesDict(
        {
            "prompt": tfds.features.Text(),
            "text_positions": tensor((None,), np.int32),
            "image_positions": tensor((None,), np.int32),
            "target": tensor(shape.target, np.float32),
            "references": tensor((None,), np.float32),
            "reference_sizes": tensor((None, 2), np.int32),
            **states,
        }
    )


STATES = ("text", "image")


def encode(record: FeatureRecord, codec: Codec) -> dict[str, Any]:
    """The record as `record_features` describes it: hidden states in parts, references flat with their sizes."""
    flat = [latent.astype(np.float32).ravel() for latent in record.references]
    parts = {name: codec.encode(getattr(record, name)) for name in STATES}
    return {
        "prompt": record.prompt,
        "text_positions": record.text_positions.astype(np.int32),
        "image_positions": record.image_positions.astype(np.int32),
        "target": record.target.astype(np.float32),
        "references": np.concatenate([np.zeros(0, np.float32), *flat]),
        "reference_sizes": np.array([r.shape[:2] for r in record.references], np.int32).reshape(-1, 2),
        **{name + suffix: part for name in STATES for suffix, part in parts[name].items()},
    }


def serialise(features: tfds.features.FeaturesDict, example: dict[str, Any]) -> bytes:
    """TFDS's bytes of a record, the same from every process: its own `serialize_example` mixes the order of the fields."""
    serializer = ExampleSerializer(features.get_serialized_info())  # pyright: ignore[reportArgumentType]
    return serializer.get_tf_example(features.encode_example(example)).SerializeToString(deterministic=True)


def decode(
    example: dict[str, Any], number: int, codec: Codec, rows: Sequence[int] | None = None
) -> FeatureRecord:
    """The inverse of `encode`, or only the hidden states in these rows of the axis M.

    Arrays may be views of the bytes read and must not be written to.
    """
    sizes = example["reference_sizes"].tolist()
    channels = example["target"].shape[-1]
    ends = np.cumsum([h * w * channels for h, w in sizes])
    flat = np.split(example["references"], ends[:-1]) if sizes else []

    def states(name: str) -> np.ndarray:
        suffixes = codec.layout(example[name].shape[-1])
        parts = {suffix: example[name + suffix] for suffix in suffixes}
        return codec.decode(parts if rows is None else {suffix: part[list(rows)] for suffix, part in parts.items()})

    return FeatureRecord(
        prompt=example["prompt"].decode(),
        text=states("text"),
        text_positions=example["text_positions"],
        image=states("image"),
        image_positions=example["image_positions"],
        target=example["target"],
        references=tuple(part.reshape(h, w, channels) for part, (h, w) in zip(flat, sizes, strict=True)),
        number=number,
    )


# Writing


def record_shape(record: FeatureRecord, mixed: bool = False) -> Shape:
    """The shape of the data set that a record belongs to; `mixed`: one with targets of several sizes."""
    layers, _, width = record.text.shape
    height, width_of_target, channels = record.target.shape
    return Shape(layers, width, (None, None, channels) if mixed else (height, width_of_target, channels))


def merge(summaries: Sequence[ShardSummary]) -> ShardSummary:
    """The summary of all records together. Raises ValueError where their shapes differ."""
    shapes = {summary.shape for summary in summaries}
    if len(shapes) != 1:
        raise ValueError(f"records of one data set must share one shape, found {sorted(map(str, shapes))}")
    largest = {f: max(getattr(s, f) for s in summaries) for f in _MAXIMA}
    sizes = tuple(chain.from_iterable(s.sizes for s in summaries))
    return ShardSummary(records=sum(s.records for s in summaries), shape=shapes.pop(), sizes=sizes, **largest)


_MAXIMA = [f.name for f in fields(ShardSummary) if f.name.startswith("max_")]


def _summarise(record: FeatureRecord, mixed: bool) -> ShardSummary:
    tokens = sum(r.shape[0] // PATCH * (r.shape[1] // PATCH) for r in record.references)
    (height, width, _), text, image = record.target.shape, record.text.shape[1], record.image.shape[1]
    sizes = Sizes(height, width, text, image, len(record.references), tokens)
    return ShardSummary(1, record_shape(record, mixed), text, image, len(record.references), tokens, (sizes,))


def shard_path(folder: epath.Path, shard: int, shards: int) -> epath.Path:
    """Where a shard of a folder lies."""
    return folder / f"squeeze-train.array_record-{shard:05d}-of-{shards:05d}"


def shard_summary(folder: epath.Path, shard: int, shards: int) -> ShardSummary | None:
    """The summary of a finished shard; None where it is unfinished or truncated."""
    path = shard_path(folder, shard, shards)
    beside = _beside(path)
    if not (beside.exists() and path.exists()):
        return None
    try:
        summary = _read_summary(json.loads(beside.read_text()))
        check_shard(path, summary.records)
    except (InputError, KeyError, TypeError, json.JSONDecodeError):
        return None
    return summary


def write_shard(
    folder: epath.Path,
    shard: int,
    shards: int,
    records: Iterable[FeatureRecord],
    codec: str = "bf16",
    mixed: bool = False,
) -> ShardSummary:
    """Writes one shard whole or not at all, then its summary. An earlier, unfinished one is overwritten.

    mixed: targets are of several sizes. Raises ValueError where shapes differ otherwise.
    """
    path = shard_path(folder, shard, shards)
    summaries: list[ShardSummary] = []

    def write(part: Path) -> None:
        # Group size 1: records are read one by one in random order.
        writer = array_record_module.ArrayRecordWriter(str(part), "group_size:1")
        features = None
        try:
            for record in records:
                one = _summarise(record, mixed)
                merge([*summaries[:1], one])  # refuses another shape
                summaries.append(one)
                features = features or record_features(one.shape, CODECS[codec])
                writer.write(serialise(features, encode(record, CODECS[codec])))
        finally:
            writer.close()
        if not summaries:
            raise ValueError("a shard needs at least one record")

    write_whole(path, write)
    summary = merge(summaries)
    write_json(_beside(path), asdict(summary))
    return summary


def write_metadata(
    folder: epath.Path,
    shards: int,
    settings: dict[str, Any],
    codec: str = "bf16",
    layers: Sequence[int] | None = None,
) -> Metadata:
    """Describes a folder all of whose shards are finished; from here on it can be read.

    layers: which hidden states the records hold; None: all of the MLLM's. Several processes may do this at once.
    """
    summaries = [shard_summary(folder, shard, shards) for shard in range(shards)]
    finished = [summary for summary in summaries if summary is not None]
    if len(finished) != shards:
        raise ValueError(f"{shards - len(finished)} of {shards} shards of {folder} are not finished")
    summary = merge(finished)
    held = tuple(range(summary.shape.layers) if layers is None else layers)
    metadata = Metadata(summary, tuple(s.records for s in finished), settings, codec, held)
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, template=_TEMPLATE, dataset_name="squeeze", split="train", filetype_suffix="array_record"
    )
    sizes = sum(shard_path(folder, shard, shards).stat().length for shard in range(shards))
    split = tfds.core.SplitInfo(
        name="train", shard_lengths=list(metadata.shards), num_bytes=sizes, filename_template=template
    )
    with tempfile.TemporaryDirectory() as local:
        (Path(local) / shard_path(folder, 0, shards).name).touch()  # its name tells the kind of file
        tfds.folder_dataset.write_metadata(
            data_dir=local,
            features=record_features(summary.shape, CODECS[codec]),
            split_infos=[split],
            filename_template=_TEMPLATE,
            check_data=False,  # the check wants TensorFlow
        )
        for made in sorted(Path(local).glob("*.json")):
            write_whole(folder / made.name, lambda part, made=made: part.write_bytes(made.read_bytes()))
    write_json(folder / METADATA_FILE, asdict(metadata) | {"codec": CODECS[codec].version})
    remove_parts(folder)
    return metadata


def _beside(shard: epath.Path) -> epath.Path:
    return shard.with_name(shard.name + ".json")


def _read_summary(value: dict[str, Any]) -> ShardSummary:
    shape = Shape(**{**value["shape"], "target": tuple(value["shape"]["target"])})
    sizes = tuple(Sizes(*one) for one in value.get("sizes", ()))
    return ShardSummary(**{**value, "shape": shape, "sizes": sizes})


# Reading


def read_metadata(folder: epath.PathLike) -> Metadata:
    """The metadata of a finished folder. Raises InputError where it is missing, unfinished or of another codec."""
    folder = epath.Path(folder)
    path = folder / METADATA_FILE
    if not path.exists():
        started = folder.exists() and any(".array_record-" in child.name for child in folder.iterdir())
        remedy = "its extraction is unfinished, run the same extract command again" if started else "run extract first"
        raise InputError(f"{folder}: no feature records ({METADATA_FILE} is missing); {remedy}")
    try:
        value = json.loads(path.read_text())
        names = {codec.version: name for name, codec in CODECS.items()}
        if (version := value["codec"]) not in names:
            raise InputError(f"{path}: records of codec {version}, this version reads {sorted(names)}; extract again")
        summary = _read_summary(value["summary"])
        # Records from before there was a choice hold all.
        layers = tuple(value.get("layers", range(summary.shape.layers)))
        return Metadata(summary, tuple(value["shards"]), value["settings"], names[version], layers)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not a description of feature records ({error!r}); extract again") from error


class FeatureSource:
    """The records of a folder by index: `len(source)`, `source[i]`.

    Threads may share it; a pickled copy opens its files anew. layers: which of the MLLM's hidden states to read; None:
    those that the records hold.
    Opening checks that every shard is there, whole, and has its number of records; a record is checked when it is read.
    Both raise InputError naming the shard; opening also where hidden states are not held.
    """

    def __init__(self, folder: epath.PathLike, layers: Sequence[int] | None = None):
        self.folder = epath.Path(folder)
        self.metadata = read_metadata(self.folder)
        held = self.metadata.layers
        if missing := set(layers or ()) - set(held):
            raise InputError(
                f"{folder}: records hold hidden states {_ranges(held)}, aggregator.layers asks for {_ranges(missing)}; "
                "extract with this config"
            )
        self._rows = None if layers is None or tuple(layers) == held else [held.index(layer) for layer in layers]
        for shard, count in enumerate(self.metadata.shards):
            check_shard(shard_path(self.folder, shard, len(self.metadata.shards)), count)
        self._records = None

    def __len__(self) -> int:
        return self.metadata.summary.records

    def __getitem__(self, index: int) -> FeatureRecord:
        if self._records is None:
            builder = tfds.builder_from_directory(self.folder)
            self._records = builder.as_data_source(split="train")  # pyright: ignore[reportCallIssue]
        try:
            # One by one: TFDS's batched read starts a thread a shard every time, which costs more than it saves.
            return decode(self._records[index], index, CODECS[self.metadata.codec], self._rows)
        except RuntimeError as error:
            counts = self.metadata.shards
            shard = int(np.searchsorted(np.cumsum(counts), index, side="right"))
            path = shard_path(self.folder, shard, len(counts))
            raise InputError(
                f"{path}: record {index} cannot be read ({error}); delete this file and run the same extract command again"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        # A copy, made for a worker, reads by number and has no use for the sizes of them all.
        metadata = replace(self.metadata, summary=replace(self.metadata.summary, sizes=()))
        return {**self.__dict__, "_records": None, "metadata": metadata}


def _ranges(numbers: Iterable[int]) -> str:
    """`0 to 9, 12, 20 to 28` of those numbers."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def check_shard(path: epath.Path, count: int) -> None:
    """Raises InputError unless the shard is there, whole (its index stands at its end), and holds `count` records."""
    remedy = "run the same extract command again to replace it"
    if not path.exists():
        raise InputError(f"{path}: the shard is missing; {remedy}")
    reader = array_record_module.ArrayRecordReader(str(path))
    try:
        found = reader.num_records()
        reader.close()  # reports what went wrong on opening
    except RuntimeError as error:
        raise InputError(f"{path}: the shard is damaged or truncated ({error}); {remedy}") from error
    if found != count:
        raise InputError(f"{path}: {found} records instead of {count}; {remedy}")
