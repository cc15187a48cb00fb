"""Attention on NVIDIA GPUs: cuDNN's flash attention as JAX offers it, cut over the mesh like the TPU's kernel."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from squeeze_jax.array_types import Array, Bool, Float
from squeeze_jax.sharding import ROWS, current_mesh, evenly


def suits(query: jax.Array, key: jax.Array, mask: jax.Array | None) -> bool:
    """Whether cuDNN has it: half precision, heads of at most 128 channels, even lengths where there is a mask."""
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    even = mask is None or (query.shape[1] % 2 == 0 and key.shape[1] % 2 == 0)
    return half and even and query.shape[-1] <= 128 and query.shape[-1] % 8 == 0 and min(query.shape[1], key.shape[1]) > 0


def cudnn_attention(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K D"],
    mask: Bool[Array, "B S"] | Bool[Array, "B T S"] | None,
) -> Float[Array, "B T H D"]:
    """softmax(q·kᵀ / sqrt(D))·v; never holds [H, T, S], but a mask costs [T, S] for each example."""

    def run(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None) -> jax.Array:
        if mask is not None:
            rows = mask[:, None] if mask.ndim == 2 else mask
            shape = (query.shape[0], 1, query.shape[1], key.shape[1])
            mask = jnp.broadcast_to(rows[:, None], shape)
        return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="cudnn")

    mesh = current_mesh()
    if mesh is None or mesh.size == 1:
        return run(query, key, value, mask)
    heads = PartitionSpec(ROWS, None, "tensor", None)
    specs = [evenly(heads, x.shape, mesh) for x in (query, key, value)]
    # Shared key heads stay with their query heads: cut all of them or none.
    if specs[0][2] != specs[1][2]:
        specs = [PartitionSpec(spec[0]) for spec in specs]
    rows = None if mask is None else PartitionSpec(specs[0][0])
    return jax.shard_map(run, mesh=mesh, in_specs=(*specs, rows), out_specs=specs[0], check_vma=False)(
        query, key, value, mask
    )
