"""Frozen blocks in 8 bits a weight: half the memory of bfloat16, for chips that have little.

Each output channel has a scale of its own: kernel ≈ int8 · scale. qwix, Google's quantisation
library for JAX, does the rounding. Activations keep their dtype. Only kernels of stacked blocks
are quantised: they are nearly all of a transformer. The layers around the stacks, norms and
biases stay as they are (our decision).
"""

import jax
import jax.numpy as jnp
from flax import nnx

from squeeze_jax.array_types import Array, Float, PyTree
from squeeze_jax.errors import InputError
from squeeze_jax.layers.lora import linears


def quantise(model: nnx.Module) -> nnx.Module:
    """Replaces the kernel of every stacked linear layer by int8 values and `kernel_scale` [depth,
    out], in place.

    Kernels that are int8 already stay as they are. On a mesh, values stay on their devices.
    Raises InputError where qwix is not installed.
    """
    for _, linear in linears(model):
        kernel = linear.kernel[...]
        if kernel.ndim == 3 and linear.kernel_scale is None:
            values, scale = _rounded(kernel)
            linear.kernel.set_value(values)
            linear.kernel_scale = nnx.Param(scale)
    return model


@jax.jit
def _rounded(kernel: Float[Array, "depth C F"]) -> tuple[PyTree, Float[Array, "depth F"]]:
    try:
        import qwix  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(
            'int8 weights need qwix; run `pip install "squeeze_jax[quantize]"`'
        ) from None
    rounded = qwix.quantize(kernel.astype(jnp.float32), jnp.int8, channelwise_axes=(0, 2))
    return rounded.qvalue, rounded.scale[:, 0]
