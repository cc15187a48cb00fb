"""The folder that feature records are kept in: writing it shard by shard, reading it by number.

A folder holds ArrayRecord shards that TFDS reads
(`tfds.builder_from_directory(DIR).as_data_source()`), and:

    squeeze.json          the data set's `Metadata`, written last: a folder without it is unfinished
    dataset_info.json     TFDS's own description of splits and shards
    features.json         TFDS's own description of a record
    squeeze-train.array_record-00003-of-00010       one shard
    squeeze-train.array_record-00003-of-00010.json  its `ShardSummary`, written once it is whole

A folder may lie in object storage (`gs://bucket/…`). No TensorFlow and no JAX is imported here,
since data workers run this file.
"""

import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]
from etils import epath

from squeeze_jax.data.codec import CODECS
from squeeze_jax.data.record_format import (
    FeatureRecord,
    decode,
    encode,
    record_features,
    serialise,
)
from squeeze_jax.data.record_summary import (
    EMPTY,
    Metadata,
    ShardSummary,
    check_counts,
    check_sizes,
    merge,
    read_summary,
    summarise,
    summary_values,
)
from squeeze_jax.errors import InputError, OutputError, first_line
from squeeze_jax.storage import (
    ask_in_time,
    reachable,
    remove_parts,
    write_json,
    write_whole,
)

METADATA_FILE = "squeeze.json"
_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"


# Writing


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
        summary = read_summary(json.loads(beside.read_text()))
        check_shard(path, summary.records)
    except (InputError, KeyError, TypeError, AttributeError, ValueError, RecursionError):
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
    """Writes one shard whole or not at all, then its summary. An earlier, unfinished one is
    overwritten.

    mixed: targets are of several sizes. Raises ValueError where shapes differ otherwise, and
    OutputError where the disk refuses.
    """
    path = shard_path(folder, shard, shards)
    summaries: list[ShardSummary] = []
    captions: list[int] = []

    def write(part: Path) -> None:
        # Group size 1: records are read one by one in random order.
        writer = array_record_module.ArrayRecordWriter(str(part), "group_size:1")
        features = None
        try:
            for record in records:
                one = summarise(record, mixed)
                merge([*summaries[:1], one])  # refuses another shape
                summaries.append(one)
                if record.caption == 0:
                    captions.append(0)
                captions[-1] += 1
                features = features or record_features(one.shape, CODECS[codec])
                writer.write(serialise(features, encode(record, CODECS[codec])))
        finally:
            writer.close()

    try:
        write_whole(path, write)
    except RuntimeError as error:  # ArrayRecord's, of what the disk has said
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            f"{path}: the shard cannot be written ({first_line(error)}); see to the disk and run "
            "the same extract command again, which goes on from here"
        ) from error
    summary = merge(summaries) if summaries else EMPTY
    if any(count > 1 for count in captions):
        summary = replace(summary, captions=tuple(captions))
    write_json(_beside(path), summary_values(summary))
    return summary


def write_metadata(
    folder: epath.Path,
    shards: int,
    settings: dict[str, Any],
    codec: str = "bf16",
    layers: Sequence[int] | None = None,
) -> Metadata:
    """Describes a folder all of whose shards are finished; from here on it can be read.

    layers: which hidden states the records hold; None: all of the MLLM's. Several processes may do
    this at once. Raises ValueError where a shard is unfinished.
    """
    summaries = [shard_summary(folder, shard, shards) for shard in range(shards)]
    finished = [summary for summary in summaries if summary is not None]
    if len(finished) != shards:
        raise ValueError(
            f"{shards - len(finished)} of {shards} shards of {folder} are not finished"
        )
    summary = merge(finished)
    held = tuple(range(summary.shape.layers) if layers is None else layers)
    metadata = Metadata(summary, tuple(s.records for s in finished), settings, codec, held)
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder,
        template=_TEMPLATE,
        dataset_name="squeeze",
        split="train",
        filetype_suffix="array_record",
    )
    sizes = sum(shard_path(folder, shard, shards).stat().length for shard in range(shards))
    split = tfds.core.SplitInfo(
        name="train",
        shard_lengths=list(metadata.shards),
        num_bytes=sizes,
        filename_template=template,
    )
    with tempfile.TemporaryDirectory() as local:
        (
            Path(local) / shard_path(folder, 0, shards).name
        ).touch()  # its name tells the kind of file
        tfds.folder_dataset.write_metadata(
            data_dir=local,
            features=record_features(summary.shape, CODECS[codec]),
            split_infos=[split],
            filename_template=_TEMPLATE,
            check_data=False,  # the check wants TensorFlow
        )
        for made in sorted(Path(local).glob("*.json")):
            write_whole(
                folder / made.name, lambda part, made=made: part.write_bytes(made.read_bytes())
            )
    noted = {"summary": summary_values(summary), "codec": CODECS[codec].version}
    write_json(folder / METADATA_FILE, asdict(metadata) | noted)
    remove_parts(folder)
    return metadata


def _beside(shard: epath.Path) -> epath.Path:
    return shard.with_name(shard.name + ".json")


# Reading


def read_metadata(folder: epath.PathLike) -> Metadata:
    """The metadata of a finished folder. Raises InputError where it is missing, unfinished or of
    another codec."""
    folder = reachable(folder)
    path = folder / METADATA_FILE
    if not path.exists():
        names = [child.name for child in folder.iterdir()] if folder.exists() else []
        remedy = "run extract first"
        if any(".array_record-" in name for name in names):
            remedy = "its extraction is unfinished, run the same extract command again"
        raise InputError(f"{folder}: no feature records ({METADATA_FILE} is missing); {remedy}")
    try:
        value = json.loads(path.read_text())
        names = {codec.version: name for name, codec in CODECS.items()}
        if (version := value["codec"]) not in names:
            raise InputError(
                f"{path}: records of codec {version}, this version reads {sorted(names)}; "
                "extract again"
            )
        summary = read_summary(value["summary"])
        # Records from before there was a choice hold all.
        layers = tuple(value.get("layers", range(summary.shape.layers)))
        shards, settings = tuple(value["shards"]), dict(value["settings"])
        check_counts(*shards, *layers)
        if sum(shards) != summary.records or len(layers) != summary.shape.layers:
            raise ValueError("its shards or layers are not as many as it says")
        return Metadata(summary, shards, settings, names[version], layers)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        why = f"not a description of feature records ({error!r})"
        raise InputError(f"{path}: {why}; extract again") from error


class FeatureSource:
    """The records of a folder by index: `len(source)`, `source[i]`.

    Threads may share it; a pickled copy opens its files anew. layers: which of the MLLM's hidden
    states to read; None: those that the records hold.
    Opening checks that every shard is there, whole, and has its number of records; a record is
    checked when it is read. Both raise InputError naming the shard; opening also where hidden
    states are not held.
    """

    def __init__(self, folder: epath.PathLike, layers: Sequence[int] | None = None):
        self.folder = epath.Path(folder)
        self.metadata = read_metadata(self.folder)
        held = self.metadata.layers
        if missing := set(layers or ()) - set(held):
            raise InputError(
                f"{folder}: records hold hidden states {_ranges(held)}, aggregator.layers asks for "
                f"{_ranges(missing)}; extract with this config"
            )
        own = held if layers is None else tuple(layers)
        self._rows = None if own == held else [held.index(layer) for layer in own]
        for shard, count in enumerate(self.metadata.shards):
            check_shard(shard_path(self.folder, shard, len(self.metadata.shards)), count)
        self._records = None

    def __len__(self) -> int:
        return self.metadata.summary.records

    def __getitem__(self, index: int) -> FeatureRecord:
        if self._records is None:
            self._records = self._open()
        try:
            # One by one: TFDS's batched read starts a thread a shard every time, which costs more
            # than it saves.
            codec = CODECS[self.metadata.codec]
            record = decode(self._records[index], index, codec, self._rows)
            check_sizes(record, self.metadata.summary)
            return record
        except Exception as error:  # ArrayRecord, protobuf, TFDS and NumPy, each in its own way
            counts = self.metadata.shards
            shard = int(np.searchsorted(np.cumsum(counts), index, side="right"))
            path = shard_path(self.folder, shard, len(counts))
            remedy = "delete this file and run the same extract command again"
            why = first_line(error)
            raise InputError(f"{path}: record {index} cannot be read ({why}); {remedy}") from error

    def _open(self) -> Any:
        """TFDS's view of the records."""
        try:
            builder: Any = tfds.builder_from_directory(self.folder)
            return builder.as_data_source(split="train")
        except Exception as error:  # of files that only TFDS reads
            raise InputError(
                f"{self.folder}: dataset_info.json and features.json cannot be read "
                f"({first_line(error)}); delete {METADATA_FILE} and run the same extract command "
                "again, which writes them anew"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        # A copy, made for a worker, reads by number and has no use for the sizes of them all.
        summary = replace(self.metadata.summary, sizes=(), captions=())
        metadata = replace(self.metadata, summary=summary)
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
    """Raises InputError unless the shard is there, whole (its index stands at its end), and holds
    `count` records."""
    remedy = "run the same extract command again to replace it"
    if not path.exists():
        raise InputError(f"{path}: the shard is missing; {remedy}")

    def count_records() -> int:
        reader = array_record_module.ArrayRecordReader(str(path))
        found = reader.num_records()
        reader.close()  # reports what went wrong on opening
        return found

    try:
        found = ask_in_time(path, count_records)
    except RuntimeError as error:
        why = f"the shard is damaged or truncated ({error})"
        raise InputError(f"{path}: {why}; {remedy}") from error
    if found != count:
        raise InputError(f"{path}: {found} records instead of {count}; {remedy}")
