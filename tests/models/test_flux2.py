"""FLUX.2's transformer against diffusers', and the properties that sampling relies on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parity import relative_error
from small_flux2 import (
    CONFIG,
    REFERENCES,
    arrays_of,
    compiled,
    ids_of,
    inputs,
    like_twin,
    random_flux2,
    run,
    run_twin,
    text_ids,
    torch_twin,
)

from squeeze_jax.batch import References
from squeeze_jax.diffusion.latents import timed_reference_positions
from squeeze_jax.errors import InputError
from squeeze_jax.interop.flux2 import diffusers_entries
from squeeze_jax.interop.mapping import export_entries
from squeeze_jax.layers.stack import unstack
from squeeze_jax.models.backbone import Backbone, BackboneConfig
from squeeze_jax.models.dit import BLOCK_STACKS
from squeeze_jax.models.flux2 import Flux2, Flux2Config

DEV = dataclasses.replace(CONFIG, guidance=True)
CACHED = dataclasses.replace(CONFIG, reference_attention="cached")


# --- against diffusers ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "config"),
    [
        ({"references": ()}, CONFIG),
        ({"batch": 3, "grid": (2, 5), "references": ((2, 3),), "context": 300}, CONFIG),
        ({}, DEV),
        ({"context": 0}, CONFIG),
    ],
    ids=["no reference", "one, long text", "three, with guidance", "three, no text"],
)
def test_velocity_equals_diffusers(shape, config):
    torch, twin = torch_twin(config)
    x = inputs(**shape, config=config)
    x["t"] = np.linspace(0, 1, len(x["t"])).astype(np.float32)  # both ends
    with torch.no_grad():
        theirs = run_twin(torch, twin, x)
    assert relative_error(run(like_twin(twin, config), x), theirs) < 1e-5


@pytest.mark.parametrize("products", ["cpu", "tpu"])
def test_gradients_equal_diffusers(products, monkeypatch):
    """Of the inputs, and of every weight; fused layers as one product, and as on TPU."""
    monkeypatch.setattr("squeeze_jax.layers.linear.platform", lambda: products)
    torch, twin = torch_twin()
    x = inputs()
    function, state = compiled(like_twin(twin), x["target_grid"], REFERENCES)
    weights = np.random.default_rng(5).standard_normal(x["target"].shape).astype(np.float32)
    loss = jax.jit(jax.grad(lambda s, a: jnp.sum(function(s, a) * weights), argnums=(0, 1)))
    of_state, ours = loss(state, arrays_of(x))

    leaves = {
        k: torch.tensor(v, requires_grad=True) for k, v in x.items() if isinstance(v, np.ndarray)
    }
    references = [
        (torch.tensor(tokens, requires_grad=True), grid) for tokens, grid in x["references"]
    ]
    out = run_twin(torch, twin, {**x, **leaves, "references": references})
    (out * torch.from_numpy(weights)).sum().backward()
    for name, leaf in leaves.items():
        assert relative_error(ours[name], leaf.grad) < 1e-4, name
    for mine, (theirs, grid) in zip(ours["references"], references, strict=True):
        assert relative_error(mine, theirs.grad) < 1e-4, grid
    module = random_flux2()
    nnx.update(module, of_state)
    of_weights = export_entries(module, diffusers_entries(CONFIG))
    for name, parameter in twin.named_parameters():
        assert relative_error(of_weights[name], parameter.grad) < 1e-4, name


@pytest.mark.parametrize("kept", [[0, 1, 2], [1, 4], []], ids=["the first", "in between", "none"])
def test_masked_text_equals_diffusers_without_it(kept):
    """Tokens that are kept keep their positions."""
    torch, twin = torch_twin()
    x = inputs()
    mask = np.zeros((2, 5), bool)
    mask[:, kept] = True
    ids = text_ids(torch, 5)[kept]
    with torch.no_grad():
        theirs = run_twin(torch, twin, {**x, "context": x["context"][:, kept]}, txt_ids=ids)
    context = np.where(mask[..., None], x["context"], np.float32(100))
    ours = run(like_twin(twin), {**x, "context": context, "context_mask": mask})
    assert relative_error(ours, theirs) < 1e-5


def test_cached_references_equal_diffusers_key_value_cache():
    """Their first step extracts the cache; later steps, at other times, use it."""
    torch, twin = torch_twin()
    from diffusers.models.transformers import transformer_flux2 as theirs

    for block in twin.transformer_blocks:
        block.attn.set_processor(theirs.Flux2KVAttnProcessor())
    for block in twin.single_transformer_blocks:
        block.attn.set_processor(theirs.Flux2KVParallelSelfAttnProcessor())
    x = inputs()
    target_ids, reference_ids = ids_of(torch, x["target_grid"], REFERENCES)
    target, context = torch.as_tensor(x["target"]), torch.as_tensor(x["context"])
    references = torch.cat([torch.as_tensor(tokens) for tokens, _ in x["references"]], dim=1)
    common = {"encoder_hidden_states": context, "txt_ids": text_ids(torch, 5), "guidance": None}

    ours, state = compiled(like_twin(twin, CACHED), x["target_grid"], REFERENCES)
    with torch.no_grad():
        first = twin(
            hidden_states=torch.cat([references, target], dim=1),  # their order
            img_ids=torch.cat([reference_ids, target_ids]), timestep=torch.as_tensor(x["t"]),
            kv_cache_mode="extract", num_ref_tokens=references.shape[1], **common,
        )  # fmt: skip
        assert relative_error(ours(state, arrays_of(x)), first.sample) < 1e-5
        later = {**x, "t": np.float32([0.0, 0.55])}
        second = twin(
            hidden_states=target, img_ids=target_ids, timestep=torch.as_tensor(later["t"]),
            kv_cache_mode="cached", kv_cache=first.kv_cache, **common,
        )  # fmt: skip
    assert relative_error(ours(state, arrays_of(later)), second.sample) < 1e-5
    assert (
        relative_error(run(like_twin(twin), x), first.sample) > 1e-3
    )  # joint attention is another function


# --- the protocol ---------------------------------------------------------------------------------


def test_it_is_a_backbone():
    model = nnx.eval_shape(lambda: Flux2(CONFIG, rngs=nnx.Rngs(0)))
    assert isinstance(model, Backbone)
    assert isinstance(model.config, BackboneConfig)


def packed_references(x, extra=0):
    """All references in one row, with large numbers as padding."""
    grids = [grid for _, grid in x["references"]]
    tokens = [tokens for tokens, _ in x["references"]]
    row = np.concatenate(
        [*tokens, np.full((2, extra, CONFIG.in_channels), 1e4, np.float32)], axis=1
    )
    positions = np.zeros((2, row.shape[1], 3), np.int32)
    positions[:, : row.shape[1] - extra] = timed_reference_positions(grids)
    mask = np.arange(row.shape[1])[None].repeat(2, axis=0) < row.shape[1] - extra
    return References(row, mask, positions)


@pytest.fixture(scope="module")
def model():
    return random_flux2()


@pytest.fixture(scope="module")
def velocity(model):
    """`Flux2.velocity` as one function of arrays, compiled once a shape."""
    graph, state = nnx.split(model)

    @jax.jit
    def run(target, t, context, context_mask, references, grid=None):
        model = nnx.merge(graph, state)
        grid = (4, 6) if grid is None else grid
        return model.velocity(
            target, grid, model.embed_timestep(t), context, context_mask, references
        )

    return run


def test_a_padded_row_of_references_equals_the_call_with_references(model, velocity):
    x = inputs()
    padded = velocity(
        x["target"], x["t"], x["context"], np.ones((2, 5), bool), packed_references(x, extra=5)
    )
    assert relative_error(padded, run(model, x)) < 1e-5


def test_padding_among_cached_references_changes_nothing():
    model, x = random_flux2(CACHED), inputs()
    graph, state = nnx.split(model)

    @jax.jit
    def padded(state):
        model = nnx.merge(graph, state)
        row = jax.tree.map(jnp.asarray, packed_references(x, extra=3))
        cache = model.cache_references(row, model.embed_timestep(jnp.zeros(2)))
        temb = model.embed_timestep(x["t"])
        return model.velocity(x["target"], x["target_grid"], temb, x["context"], None, cache)

    assert relative_error(padded(state), run(model, x)) < 1e-5


def test_masked_conditions_equal_conditions_left_out(velocity):
    """A sample's masked tokens have no influence, though its neighbour in the batch keeps them."""
    x = inputs()
    row = packed_references(x, extra=2)
    context, tokens = x["context"].copy(), row.tokens.copy()
    context[0, 3:], context[1], tokens[1] = 1e4, -1e4, 1e4
    kept = np.array([[True] * 3 + [False] * 2, [False] * 5])
    mask = row.mask & np.array([[True], [False]])
    dropped = velocity(x["target"], x["t"], context, kept, row._replace(tokens=tokens, mask=mask))
    short = velocity(x["target"], x["t"], x["context"][:, :3], np.ones((2, 3), bool), row)
    nothing = velocity(x["target"], x["t"], x["context"][:, :0], None, None)
    assert relative_error(dropped[0], short[0]) < 1e-5
    assert relative_error(dropped[1], nothing[1]) < 1e-5
    assert relative_error(short[1], nothing[1]) > 1e-2  # the conditions did matter


def test_one_grid_a_row_equals_batches_of_one_grid(velocity):
    x = inputs()
    rest = x["t"], x["context"], None, packed_references(x)
    mixed = velocity(x["target"], *rest, np.int32([[4, 6], [8, 3]]))
    for i, grid in enumerate(([4, 6], [8, 3])):
        alone = velocity(x["target"], *rest, np.int32([grid] * 2))
        assert relative_error(mixed[i], alone[i]) < 1e-6
    assert relative_error(mixed[1], velocity(x["target"], *rest)[1]) > 1e-3


@pytest.mark.parametrize("config", [CONFIG, DEV])
def test_modulation_made_beforehand_is_that_of_each_time(config):
    model, x = random_flux2(config), inputs(config=config)
    times = np.array([0.9, 0.5, 0.0], np.float32)
    graph, state = nnx.split(model)

    def embedded(model, times):
        value = np.full(len(times), 3.5, np.float32) if config.guidance else None
        return model.embed_timestep(times, value)

    @jax.jit
    def both(state, i):
        model = nnx.merge(graph, state)
        known = model.make_modulation(embedded(model, times)).at(i)
        temb = embedded(model, jnp.full(2, jnp.asarray(times)[i]))
        return [
            model.velocity(x["target"], x["target_grid"], each, x["context"])
            for each in (known, temb)
        ]

    found = [both(state, i) for i in range(3)]
    for known, anew in found:
        assert relative_error(known, anew) < 1e-6
    assert relative_error(found[0][0], found[1][0]) > 1e-3


@pytest.mark.parametrize("cuts", [(1,), (2,), (1, 3, 4)])
def test_ranges_of_blocks_follow_each_other(model, velocity, cuts):
    x = inputs()
    graph, state = nnx.split(model)

    @jax.jit
    def pieces(state):
        model = nnx.merge(graph, state)
        temb = model.embed_timestep(x["t"])
        streams, block_inputs = model.embed_inputs(x["target"], (4, 6), temb, x["context"])
        for start, stop in zip((0, *cuts), (*cuts, None)):
            streams = model.apply_blocks(streams, block_inputs, start, stop)
        return model.predict_velocity(streams[1][:, :24], block_inputs)

    assert (
        relative_error(pieces(state), velocity(x["target"], x["t"], x["context"], None, None))
        < 1e-6
    )


def test_rematerialisation_changes_no_gradient(model):
    x = inputs()

    def gradients(model):
        function, state = compiled(model, x["target_grid"], REFERENCES)
        return jax.jit(jax.grad(lambda state: jnp.sum(jnp.sin(function(state, arrays_of(x))))))(
            state
        )

    for one, other in zip(
        *map(jax.tree.leaves, (gradients(random_flux2(remat="save_products")), gradients(model)))
    ):
        assert relative_error(one, other) < 1e-5


def test_blocks_taken_apart_give_the_same(model):
    x = inputs()
    function, state = compiled(model, x["target_grid"], REFERENCES)
    apart = unstack(state, BLOCK_STACKS)
    assert relative_error(function(apart, arrays_of(x)), function(state, arrays_of(x))) < 1e-6


def test_bfloat16_follows_float32(model):
    x = inputs()
    rounded = run(random_flux2(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16), x)
    assert rounded.dtype == jnp.bfloat16
    assert relative_error(rounded.astype(jnp.float32), run(model, x)) < 3e-2


def test_a_missing_and_an_extra_guidance_value_are_refused(model):
    t, value = np.array([0.3], np.float32), np.array([2.0], np.float32)
    with pytest.raises(ValueError, match="leave guidance out"):
        model.embed_timestep(t, value)
    with pytest.raises(ValueError, match="pass guidance"):
        random_flux2(DEV).embed_timestep(t)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_axes": (32, 32, 32, 30)}, "sum to head_width, 128"),
        ({"rope_axes": (31, 33, 32, 32)}, "must be even"),
        ({"num_single_blocks": 0}, "single_blocks is 0; it must be at least 1"),
        ({"mlp_ratio": 0.0}, "mlp_width is 0"),
    ],
)
def test_impossible_sizes_are_refused(changes, words):
    with pytest.raises(InputError, match=words):
        Flux2Config(**changes)
