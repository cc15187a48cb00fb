"""A scanned stack equals its blocks run one by one, whatever a backward pass keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from squeeze_jax.layers.linear import Linear
from squeeze_jax.layers.stack import (
    ATTENTION,
    REMAT,
    rematerialised,
    scan_blocks,
    stack_blocks,
    unstack,
)

DEPTH, WIDTH = 3, 6


class Block(nnx.Module):
    """Two layers with a tagged value between them, and a bias that no scan may mix up."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.second = Linear(2 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x, extra):
        hidden = checkpoint_name(jnp.sin(self.first(x)) * 2, ATTENTION)
        y = x + self.second(jnp.cos(hidden)) * extra
        return y, jnp.sum(y)


@pytest.fixture(scope="module")
def problem():
    blocks = stack_blocks(Block, DEPTH, nnx.Rngs(0))
    rng = np.random.default_rng(0)
    blocks.first.bias.set_value(jnp.asarray(rng.standard_normal((DEPTH, 2 * WIDTH)), jnp.float32))
    graph, state = nnx.split(blocks)
    x = jnp.asarray(rng.standard_normal((4, WIDTH)), jnp.float32)
    extras = jnp.arange(1.0, DEPTH + 1)

    def run(state, remat, unroll=1):
        return scan_blocks(nnx.merge(graph, state), lambda b, x, e: b(x, e), x, extras, remat=remat, unroll=unroll)

    def loss(state, remat):
        out, sums = run(state, remat)
        return jnp.sum(jnp.square(out)) + jnp.sum(sums)

    return graph, state, x, extras, run, loss


def test_every_block_has_initial_weights_of_its_own(problem):
    _, state, *_ = problem
    kernel = np.asarray(state["first"]["kernel"][...])
    assert kernel.shape == (DEPTH, WIDTH, 2 * WIDTH)
    assert all(np.abs(kernel[i] - kernel[j]).min() > 0 for i in range(DEPTH) for j in range(i))
    assert kernel.std() == pytest.approx(WIDTH**-0.5, rel=0.2)


@pytest.mark.parametrize("unroll", [1, True])
def test_scan_equals_a_loop_over_unstacked_blocks(problem, unroll):
    graph, state, x, extras, run, _ = problem
    out, sums = run(state, "none", unroll)
    expected = []
    for i in range(DEPTH):
        x, total = nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], state))(x, extras[i])
        expected.append(total)
    np.testing.assert_allclose(out, x, rtol=1e-6)
    np.testing.assert_allclose(sums, jnp.stack(expected), rtol=1e-5)


@pytest.mark.parametrize("taken", [lambda state: state, lambda state: unstack(nnx.State({"in": state}), ["in"])["in"]])
def test_some_of_the_blocks(problem, taken):
    """The first and then the others are all of them."""
    graph, state, x, extras, run, _ = problem
    blocks = nnx.merge(graph, taken(state))
    some = lambda x, among: scan_blocks(blocks, lambda b, x, e: b(x, e), x, extras, block_range=among)  # noqa: E731
    (first, one), all_blocks = some(x, range(1)), run(state, "none")
    rest, others = some(first, range(1, DEPTH))
    np.testing.assert_allclose(rest, all_blocks[0], rtol=1e-6)
    np.testing.assert_allclose(jnp.concatenate([one, others]), all_blocks[1], rtol=1e-6)
    np.testing.assert_array_equal(some(first, range(1, 1))[0], first)


def test_blocks_apart_are_the_same_blocks(problem):
    _, state, _, _, run, _ = problem
    both = nnx.State({"inside": state, "beside": nnx.State({"whole": nnx.Param(jnp.ones(DEPTH))})})
    taken = unstack(both, ["inside"])
    assert isinstance(taken["inside"]["first"]["kernel"].get_value(), tuple)
    assert taken["beside"]["whole"].get_value().shape == (DEPTH,)
    for remat in ("none", "block"):
        out, sums = jax.jit(lambda s, remat=remat: run(s, remat))(taken["inside"])
        expected = run(state, "none")
        np.testing.assert_allclose(out, expected[0], rtol=1e-6)
        np.testing.assert_allclose(sums, expected[1], rtol=1e-6)
    text = jax.jit(lambda s: run(s, "none")).lower(taken["inside"]).as_text()
    assert "while" not in text and f"{DEPTH}x{WIDTH}x" not in text, "no loop, and no stack to slice"


@pytest.mark.parametrize("remat", [policy for policy in REMAT if policy != "none"])
def test_policies_change_neither_output_nor_gradient(problem, remat):
    *_, state, _, _, _, loss = problem
    plain = jax.jit(jax.value_and_grad(lambda s: loss(s, "none")))(state)
    try:
        kept = jax.jit(jax.value_and_grad(lambda s: loss(s, remat)))(state)
    except Exception as error:
        if remat != "offload_attention":
            raise
        pytest.skip(f"this backend has no host memory to offload to: {str(error)[:120]}")
    for ours, theirs in zip(jax.tree.leaves(kept), jax.tree.leaves(plain)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_policies_keep_what_they_say(problem):
    """Numbers that the backward pass receives beside the parameters: all, attention's output, block inputs only."""
    *_, state, _, _, _, loss = problem

    def kept(remat):
        residuals = jax.eval_shape(lambda s: jax.vjp(lambda s: loss(s, remat), s)[1], state)
        return sum(leaf.size for leaf in jax.tree.leaves(residuals))

    block, attention, everything = kept("block"), kept("save_attention"), kept("none")
    assert attention - block == DEPTH * 4 * 2 * WIDTH
    assert everything > attention


def test_an_unknown_policy_is_refused():
    with pytest.raises(Exception, match="everything"):
        rematerialised(lambda x: x, "everything")
