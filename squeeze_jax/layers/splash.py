"""Attention on TPU: the splash kernel (Pallas), which never holds a [tokens, tokens] array.

The partitioner cannot look into a kernel, so on a mesh it runs inside `shard_map`: rows over data
and fsdp, heads over tensor. Block sizes are our decision: large ones that need little padding.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec

from squeeze_jax.array_types import Array, Bool, Float
from squeeze_jax.layers.norm import scaled
from squeeze_jax.sharding import ROWS, current_mesh, drop_indivisible

BLOCKS = (1024, 768, 640, 512, 384, 256, 128)
"""Sizes of a block in tokens, of queries or keys; a block of more than 1024 does not fit into a
chip's scoped memory."""
KEYS = 1536
"""Most keys that the backward kernel holds at a time; 2560 (four blocks of 640) just do not fit
into scoped memory."""
LANES = 128
"""Of a TPU's vector register: tiles are multiples of it."""


def suits(query: jax.Array, key: jax.Array, mask: jax.Array | None) -> bool:
    """Whether the kernel takes [B, T, H, D] and [B, S, K, D]: at least 128 tokens, equal heads of a
    multiple of 128 channels, no mask per query."""
    same = query.shape[2:] == key.shape[2:] and query.shape[-1] % LANES == 0
    return same and min(query.shape[1], key.shape[1]) >= LANES and (mask is None or mask.ndim == 2)


def block_of(tokens: int) -> int:
    """The block of least cost, which is the square of the padded length times 1 + 128 / block
    (our decision): small blocks are slower.
    """
    return min(BLOCKS, key=lambda block: (-(-tokens // block) * block) ** 2 * (1 + LANES / block))


def padded(tokens: int) -> int:
    """Tokens in whole blocks."""
    block = block_of(tokens)
    return -(-tokens // block) * block


def _keys_at_once(length: int, block: int) -> int:
    """Keys that the backward kernel holds at a time: as many whole blocks as fit into a chip's
    scoped memory.

    For each such piece it writes a gradient of all queries; these gradients are summed afterwards.
    """
    blocks = length // block
    return block * max(
        n for n in range(1, blocks + 1) if blocks % n == 0 and (n == 1 or n * block <= KEYS)
    )


def splash_attention(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B S H D"],
    value: Float[Array, "B S H D"],
    mask: Bool[Array, "B S"] | None,
    *,
    name: str | None = None,
    interpret: bool = False,
) -> Float[Array, "B T H D"]:
    """Scaled dot-product attention: softmax(q·kᵀ / sqrt(D))·v over the keys whose mask is True.

    The mask splits tokens into two segments, and tokens attend within their segment. Where
    queries and keys are the same sequence (T = S), masked queries therefore attend to masked
    keys: their outputs have no meaning.

    `name` is the `checkpoint_name` of what a backward pass needs of the result, `name` +
    "_inputs" that of queries, keys and values as the kernel takes them. `interpret` runs the
    kernel on a CPU.
    """
    batch, tokens, _, width = query.shape
    rows, columns = block_of(tokens), block_of(key.shape[1])
    lengths = (padded(tokens), padded(key.shape[1]))
    valid = jnp.ones(key.shape[:2], bool) if mask is None else jnp.asarray(mask)
    asking = valid if key.shape[1] == tokens else jnp.ones((batch, tokens), bool)

    def full(x: jax.Array, length: int, axis: int) -> jax.Array:
        return jnp.pad(x, [(0, length - x.shape[axis] if i == axis else 0) for i in range(x.ndim)])

    segments = tuple(
        full(x.astype(jnp.int32), length, 1) for x, length in zip((asking, valid), lengths)
    )
    query = full(scaled(query, width**-0.5).swapaxes(1, 2), lengths[0], 2)
    key, value = (full(x.swapaxes(1, 2), lengths[1], 2) for x in (key, value))
    if name is not None:
        query, key, value = (checkpoint_name(x, f"{name}_inputs") for x in (query, key, value))
    sizes = splash.BlockSizes(
        block_q=rows, block_kv=columns, block_kv_compute=columns, block_q_dkv=rows,
        block_kv_dkv=_keys_at_once(lengths[1], columns), block_kv_dkv_compute=columns,
        use_fused_bwd_kernel=True,
    )  # fmt: skip

    def run(query: jax.Array, key: jax.Array, value: jax.Array, *segments: jax.Array) -> jax.Array:
        whole = masks.MultiHeadMask([masks.FullMask(lengths)] * query.shape[1])
        kernel = splash.make_splash_mha_single_device(
            whole, block_sizes=sizes, residual_checkpoint_name=name, interpret=interpret
        )
        attend: Any = jax.vmap(
            lambda q, k, v, asking, valid: kernel(q, k, v, splash.SegmentIds(asking, valid))
        )
        return attend(query, key, value, *segments)

    whole: Any = run
    mesh = current_mesh()
    if mesh is not None and mesh.size > 1:
        spec = drop_indivisible(PartitionSpec(ROWS, "tensor", None, None), query.shape, mesh)
        by_row = PartitionSpec(spec[0], None)
        # The kernel does not declare how its outputs vary over the mesh, so that is not checked.
        whole = jax.shard_map(
            run,
            mesh=mesh,
            in_specs=(spec, spec, spec, by_row, by_row),
            out_specs=spec,
            check_vma=False,
        )
    return whole(query, key, value, *segments)[:, :, :tokens].swapaxes(1, 2)
