"""A feature record: what the frozen encoders make of one example, and its bytes as TFDS writes
them.

No TensorFlow and no JAX is imported here, since data workers run this file.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Float, Int32
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from squeeze_jax.data.codec import Codec


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
    caption: int = 0
    """Which of its example's captions `prompt` is: 0 begins another example. For writing, which
    notes it for the whole shard (`ShardSummary.captions`)."""


@dataclass(frozen=True)
class Shape:
    """The sizes that all records of a data set share."""

    layers: int
    """M: hidden states a token has in the record."""
    width: int
    """C."""
    target: tuple[int | None, int | None, int]
    """Height, width and channels of the target's latent; height and width None where targets are of
    several sizes."""


def record_shape(record: FeatureRecord, mixed: bool = False) -> Shape:
    """The shape of the data set that a record belongs to; `mixed`: one with targets of several
    sizes."""
    layers, _, width = record.text.shape
    height, width_of_target, channels = record.target.shape
    return Shape(
        layers, width, (None, None, channels) if mixed else (height, width_of_target, channels)
    )


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
    """The record as `record_features` describes it: hidden states in parts, references flat with
    their sizes."""
    flat = [latent.astype(np.float32).ravel() for latent in record.references]
    parts = {name: codec.encode(getattr(record, name)) for name in STATES}
    return {
        "prompt": record.prompt,
        "text_positions": record.text_positions.astype(np.int32),
        "image_positions": record.image_positions.astype(np.int32),
        "target": record.target.astype(np.float32),
        "references": np.concatenate([np.zeros(0, np.float32), *flat]),
        "reference_sizes": np.array([r.shape[:2] for r in record.references], np.int32).reshape(
            -1, 2
        ),
        **{name + suffix: part for name in STATES for suffix, part in parts[name].items()},
    }


def serialise(features: tfds.features.FeaturesDict, example: dict[str, Any]) -> bytes:
    """TFDS's bytes of a record, the same from every process.

    Its own `serialize_example` mixes the order of the fields.
    """
    described: Any = features.get_serialized_info()
    serializer = ExampleSerializer(described)
    return serializer.get_tf_example(features.encode_example(example)).SerializeToString(
        deterministic=True
    )


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
        return codec.decode(
            parts if rows is None else {suffix: part[list(rows)] for suffix, part in parts.items()}
        )

    return FeatureRecord(
        prompt=example["prompt"].decode(),
        text=states("text"),
        text_positions=example["text_positions"],
        image=states("image"),
        image_positions=example["image_positions"],
        target=example["target"],
        references=tuple(
            part.reshape(h, w, channels) for part, (h, w) in zip(flat, sizes, strict=True)
        ),
        number=number,
    )
