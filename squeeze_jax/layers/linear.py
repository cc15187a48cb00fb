"""A linear layer that can carry a low-rank adapter."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from squeeze_jax.array_types import Array, DType, Float
from squeeze_jax.layers.norm import per_channel
from squeeze_jax.sharding import TensorAxis, all_gather_fsdp, current_mesh, platform

FLOAT32 = jax.lax.Precision.HIGHEST
"""The `precision` of products that are float32 on every device.

JAX's default multiplies float32 operands in bfloat16 on TPU, and in TF32 on newer GPUs; on CPUs
there is no difference. Source: docs/decisions.md, "Float32 and bfloat16".
"""

PRODUCT = "product"
"""The `checkpoint_name` tag of a product's result: a backward pass that does not keep it has to
multiply again."""


class Linear(nnx.Module):
    """y = x·kernel + bias (+ the adapter's delta).

    `kernel` is [in, out]: the transpose of PyTorch's `weight`. Initial values: normal with
    standard deviation in^-1/2 times `gain`, zero bias. `dtype` is what the product is computed
    in, `param_dtype` what is stored. `tensor_axis` is the axis of the kernel that a mesh's tensor
    axis splits: `in` where the inputs come in slices (after attention, or as the second layer of
    a feed-forward). It has to agree with what `sharding.PARAMETERS` says for the layer's name.
    `precision` matters for a `dtype` of float32: None takes JAX's default, `FLOAT32` is exact.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        gain: float = 1.0,
        tensor_axis: TensorAxis = "out",
        dtype: DType = jnp.float32,
        param_dtype: DType = jnp.float32,
        precision: jax.lax.PrecisionLike = None,
        rngs: nnx.Rngs,
    ) -> None:
        init = nnx.initializers.normal(gain * in_features**-0.5) if gain else nnx.initializers.zeros
        self.kernel = nnx.Param(init(rngs.params(), (in_features, out_features), param_dtype))
        self.bias = nnx.Param(jnp.zeros((out_features,), param_dtype)) if use_bias else None
        self.kernel_scale: Any = nnx.data(
            None
        )  # layers.int8: what the values of an int8 kernel stand for
        self.adapter: Any = nnx.data(None)  # layers.lora.Adapter
        self.dtype = jnp.dtype(dtype)
        self.tensor_axis: TensorAxis = tensor_axis
        self.precision = precision

    def __call__(self, x: Float[Array, "*B C"]) -> Float[Array, "*B F"]:
        return self.multiply((x,), (self.kernel.shape[-1],))[0]

    def multiply(self, inputs: Sequence[Array], sizes: Sequence[int]) -> list[jax.Array]:
        """What `split(layer(concatenate(inputs)))` is along the channels: inputs [*B, _], pieces
        [*B, size].

        On TPU neither the concatenation nor the whole output is made: each input meets its own
        rows of the kernel, each piece is the product of its own columns (`benchmarks/traffic.py`).
        Elsewhere, and where a mesh's tensor axis splits those rows or columns, it is one product:
        CPUs are faster with fewer and larger ones (`benchmarks/flux_small.py`), and on GPUs, where
        columns would have to be copied out of the kernel, nothing is measured. Raises ValueError
        where inputs or `sizes` do not add up to the kernel's rows or columns.
        """
        inputs, widths = [x.astype(self.dtype) for x in inputs], [x.shape[-1] for x in inputs]
        if (shape := self.kernel.shape[-2:]) != (sum(widths), sum(sizes)):
            # A slice of rows or columns would pass over the rest without a word.
            raise ValueError(
                f"a layer of {shape[0]} to {shape[1]} channels was given inputs of {widths} "
                f"channels for outputs of {list(sizes)}"
            )
        narrow = min(
            self.kernel.dtype, self.dtype, key=lambda kind: kind.itemsize
        )  # what the matrix travels in
        kernel = all_gather_fsdp(self.kernel[...].astype(narrow), self.tensor_axis).astype(
            self.dtype
        )
        mesh, apart, cut = current_mesh(), platform() == "tpu", sizes
        split = self.tensor_axis if mesh and mesh.shape.get("tensor", 1) > 1 else None
        if len(inputs) > 1 and (not apart or split == "in"):
            inputs = [jnp.concatenate(inputs, axis=-1)]
        if len(sizes) > 1 and (not apart or split == "out"):
            cut = (sum(sizes),)
        pieces = [
            self._multiply_columns(inputs, kernel, end - size, size)
            for size, end in zip(cut, accumulate(cut), strict=True)
        ]
        if self.adapter is not None:
            pieces = self.adapter.add(pieces, inputs, self.precision)
        pieces = [checkpoint_name(piece, PRODUCT) for piece in pieces]
        if cut is not sizes:
            return jnp.split(pieces[0], list(accumulate(sizes))[:-1], axis=-1)
        return pieces

    def _multiply_columns(
        self, inputs: Sequence[Array], kernel: Array, start: int, size: int
    ) -> jax.Array:
        """The base's output channels from `start` on."""
        columns = slice(start, start + size)
        kind = self.dtype if self.kernel_scale is None else jnp.float32
        y = multiply_rows(inputs, kernel[:, columns], kind, self.precision)
        if self.kernel_scale is not None:
            y = (y * per_channel(self.kernel_scale[...][columns], y)).astype(self.dtype)
        if self.bias is not None:
            y = y + per_channel(self.bias[...].astype(self.dtype)[columns], y)
        return y


def multiply_rows(
    inputs: Sequence[Array], matrix: Array, dtype: DType, precision: jax.lax.PrecisionLike
) -> jax.Array:
    """Multiplies inputs [*B, _] that lie side by side with a matrix [C, F], to [*B, F]: each input
    with its own rows, without a concatenation.

    Products of several inputs are added up in float32 and rounded once.
    """
    kind = dtype if len(inputs) == 1 else jnp.float32
    total, start = None, 0
    for x in inputs:
        rows = matrix[start : start + x.shape[-1]]
        y = jnp.matmul(x, rows, precision=precision, preferred_element_type=kind)
        total = y if total is None else total + y
        start += x.shape[-1]
    assert total is not None
    return total.astype(dtype)


def silu(x: jax.Array) -> jax.Array:
    """x · sigmoid(x) of any shape [...], as in FLUX.1.

    `jax.nn.silu` is compiled as a function of its own, which changes the last bit of gradients, and
    so would not continue earlier runs exactly.
    """
    return x * jax.nn.sigmoid(x)
