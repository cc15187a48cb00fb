"""Attention on NVIDIA GPUs: cuDNN's flash attention, which runs on each device's part of the mesh
as the TPU's kernel does."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from squeeze_jax.array_types import Array, Bool, Float, Int
from squeeze_jax.sharding import ROWS, current_mesh, drop_indivisible

LEAST = 64
"""Fewest tokens that the kernel is used for (our decision). An aggregator's attention over layers
has fewer; plain products are as fast there."""


def suits(query: jax.Array, key: jax.Array) -> bool:
    """Whether cuDNN has a kernel for [B, T, H, D] and [B, S, K, D]: it wants half precision and
    heads of at most 128 channels."""
    half, many = (
        query.dtype in (jnp.bfloat16, jnp.float16),
        min(query.shape[1], key.shape[1]) >= LEAST,
    )
    return half and many and query.shape[-1] <= 128 and query.shape[-1] % 8 == 0


@jax.custom_vjp
def reordered(x: Float[Array, "B S K D"], order: Int[Array, "B S"]) -> Float[Array, "B S K D"]:
    """Puts tokens in another order, a permutation. Its gradient is a gather too; JAX's own would
    be a scatter.
    """
    return jnp.take_along_axis(x, order[:, :, None, None], axis=1)


def _reordered_backward(order: jax.Array, gradient: jax.Array) -> tuple[jax.Array, None]:
    return reordered(gradient, jnp.argsort(order, axis=1)), None


reordered.defvjp(lambda x, order: (reordered(x, order), order), _reordered_backward)


def cudnn_attention(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K D"],
    mask: Bool[Array, "B S"] | Bool[Array, "B T S"] | None,
) -> Float[Array, "B T H D"]:
    """Scaled dot-product attention: softmax(q·kᵀ / sqrt(D))·v. It never holds [H, T, S]; a mask
    [B, T, S] costs [T, S] for each example.

    Where the mask is the same for all queries [B, S], the unmasked keys are moved to the front
    and the kernel is given their number: it skips the rest and has no mask to read. Odd lengths
    are padded to even ones, since JAX has no gradient of this kernel for odd ones.
    """
    tokens, keys = query.shape[1], key.shape[1]
    if keys % 2 and mask is None:
        mask = jnp.ones((query.shape[0], keys), bool)
    query, key, value = (
        jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (query, key, value)
    )
    if mask is not None:
        of_queries = ((0, tokens % 2),) if mask.ndim == 3 else ()
        mask = jnp.pad(mask, ((0, 0), *of_queries, (0, keys % 2)))

    def run(
        query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None
    ) -> jax.Array:
        lengths = None
        if mask is not None and mask.ndim == 2:
            order = jnp.argsort(~mask, axis=1)
            lengths = jnp.maximum(mask.sum(axis=1, dtype=jnp.int32), 1)
            counts = (jnp.arange(mask.shape[1])[None] < lengths[:, None])[..., None, None]
            key, value = (jnp.where(counts, reordered(x, order), 0) for x in (key, value))
            mask = None
        elif mask is not None:
            mask = jnp.broadcast_to(
                mask[:, None], (query.shape[0], 1, query.shape[1], key.shape[1])
            )
        return jax.nn.dot_product_attention(
            query, key, value, mask=mask, key_value_seq_lengths=lengths, implementation="cudnn"
        )

    mesh = current_mesh()
    if mesh is None or mesh.size == 1:
        return run(query, key, value, mask)[:, :tokens]
    heads = PartitionSpec(ROWS, None, "tensor", None)
    specs = [drop_indivisible(heads, x.shape, mesh) for x in (query, key, value)]
    # Shared key heads stay with their query heads: cut all of them or none.
    if specs[0][2] != specs[1][2]:
        specs = [PartitionSpec(spec[0]) for spec in specs]
    rows = None if mask is None else PartitionSpec(specs[0][0])
    cut = jax.shard_map(
        run, mesh=mesh, in_specs=(*specs, rows), out_specs=specs[0], check_vma=False
    )
    return cut(query, key, value, mask)[:, :tokens]
