"""How a record keeps hidden states: as bf16, or as int8 with one scale a (layer, token) and its
outliers apart.

A codec turns hidden states [M, L, C] into named parts that all have the leading axes M and L, and
back into bf16. Decoding happens on the host, in the workers. No TensorFlow and no JAX is imported
here, since data workers run this file.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Float

BF16 = np.dtype(ml_dtypes.bfloat16)
LARGEST = 127
"""int8 values are −127 .. 127, so that a sign costs nothing."""
OUTLIER_SHARE = 256
"""One channel in so many is kept in bf16 besides (our decision): a token's largest values, in a
multimodal LLM hundreds of times its others, would otherwise set the scale and round the others
to nothing."""

Parts = dict[str, np.ndarray]


class Codec(NamedTuple):
    """One way to keep hidden states."""

    version: int
    """What the folder's metadata says; readers refuse versions that they do not know."""
    layout: Callable[[int], dict[str, tuple[type, tuple[int, ...]]]]
    """For a width C, each part's suffix, dtype, and size after the axes M and L."""
    encode: Callable[[Float[np.ndarray, "M L C"]], Parts]
    """Parts of float32 or bf16 states."""
    decode: Callable[[Parts], Float[np.ndarray, "M L C"]]
    """bf16 states; may be a view of the parts."""


def _bf16_parts(states: Float[np.ndarray, "M L C"]) -> Parts:
    return {"": np.ascontiguousarray(states.astype(BF16)).view(np.uint16)}


def _bf16_states(parts: Parts) -> Float[np.ndarray, "M L C"]:
    return parts[""].view(BF16)


def outliers(width: int) -> int:
    """Channels of a token that int8 keeps in bf16: none below a width of `OUTLIER_SHARE`."""
    return width // OUTLIER_SHARE


def quantise(states: Float[np.ndarray, "M L C"], kept: int) -> Parts:
    """int8 parts with the `kept` largest channels of every (layer, token) apart.

    value = q·scale, scale = largest remaining |value| / 127 (our decision): an error of at most
    scale/2, all zeros stay zeros. Infinities and NaN are among the kept channels; a token that has
    more of them than that is NaN throughout, never a finite number.
    """
    q = np.empty(states.shape, np.int8)
    scales = np.empty(states.shape[:2], np.float32)
    large = np.empty((*states.shape[:2], kept), BF16)
    channels = np.empty((*states.shape[:2], kept), np.uint16)
    for layer, layer_states in enumerate(states):  # one by one, to stay in the processor's cache
        x = layer_states.astype(np.float32)
        if kept:
            size = np.abs(x)
            size[np.isnan(size)] = np.inf
            place = np.sort(
                np.argpartition(size, x.shape[-1] - kept, axis=-1)[:, x.shape[-1] - kept :], axis=-1
            )
            large[layer], channels[layer] = np.take_along_axis(x, place, -1), place
            np.put_along_axis(x, place, 0.0, -1)
        scale = np.abs(x).max(axis=-1, initial=0.0) / LARGEST
        scale[~np.isfinite(scale)] = np.nan
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            values = np.rint(x / scale[:, None])  # 0 / 0 where all is zero
        q[layer] = np.clip(np.nan_to_num(values, nan=0.0), -LARGEST, LARGEST)
        scales[layer] = scale
    parts = {"": q, "_scale": scales}
    return parts | ({"_outliers": large.view(np.uint16), "_channels": channels} if kept else {})


def dequantise(parts: Parts) -> Float[np.ndarray, "M L C"]:
    """The inverse of `quantise`, in bf16."""
    states = np.empty(parts[""].shape, BF16)
    for layer, (q, scale) in enumerate(zip(parts[""], parts["_scale"])):
        states[layer] = q * scale[:, None]
    if "_outliers" in parts:
        np.put_along_axis(
            states, parts["_channels"].astype(np.int64), parts["_outliers"].view(BF16), -1
        )
    return states


def _int8_layout(width: int) -> dict[str, tuple[type, tuple[int, ...]]]:
    kept: dict[str, Any] = {
        "_outliers": (np.uint16, (outliers(width),)),
        "_channels": (np.uint16, (outliers(width),)),
    }
    return {"": (np.int8, (width,)), "_scale": (np.float32, ())} | (kept if outliers(width) else {})


CODECS = {
    "bf16": Codec(1, lambda width: {"": (np.uint16, (width,))}, _bf16_parts, _bf16_states),
    "int8": Codec(
        2, _int8_layout, lambda states: quantise(states, outliers(states.shape[-1])), dequantise
    ),
}
"""By the name that `data.codec` gives. bf16 values are kept as their bits in uint16, which NumPy
and TFDS know."""
