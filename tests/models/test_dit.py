"""The transformer against diffusers' FluxTransformer2DModel, and the properties that sampling relies on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parity import relative_error
from small_dit import (
    CONFIG,
    arrays_of,
    compiled,
    inputs,
    like_twin,
    random_dit,
    run,
    run_twin,
    torch_twin,
)

from squeeze_jax.batch import References
from squeeze_jax.diffusion.latents import reference_positions
from squeeze_jax.models.dit import DiTConfig
from squeeze_jax.models.dit_blocks import QKNorm
from squeeze_jax.sampling.caching import FirstBlockCache, velocity_by_first_block

SCHNELL = DiTConfig(**{**vars(CONFIG), "guidance": False})
CACHED = DiTConfig(**{**vars(CONFIG), "reference_attention": "cached"})


@pytest.mark.parametrize(
    ("shape", "config"),
    [
        ({"references": ()}, CONFIG),
        ({"batch": 3, "grid": (2, 5), "references": ((2, 3),), "context": 9}, CONFIG),
        ({"references": ((2, 3), (4, 2), (1, 1))}, SCHNELL),
    ],
    ids=["no reference", "one", "three, schnell"],
)
def test_velocity_equals_diffusers(shape, config):
    torch, twin = torch_twin(config)
    dit, _ = like_twin(twin, config)
    x = inputs(**shape, config=config)
    with torch.no_grad():
        theirs = run_twin(torch, twin, x)
    assert relative_error(run(dit, x), theirs) < 1e-5


@pytest.mark.parametrize("products", ["cpu", "tpu"])
def test_gradients_equal_diffusers(products, monkeypatch):
    """With fused layers as one product, and in pieces, as on TPU."""
    monkeypatch.setattr("squeeze_jax.layers.linear.platform", lambda: products)
    torch, twin = torch_twin()
    x = inputs()
    function, state = compiled(like_twin(twin)[0], x["target_grid"], [g for _, g in x["references"]])
    weights = np.random.default_rng(5).standard_normal(x["target"].shape).astype(np.float32)
    ours = jax.jit(jax.grad(lambda arrays: jnp.sum(function(state, arrays) * weights)))(arrays_of(x))

    leaves = {k: torch.tensor(v, requires_grad=True) for k, v in x.items() if isinstance(v, np.ndarray)}
    references = [(torch.tensor(tokens, requires_grad=True), grid) for tokens, grid in x["references"]]
    out = run_twin(torch, twin, {**x, **leaves, "references": references})
    (out * torch.from_numpy(weights)).sum().backward()
    for name, leaf in leaves.items():
        assert relative_error(ours[name], leaf.grad) < 1e-4, name
    for mine, (theirs, grid) in zip(ours["references"], references, strict=True):
        assert relative_error(mine, theirs.grad) < 1e-4, grid


def test_a_first_block_cache_equals_diffusers():
    """Velocities along a path, with the same steps left out."""
    torch, twin = torch_twin()
    from diffusers.hooks import FirstBlockCacheConfig

    dit, _ = like_twin(twin)
    x = inputs(references=())
    graph, state = nnx.split(dit)
    threshold, way = 0.06, np.random.default_rng(3).standard_normal(x["target"].shape).astype(np.float32)
    ways = [{**x, "target": x["target"] + 0.01 * i**2 * way, "t": x["t"] - 1e-4 * i} for i in range(7)]

    @jax.jit
    def step(state, target, t, kept):
        dit = nnx.merge(graph, state)
        temb = dit.embed_timestep(t, x["guidance"], x["pooled"])
        streams, block_inputs = dit.embed_inputs(target, x["target_grid"], temb, x["context"])
        return velocity_by_first_block(dit, streams, block_inputs, target.shape[1], kept, threshold)

    (kept, _), left_out = FirstBlockCache(threshold).init(jnp.asarray(x["target"]), CONFIG.width), []
    twin.enable_cache(FirstBlockCacheConfig(threshold))
    with torch.no_grad(), twin.cache_context("one branch"):
        for each in ways:
            before = kept.first
            ours, kept = step(state, each["target"], each["t"], kept)
            assert relative_error(ours, run_twin(torch, twin, each)) < 1e-5
            left_out.append(bool((before == kept.first).all()))
    assert not left_out[0] and 2 <= sum(left_out) <= 5, "both happened"
    twin.disable_cache()


def test_cached_references_equal_diffusers_where_references_see_references_alone():
    """At t = 0 that is all the difference; our attention from them to others, masked out in diffusers'."""
    torch, twin = torch_twin()
    x = inputs()
    x["t"] = np.zeros(2, np.float32)
    own = x["context"].shape[1] + x["target"].shape[1]
    allowed = torch.ones(own + 14, own + 14, dtype=torch.bool)
    allowed[own:, :own] = False
    with torch.no_grad():
        theirs = run_twin(torch, twin, x, joint_attention_kwargs={"attention_mask": allowed[None, None]})
        joint = run_twin(torch, twin, x)
    ours = run(like_twin(twin, CACHED)[0], x)
    assert relative_error(ours, theirs) < 1e-5
    assert relative_error(ours, joint) > 1e-3


def test_cached_references_are_those_of_time_zero_whatever_the_time():
    dit, x = random_dit(CACHED), inputs()
    positions = np.concatenate([reference_positions(x["target_grid"], [g for _, g in x["references"]])])
    tokens = np.concatenate([tokens for tokens, _ in x["references"]], axis=1)
    references = References(tokens, np.ones(tokens.shape[:2], bool), np.broadcast_to(positions, (2, *positions.shape)))
    graph, state = nnx.split(dit)

    @jax.jit
    def at(state, cached_at):
        dit = nnx.merge(graph, state)
        rest = x["guidance"], x["pooled"]
        cache = dit.cache_references(jax.tree.map(jnp.asarray, references), dit.embed_timestep(cached_at, *rest))
        return dit.velocity(x["target"], x["target_grid"], dit.embed_timestep(x["t"], *rest), x["context"], None, cache)

    whole = run(dit, x)
    assert relative_error(whole, at(state, np.zeros(2, np.float32))) < 1e-6
    assert relative_error(whole, at(state, x["t"])) > 1e-3


@pytest.mark.parametrize("config", [CONFIG, SCHNELL])
def test_modulation_made_beforehand_is_that_of_each_time(config):
    dit, x = random_dit(config), inputs(config=config)
    times = np.array([0.9, 0.5, 0.0], np.float32)
    graph, state = nnx.split(dit)

    def vector(dit, times):
        return dit.embed_timestep(times, None if not config.guidance else np.full(len(times), 3.5, np.float32))

    @jax.jit
    def both(state, i):
        dit = nnx.merge(graph, state)
        rest = x["context"], None, None
        known = dit.velocity(x["target"], x["target_grid"], dit.make_modulation(vector(dit, times)).at(i), *rest)
        vec = vector(dit, jnp.full(2, jnp.asarray(times)[i]))
        return known, dit.velocity(x["target"], x["target_grid"], vec, *rest)

    found = [both(state, i) for i in range(3)]
    for known, anew in found:
        assert relative_error(known, anew) < 1e-6
    assert relative_error(found[0][0], found[1][0]) > 1e-3


def test_query_and_key_norms_have_an_epsilon_of_1e_6():
    """Seen on values as small as its root; FLUX.1's norms of q and k have it so (a LayerNorm's default is 1e-5)."""
    norm, rng = QKNorm(CONFIG.head_width, param_dtype=jnp.float32), np.random.default_rng(0)
    x = 1e-3 * rng.standard_normal((1, 5, 3, CONFIG.head_width))
    sides = (norm.query_norm, norm.key_norm)
    scales = [rng.uniform(0.5, 2, CONFIG.head_width) for _ in sides]
    for side, scale in zip(sides, scales):
        side.scale.set_value(jnp.asarray(scale, jnp.float32))
    for ours, scale in zip(norm(*[jnp.asarray(x, jnp.float32)] * 3), scales):
        assert relative_error(ours, x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6) * scale) < 1e-5


def test_bfloat16_follows_float32():
    x = inputs()
    exact, rounded = run(random_dit(), x), run(random_dit(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16), x)
    assert rounded.dtype == jnp.bfloat16
    assert relative_error(rounded.astype(jnp.float32), exact) < 2e-2


@pytest.fixture(scope="module")
def dit():
    return random_dit()


@pytest.fixture(scope="module")
def velocity(dit):
    """`DiT.velocity` as one function of arrays, compiled once a shape."""
    graph, state = nnx.split(dit)

    @jax.jit
    def run(target, t, context, context_mask, references):
        dit = nnx.merge(graph, state)
        vec = dit.embed_timestep(t, jnp.full(t.shape, 2.5))
        return dit.velocity(target, (4, 6), vec, context, context_mask, references)

    return run


def padded_references(tokens, grids, extra):
    """The row of tokens that training and sampling use, with large numbers as padding."""
    row = np.concatenate([*tokens, np.full((2, extra, 64), 1e4, np.float32)], axis=1)
    positions = np.zeros((2, row.shape[1], 2), np.int32)
    positions[:, : row.shape[1] - extra] = reference_positions((4, 6), grids)
    mask = np.arange(row.shape[1])[None].repeat(2, axis=0) < row.shape[1] - extra
    return References(row, mask, positions)


def test_a_padded_row_of_references_equals_the_call_with_references(dit, velocity):
    x = inputs()
    grids = [grid for _, grid in x["references"]]
    plain = run(dit, {**x, "guidance": np.full(2, 2.5, np.float32), "pooled": None})
    row = padded_references([tokens for tokens, _ in x["references"]], grids, extra=5)
    padded = velocity(x["target"], x["t"], x["context"], np.ones((2, 5), bool), row)
    assert relative_error(padded, plain) < 1e-5


def test_masked_conditions_equal_conditions_left_out(velocity):
    """A sample's masked tokens have no influence, though its neighbour in the batch keeps them."""
    x = inputs()
    row = padded_references([tokens for tokens, _ in x["references"]], [grid for _, grid in x["references"]], extra=5)
    # The first sample keeps three of its five context tokens; of what the second drops large numbers are left.
    context, tokens = x["context"].copy(), row.tokens.copy()
    context[0, 3:], context[1], tokens[1] = 1e4, -1e4, 1e4
    kept = np.array([[True] * 3 + [False] * 2, [False] * 5])
    mask = row.mask & np.array([[True], [False]])
    dropped = velocity(x["target"], x["t"], context, kept, row._replace(tokens=tokens, mask=mask))
    short = velocity(x["target"], x["t"], x["context"][:, :3], np.ones((2, 3), bool), row)
    nothing = velocity(x["target"], x["t"], x["context"][:, :0], None, None)  # a context of length 0
    assert relative_error(dropped[0], short[0]) < 1e-5
    assert relative_error(dropped[1], nothing[1]) < 1e-5
    assert relative_error(short[1], nothing[1]) > 1e-2  # the conditions did matter


def test_batches_are_independent(velocity):
    x = inputs()
    both = velocity(x["target"], x["t"], x["context"][:, :0], None, None)
    order = [1, 0]
    swapped = velocity(x["target"][order], x["t"][order], x["context"][order, :0], None, None)
    np.testing.assert_allclose(swapped, both[jnp.array(order)], rtol=1e-5, atol=1e-6)


def test_no_pooled_vector_means_zeros_through_the_embedder(dit):
    t, guidance = np.array([0.3], np.float32), np.array([2.0], np.float32)
    zeros = dit.embed_timestep(t, guidance, np.zeros((1, CONFIG.pooled_width), np.float32))
    np.testing.assert_array_equal(dit.embed_timestep(t, guidance), zeros)
    skipped = dit.embed_timestep(t, guidance) - dit.vector_in(jnp.zeros((1, CONFIG.pooled_width)))
    assert float(jnp.abs(zeros - skipped).max()) > 1e-2  # the embedder's biases count


def test_a_missing_and_an_extra_guidance_value_are_refused(dit):
    t, value = np.array([0.3], np.float32), np.array([2.0], np.float32)
    with pytest.raises(ValueError, match="pass guidance"):
        dit.embed_timestep(t)
    with pytest.raises(ValueError, match="leave guidance out"):
        random_dit(SCHNELL).embed_timestep(t, value)


def test_impossible_rotary_axes_are_refused():
    with pytest.raises(ValueError, match="must sum to"):
        DiTConfig(rope_axes=(16, 56, 58))
    with pytest.raises(ValueError, match="even"):
        DiTConfig(rope_axes=(15, 57, 56))
