"""Frozen blocks in 8 bits a weight: half of bfloat16's memory, for chips that have little.

Each output channel has a scale of its own: kernel ≈ int8 · scale. Rounding is qwix's, Google's quantisation library for
JAX; activations keep their dtype. Only the kernels of stacks are quantised, which are nearly all of a transformer; the few
layers around them, norms and biases stay as they are (our decision).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from squeeze_jax.array_types import Array, Float
from squeeze_jax.errors import InputError
from squeeze_jax.layers.lora import linears


def quantise(model: nnx.Module) -> nnx.Module:
    """The model, with the kernel of every stacked linear layer replaced by int8 values and `kernel_scale` [depth, out].

    Those that are int8 already, and on a mesh all where they lie, stay. Raises InputError where qwix is not installed.
    """
    for _, linear in linears(model):
        kernel = linear.kernel[...]
        if kernel.ndim == 3 and linear.kernel_scale is None:
            values, scale = _rounded(kernel)
            linear.kernel.set_value(values)
            linear.kernel_scale = nnx.Param(scale)
    return model


@jax.jit
def _rounded(kernel: Float[Array, "depth C F"]) -> tuple[Any, Float[Array, "depth F"]]:
    try:
        import qwix
    except ImportError:
        raise InputError(
            'int8 weights need qwix; run `pip install "squeeze_jax[quantize]"`'
        ) from None
    rounded = qwix.quantize(kernel.astype(jnp.float32), jnp.int8, channelwise_axes=(0, 2))
    return rounded.qvalue, rounded.scale[:, 0]
