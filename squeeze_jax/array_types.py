"""Array types and the glossary of axis letters.

The same letters stand in types, einsum strings and comments everywhere:

    B  batch
    M  hidden states of the MLLM (layers + 1: index 0 is the embeddings, the last is after the final norm)
    L  tokens of the MLLM's sequence (Lt of them text, Li image); the context stream of the transformer
    N  target tokens (2x2 latent patches), R reference tokens (all references of a sample in a row)
    T  tokens of whatever sequence a function works on (queries), S keys
    C  width (channels) of a stream, F width of a feed-forward layer
    H  attention heads, K key/value heads, D width of a head
    h, w  height and width of a grid of tokens or latents; height, width of pictures are written out

Times are in [0, 1] with 1 = pure noise. Masks are boolean, True = attend (or: valid).
"""

from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

if TYPE_CHECKING:  # shapes and kinds are checked at run time, by the tests
    from typing import Any as Array
else:
    Array = jax.Array | np.ndarray
DType = jax.typing.DTypeLike
Key = jax.Array
PyTree = Any
"""Arrays in any nesting of containers, or what stands for arrays (shapes, shardings, specs)."""
Device = Any
"""A device of JAX: one that is there, or one of a topology that a program is compiled for."""
Json = dict[str, Any]
"""A JSON object."""

__all__ = ["Array", "Bool", "DType", "Device", "Float", "Int", "Json", "Key", "PyTree", "UInt8"]
