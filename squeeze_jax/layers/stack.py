"""A stack of blocks as one module: its parameters have a leading depth axis, and a scan applies
them.

Compile time and program size do not grow with depth, and the same stack serves training and
sampling.
"""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Literal, TypeVar, cast, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from squeeze_jax.array_types import PyTree
from squeeze_jax.layers.linear import PRODUCT

Remat = Literal["none", "block", "save_attention", "save_products", "offload_attention"]
REMAT = get_args(Remat)
ATTENTION = "attention"
"""The `checkpoint_name` tag that blocks put on the output of their attention; a kernel's inputs
have its own."""

Block = TypeVar("Block", bound=nnx.Module)


def stack_blocks(make_block: Callable[[nnx.Rngs], Block], depth: int, rngs: nnx.Rngs) -> Block:
    """`depth` independently initialised blocks as one module whose every parameter has a leading
    axis [depth].
    """
    init = nnx.vmap(make_block, in_axes=(0,), out_axes=0)
    return cast(Block, init(rngs.split(depth)))


def scan_blocks(
    blocks: nnx.Module,
    apply: Callable[..., PyTree],
    carry: PyTree,
    per_block: PyTree = None,
    *,
    remat: Remat = "none",
    unroll: int | bool = 1,
    block_range: range | None = None,
) -> tuple[PyTree, PyTree]:
    """Runs `apply(block, carry, per_block[i]) -> (carry, output)` over all blocks in order, or
    over `block_range`.

    Returns the last carry, and the outputs on a leading axis [depth]. `apply` closes over what
    all blocks share (masks, positions, modulation input). `remat` names what is kept for the
    backward pass:

    - `none`: everything that it needs;
    - `block`: each block's input alone; the backward pass runs the block again;
    - `save_attention`: as `block`, and attention outputs;
    - `save_products`: as `save_attention`, and the outputs of linear layers and the inputs of
      attention kernels. Only elementwise work (norms, modulation, activations) is run again.
      Inputs of frozen layers are not kept, since frozen weights have no gradient;
    - `offload_attention`: as `save_attention`, kept in host memory.
    """
    graph, parameters = nnx.split(blocks)  # `merge` makes the module of one block from a slice

    def body(carry: PyTree, leaves: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        parameters, inputs = leaves
        return apply(nnx.merge(graph, parameters), carry, inputs)

    # Blocks taken apart by `unstack`: one after the other, without a loop.
    if (depth := unstacked_depth(parameters)) is not None:
        body, outputs = rematerialised(body, remat, prevent_cse=True), []
        for i in range(depth) if block_range is None else block_range:
            take = itemgetter(i)
            own = jax.tree.map(take, parameters, is_leaf=is_unstacked)
            carry, output = body(carry, (own, jax.tree.map(take, per_block)))
            outputs.append(output)
        return carry, jax.tree.map(lambda *each: jnp.stack(each), *outputs) if outputs else None
    # Stacked blocks: a loop over the depth axis.
    depth = len(jax.tree.leaves(parameters)[0]) if block_range is None else len(block_range)
    body = rematerialised(body, remat, prevent_cse=depth == 1 or unroll is True or depth <= unroll)
    if block_range is None:
        return jax.lax.scan(body, carry, (parameters, per_block), unroll=unroll)

    # Some of them: a loop over their numbers, since a slice would copy their parameters.
    def pick(carry: PyTree, i: jax.Array) -> tuple[PyTree, PyTree]:
        take = lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False)  # noqa: E731
        return body(carry, jax.tree.map(take, (parameters, per_block)))

    return jax.lax.scan(pick, carry, jnp.arange(block_range.start, block_range.stop), unroll=unroll)


def is_unstacked(node: PyTree) -> bool:
    """Whether a leaf is a tuple of arrays, one for each block."""
    return isinstance(node, tuple)


def unstacked_depth(parameters: nnx.State) -> int | None:
    """The number of blocks where `unstack` took the parameters apart; None where they are
    stacked.
    """
    first = jax.tree.leaves(parameters, is_leaf=is_unstacked)[0]
    return len(first) if is_unstacked(first) else None


def unstack(state: nnx.State, inside: Sequence[str], *, donate: bool = False) -> nnx.State:
    """Takes stacks apart: below modules of the names `inside`, each leaf becomes a tuple with one
    array for each block.

    `scan_blocks` runs such blocks one after the other without a loop. It is faster on GPUs: XLA
    copies a block's matrices out of a stack before it hands them to cuBLAS, and reads matrices
    that are arrays of their own in place. On an H100 the copies take a fifth of the time of a
    picture of 512 x 512. `donate` frees each stack once it is apart.
    """
    flat = []
    for path, variable in nnx.to_flat_state(state):
        if any(part in inside for part in path) and not is_unstacked(variable.get_value()):
            stack = variable.get_value()
            variable = variable.replace(tuple(stack[i] for i in range(len(stack))))
            if donate:
                jax.block_until_ready(variable.get_value())
                stack.delete()
        flat.append((path, variable))
    return nnx.from_flat_state(flat)


def rematerialised(
    function: Callable[..., PyTree], remat: Remat, *, prevent_cse: bool = False
) -> Callable[..., PyTree]:
    """`function` wrapped in `jax.checkpoint` under the named policy (see `scan_blocks`).

    `prevent_cse` puts a barrier between the forward pass and its recomputation. It is needed where
    no loop separates the two, also where the loop has one step, since the compiler removes that.
    Without it the compiler would see the same computation twice, do it once and keep all its
    intermediate results. Raises ValueError for an unknown policy.
    """
    policies = jax.checkpoint_policies
    match remat:
        case "none":
            return function
        case "block":
            policy = policies.nothing_saveable
        case "save_attention":
            policy = policies.save_only_these_names(ATTENTION)
        case "save_products":
            policy = policies.save_only_these_names(ATTENTION, f"{ATTENTION}_inputs", PRODUCT)
        case "offload_attention":
            policy = policies.save_and_offload_only_these_names(
                names_which_can_be_saved=[],
                names_which_can_be_offloaded=[ATTENTION],
                offload_src="device",
                offload_dst="pinned_host",
            )
        case _:
            raise ValueError(f"remat is {remat!r}; choose one of {', '.join(REMAT)}")
    return jax.checkpoint(function, policy=policy, prevent_cse=prevent_cse)
