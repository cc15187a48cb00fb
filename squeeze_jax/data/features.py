"""Feature records: what the frozen encoders make of an example, their codec, and the folder they are kept in.

A folder holds ArrayRecord shards that TFDS reads (`tfds.builder_from_directory(DIR).as_data_source()`), and:

    squeeze.json                the data set's `Metadata`, written last: a folder without it is unfinished
    dataset_info.json           TFDS's own description of splits and shards
    features.json               TFDS's own description of a record
    squeeze-train.array_record-00003-of-00010         one shard
    squeeze-train.array_record-00003-of-00010.json    its `ShardSummary`, written after it: the shard is whole

bf16 values are kept as their bits in uint16, which NumPy and TFDS know. No TensorFlow and no JAX is imported here,
since data workers run this file.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]
from etils import epath
from jaxtyping import Float, Int32

from squeeze_jax.errors import InputError

CODEC = 1
"""Version of the record's layout; a reader refuses others."""
METADATA_FILE = "squeeze.json"
_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
_BF16 = np.dtype(ml_dtypes.bfloat16)


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
    """M: hidden states a token has, the embeddings included."""
    width: int
    """C."""
    target: tuple[int, int, int]
    """Height, width and channels of the target's latent."""


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


@dataclass(frozen=True)
class Metadata:
    """What a reader must know of a data set before it reads a record."""

    summary: ShardSummary
    shards: tuple[int, ...]
    """Records of each shard."""
    settings: dict[str, Any] = field(default_factory=dict)
    """How it was extracted: sizes, fingerprints of the encoders, chat-template settings."""
    codec: int = CODEC


# Encoding


def record_features(shape: Shape) -> tfds.features.FeaturesDict:
    """TFDS's description of a record."""
    m, c = shape.layers, shape.width

    def tensor(size: tuple[int | None, ...], dtype: type) -> tfds.features.Tensor:
        return tfds.features.Tensor(shape=size, dtype=dtype, encoding="bytes")

    return tfds.features.FeaturesDict(
        {
            "prompt": tfds.features.Text(),
            "text": tensor((m, None, c), np.uint16),
            "text_positions": tensor((None,), np.int32),
            "image": tensor((m, None, c), np.uint16),
            "image_positions": tensor((None,), np.int32),
            "target": tensor(shape.target, np.float32),
            "references": tensor((None,), np.float32),
            "reference_sizes": tensor((None, 2), np.int32),
        }
    )


def _bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.astype(_BF16)).view(np.uint16)


def encode(record: FeatureRecord) -> dict[str, Any]:
    """The record as `record_features` describes it: bf16 as bits, references flat with their sizes."""
    flat = [latent.astype(np.float32).ravel() for latent in record.references]
    return {
        "prompt": record.prompt,
        "text": _bits(record.text),
        "text_positions": record.text_positions.astype(np.int32),
        "image": _bits(record.image),
        "image_positions": record.image_positions.astype(np.int32),
        "target": record.target.astype(np.float32),
        "references": np.concatenate([np.zeros(0, np.float32), *flat]),
        "reference_sizes": np.array([r.shape[:2] for r in record.references], np.int32).reshape(-1, 2),
    }


def decode(example: dict[str, Any], number: int) -> FeatureRecord:
    """The inverse of `encode`; arrays are views of the bytes read and must not be written to."""
    sizes = example["reference_sizes"].tolist()
    channels = example["target"].shape[-1]
    ends = np.cumsum([h * w * channels for h, w in sizes])
    flat = np.split(example["references"], ends[:-1]) if sizes else []
    return FeatureRecord(
        prompt=example["prompt"].decode(),
        text=example["text"].view(_BF16),
        text_positions=example["text_positions"],
        image=example["image"].view(_BF16),
        image_positions=example["image_positions"],
        target=example["target"],
        references=tuple(part.reshape(h, w, channels) for part, (h, w) in zip(flat, sizes, strict=True)),
        number=number,
    )


# Writing


def record_shape(record: FeatureRecord) -> Shape:
    """The shape of the data set that a record belongs to."""
    layers, _, width = record.text.shape
    height, width_of_target, channels = record.target.shape
    return Shape(layers, width, (height, width_of_target, channels))


def merge(summaries: Sequence[ShardSummary]) -> ShardSummary:
    """The summary of all records together. Raises ValueError where their shapes differ."""
    shapes = {summary.shape for summary in summaries}
    if len(shapes) != 1:
        raise ValueError(f"records of one data set must share one shape, found {sorted(map(str, shapes))}")
    largest = {f: max(getattr(s, f) for s in summaries) for f in _MAXIMA}
    return ShardSummary(records=sum(s.records for s in summaries), shape=shapes.pop(), **largest)


_MAXIMA = [f.name for f in fields(ShardSummary) if f.name.startswith("max_")]


def _summarise(record: FeatureRecord) -> ShardSummary:
    tokens = sum(r.shape[0] // 2 * (r.shape[1] // 2) for r in record.references)
    return ShardSummary(
        1, record_shape(record), record.text.shape[1], record.image.shape[1], len(record.references), tokens
    )


def shard_path(folder: epath.Path, shard: int, shards: int) -> epath.Path:
    """Where a shard of a folder lies."""
    return folder / f"squeeze-train.array_record-{shard:05d}-of-{shards:05d}"


def shard_summary(folder: epath.Path, shard: int, shards: int) -> ShardSummary | None:
    """The summary of a finished shard; None where it is unfinished, damaged or truncated."""
    path = shard_path(folder, shard, shards)
    beside = path.with_name(path.name + ".json")
    if not (beside.exists() and path.exists()):
        return None
    try:
        summary = _read_summary(json.loads(beside.read_text()))
        check_shard(path, summary.records)
    except (InputError, KeyError, TypeError, json.JSONDecodeError):
        return None
    return summary


def write_shard(folder: epath.Path, shard: int, shards: int, records: Iterable[FeatureRecord]) -> ShardSummary:
    """Writes one shard whole or not at all, then its summary. An earlier, unfinished one is overwritten."""
    path = shard_path(folder, shard, shards)
    part = path.with_name(path.name + ".part")
    # Group size 1: records are read one by one in random order.
    writer = array_record_module.ArrayRecordWriter(str(part), "group_size:1")
    summary, features = None, None
    try:
        for record in records:
            one = _summarise(record)
            summary = one if summary is None else merge([summary, one])
            features = features or record_features(one.shape)
            writer.write(features.serialize_example(encode(record)))
    finally:
        writer.close()
    if summary is None:
        raise ValueError("a shard needs at least one record")
    part.replace(path)
    _write_json(path.with_name(path.name + ".json"), asdict(summary))
    return summary


def write_metadata(folder: epath.Path, shards: int, settings: dict[str, Any]) -> Metadata:
    """Describes a folder all of whose shards are finished; from here on it can be read."""
    summaries = [shard_summary(folder, shard, shards) for shard in range(shards)]
    finished = [summary for summary in summaries if summary is not None]
    if len(finished) != shards:
        raise ValueError(f"{shards - len(finished)} of {shards} shards of {folder} are not finished")
    metadata = Metadata(merge(finished), tuple(s.records for s in finished), settings)
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, template=_TEMPLATE, dataset_name="squeeze", split="train", filetype_suffix="array_record"
    )
    sizes = sum(shard_path(folder, shard, shards).stat().length for shard in range(shards))
    split = tfds.core.SplitInfo(
        name="train", shard_lengths=list(metadata.shards), num_bytes=sizes, filename_template=template
    )
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=record_features(metadata.summary.shape),
        split_infos=[split],
        filename_template=_TEMPLATE,
        check_data=False,  # the check wants TensorFlow
    )
    _write_json(folder / METADATA_FILE, asdict(metadata))
    return metadata


def _write_json(path: epath.Path, value: Any) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=1, ensure_ascii=False))
    part.replace(path)


def _read_summary(value: dict[str, Any]) -> ShardSummary:
    shape = Shape(**{**value["shape"], "target": tuple(value["shape"]["target"])})
    return ShardSummary(**{**value, "shape": shape})


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
        if value["codec"] != CODEC:
            raise InputError(f"{path}: records of codec {value['codec']}, this version reads {CODEC}; extract again")
        return Metadata(_read_summary(value["summary"]), tuple(value["shards"]), value["settings"], value["codec"])
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not a description of feature records ({error!r}); extract again") from error


class FeatureSource:
    """The records of a folder by index: `len(source)`, `source[i]`.

    Threads may share it; a pickled copy opens its files anew.
    Opening checks that every shard is there, has its number of records and that its last record can be read
    (a truncated shard cannot); raises InputError naming the shard.
    """

    def __init__(self, folder: epath.PathLike):
        self.folder = epath.Path(folder)
        self.metadata = read_metadata(self.folder)
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
            return decode(self._records[index], index)
        except RuntimeError as error:
            raise InputError(f"{self.folder}: record {index} cannot be read ({error}); extract again") from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_records": None}


def check_shard(path: epath.Path, count: int) -> None:
    """Raises InputError unless the shard is there, holds `count` records and its last record can be read."""
    remedy = "run the same extract command again to replace it"
    if not path.exists():
        raise InputError(f"{path}: the shard is missing; {remedy}")
    reader = array_record_module.ArrayRecordReader(str(path))
    try:
        found = reader.num_records()
        if found:
            reader.read([found - 1])
        reader.close()  # reports what went wrong on opening
    except RuntimeError as error:
        raise InputError(f"{path}: the shard is damaged or truncated ({error}); {remedy}") from error
    if found != count:
        raise InputError(f"{path}: {found} records instead of {count}; {remedy}")
