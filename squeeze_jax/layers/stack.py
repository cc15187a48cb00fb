"""One block, stack_blocks: parameters with a leading depth axis, applied by a scan.

Compile time and program size do not grow with depth, and the same stack serves training and sampling.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, cast, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from squeeze_jax.layers.linear import PRODUCT

Remat = Literal["none", "block", "save_attention", "save_products", "offload_attention"]
REMAT = get_args(Remat)
ATTENTION = "attention"
"""The `checkpoint_name` tag that blocks put on the output of their attention; a kernel's inputs have its own."""

Block = TypeVar("Block", bound=nnx.Module)


def stack_blocks(make_block: Callable[[nnx.Rngs], Block], depth: int, rngs: nnx.Rngs) -> Block:
    """`depth` independently initialised blocks as one module whose every parameter has a leading axis [depth]."""
    init = nnx.vmap(make_block, in_axes=(0,), out_axes=0)
    return cast(Block, init(rngs.split(depth)))


def scan_blocks(
    blocks: nnx.Module,
    apply: Callable[..., Any],
    carry: Any,
    per_block: Any = None,
    *,
    remat: Remat = "none",
    unroll: int | bool = 1,
    block_range: range | None = None,
) -> tuple[Any, Any]:
    """Runs `apply(block, carry, per_block[i]) -> (carry, output)` over the blocks in order, or over those in `block_range`.

    Returns the last carry and the outputs stack_blocks on a leading axis [depth]. Everything else that a block needs
    (masks, positions, modulation input) is closed over by `apply`. `remat` names what a backward pass keeps:

    - `none`: everything that it needs;
    - `block`: only each block's input, the block is run again;
    - `save_attention`: as `block`, but attention outputs are kept;
    - `save_products`: as `save_attention`, and linear layers' outputs and an attention kernel's inputs too: nothing but
      elementwise work (norms, modulation, activations) is run again. The inputs of frozen layers are not kept, since frozen
      weights have no gradient;
    - `offload_attention`: as `save_attention`, kept in host memory.
    """
    graph, parameters = nnx.split(blocks)

    def body(carry: Any, leaves: tuple[Any, Any]) -> tuple[Any, Any]:
        parameters, inputs = leaves
        return apply(nnx.merge(graph, parameters), carry, inputs)

    if (depth := unstacked_depth(parameters)) is not None:
        body, outputs = rematerialised(body, remat, prevent_cse=True), []
        for i in range(depth) if block_range is None else block_range:
            own = jax.tree.map(lambda parts: parts[i], parameters, is_leaf=is_unstacked)  # noqa: B023
            carry, output = body(carry, (own, jax.tree.map(lambda x: x[i], per_block)))  # noqa: B023
            outputs.append(output)
        return carry, jax.tree.map(lambda *each: jnp.stack(each), *outputs) if outputs else None
    depth = len(jax.tree.leaves(parameters)[0]) if block_range is None else len(block_range)
    body = rematerialised(body, remat, prevent_cse=depth == 1 or unroll is True or depth <= unroll)
    if block_range is None:
        return jax.lax.scan(body, carry, (parameters, per_block), unroll=unroll)

    def pick(carry: Any, i: jax.Array) -> tuple[Any, Any]:
        take = lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False)  # noqa: E731
        return body(carry, jax.tree.map(take, (parameters, per_block)))

    return jax.lax.scan(pick, carry, jnp.arange(block_range.start, block_range.stop), unroll=unroll)


def is_unstacked(node: Any) -> bool:
    """Whether a leaf holds a tuple of arrays, one a block."""
    return isinstance(node, tuple)


def unstacked_depth(parameters: nnx.State) -> int | None:
    """Number of blocks of parameters that `unstack` took apart; None of stack_blocks ones."""
    first = jax.tree.leaves(parameters, is_leaf=is_unstacked)[0]
    return len(first) if is_unstacked(first) else None


def unstack(state: nnx.State, inside: Sequence[str], *, donate: bool = False) -> nnx.State:
    """A state whose leaves under a module of these names are tuples of one array a block in place of a stack of them.

    `scan_blocks` runs such blocks one after the other without a loop. XLA copies a block's matrices out of a stack before
    it hands them to cuBLAS, which on an H100 takes a fifth of the time of a picture of 512 x 512; matrices that are arrays
    of their own it reads in place. `donate` frees each stack as soon as it is apart.
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
    function: Callable[..., Any], remat: Remat, *, prevent_cse: bool = False
) -> Callable[..., Any]:
    """`function` wrapped in `jax.checkpoint` under the named policy (see `scan_blocks`).

    `prevent_cse` puts a barrier between the forward pass and its recomputation. It is needed where no loop separates
    them (the compiler removes a loop of one step): otherwise the compiler merges the two computations and keeps every
    intermediate result, which is what rematerialisation is to avoid.
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
