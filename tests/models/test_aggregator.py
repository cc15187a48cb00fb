"""The aggregator against diffusers' Krea2TextFusion, and what padding, order and layers may change."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parity import randomise, relative_error

from squeeze_jax.batch import HiddenStates
from squeeze_jax.models.aggregator import KINDS, Aggregator, AggregatorConfig

LAYERS, WIDTH, OUT = 4, 12, 10
CONFIG = AggregatorConfig(
    layers=tuple(range(LAYERS)), width=WIDTH, out_width=OUT, heads=3, mlp_width=20, layer_blocks=1, refiner_blocks=1
)
# Two samples: 4 text and 3 image tokens in order t i i i t t t, and 3 text and 2 image tokens in order t t i i t.
TEXT_MASK, IMAGE_MASK = np.array([[1, 1, 1, 1], [1, 1, 1, 0]], bool), np.array([[1, 1, 1], [1, 1, 0]], bool)
TEXT_POSITIONS = np.array([[0, 4, 5, 6], [0, 1, 4, 0]], np.int32)
IMAGE_POSITIONS = np.array([[1, 2, 3], [2, 3, 0]], np.int32)


def states(seed=0, layers=LAYERS) -> HiddenStates:
    rng = np.random.default_rng(seed)
    text, image = (rng.standard_normal((2, layers, n, WIDTH)).astype(np.float32) for n in (4, 3))
    return HiddenStates(text, TEXT_MASK, TEXT_POSITIONS, image, IMAGE_MASK, IMAGE_POSITIONS)


def in_order(text, image):
    """Both samples' tokens in sequence order, valid ones first: [text | image] indices by hand."""
    both = np.concatenate([text, image], axis=-2)
    first, second = [0, 4, 5, 6, 1, 2, 3], [0, 1, 4, 5, 2, 3, 6]
    return np.stack([both[0][..., first, :], both[1][..., second, :]])


ORDERED_MASK = np.array([[1] * 7, [1] * 5 + [0] * 2], bool)


def random_aggregator(config=CONFIG, seed=0, **kwargs) -> Aggregator:
    aggregator = nnx.eval_shape(lambda: Aggregator(config, rngs=nnx.Rngs(0), **kwargs))
    rng = np.random.default_rng(seed)
    for path, leaf in nnx.to_flat_state(nnx.state(aggregator, nnx.Param)):
        noise = rng.standard_normal(leaf.shape)
        leaf.set_value(jnp.asarray(noise * (leaf.shape[-2] ** -0.5 if path[-1] == "kernel" else 0.3), leaf.dtype))
        nnx.update(aggregator, nnx.from_flat_state([(path, leaf)]))
    return aggregator


def compiled(aggregator):
    graph, state = nnx.split(aggregator)
    function = jax.jit(lambda states: nnx.merge(graph, state)(states))
    return lambda states: jax.tree.map(np.asarray, function(states))


@pytest.fixture(scope="module")
def dla():
    return compiled(random_aggregator())


def copy_block(theirs, ours, i):
    """A Krea 2 block into layer i of a stack: its q, k and v are one projection here."""

    def set_row(leaf, value):
        leaf.set_value(leaf[...].at[i].set(jnp.asarray(value)))

    weight = {name: value.detach().numpy() for name, value in theirs.named_parameters()}
    set_row(ours.to_qkv.kernel, np.concatenate([weight[f"attn.to_{n}.weight"] for n in "qkv"]).T)
    set_row(ours.to_gate.kernel, weight["attn.to_gate.weight"].T)
    set_row(ours.to_out.kernel, weight["attn.to_out.0.weight"].T)
    for name in ("gate", "up", "down"):
        set_row(getattr(ours, f"ff_{name}").kernel, weight[f"ff.{name}.weight"].T)
    for name, path in (("norm1", "norm1"), ("norm2", "norm2"), ("norm_q", "attn.norm_q"), ("norm_k", "attn.norm_k")):
        set_row(getattr(ours, name).scale, weight[f"{path}.weight"])


@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_one_lap_and_refiner_equal_krea2(eps):
    """One pool for all tokens is exactly Krea 2's text fusion over the sequence; then comes our output projection."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: parity tests are skipped")
    krea = pytest.importorskip("diffusers.models.transformers.transformer_krea2")
    theirs = krea.Krea2TextFusion(
        num_text_layers=LAYERS, dim=WIDTH, num_heads=3, num_kv_heads=3, intermediate_size=20,
        num_layerwise_blocks=2, num_refiner_blocks=2, eps=eps,
    )  # fmt: skip
    randomise(theirs)
    with torch.no_grad():  # zero-centred scales
        for name, parameter in theirs.named_parameters():
            if "norm" in name:
                parameter.sub_(1.0)
    config = dataclasses.replace(CONFIG, kind="lap", layer_blocks=2, refiner_blocks=2, norm_eps=eps)
    ours = random_aggregator(config)
    for i in range(2):
        copy_block(theirs.layerwise_blocks[i], ours.pools["shared"].layer_blocks, i)
        copy_block(theirs.refiner_blocks[i], ours.refiner_blocks, i)
    ours.pools["shared"].projector.set_value(jnp.asarray(theirs.projector.weight.detach().numpy()[0]))
    x = states()
    sequence = in_order(x.text, x.image).transpose(0, 2, 1, 3)  # [B, L, M, C] there
    with torch.no_grad():
        mask = torch.from_numpy(ORDERED_MASK)[:, None, None, :]
        fused = theirs(torch.from_numpy(sequence), attention_mask=mask).numpy()
    expected = fused @ np.asarray(ours.out.kernel[...]) + np.asarray(ours.out.bias[...])
    context = compiled(ours)(x)
    np.testing.assert_array_equal(context.mask, ORDERED_MASK)
    assert relative_error(context.tokens[ORDERED_MASK], expected[ORDERED_MASK]) < 1e-5


def test_dla_is_a_lap_each_for_text_and_image(dla):
    """With both pools alike DLA is one LAP; with one of them changed, only its tokens change before the refiner."""
    plain = dataclasses.replace(CONFIG, refiner_blocks=0)
    ours, x = random_aggregator(plain), states()
    other = random_aggregator(dataclasses.replace(plain, kind="lap"), seed=1)
    nnx.update(ours.pools["text"], nnx.state(other.pools["shared"]))
    other.out = ours.out
    both, one = compiled(ours)(x), compiled(other)(x)
    text = np.array([[1, 0, 0, 0, 1, 1, 1], [1, 1, 0, 0, 1, 0, 0]], bool)
    image = ORDERED_MASK & ~text
    np.testing.assert_allclose(both.tokens[text], one.tokens[text], rtol=1e-5, atol=1e-6)
    assert np.abs(both.tokens[image] - one.tokens[image]).max() > 1e-2


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dla"])
def test_every_kind_gives_context_tokens_in_order(kind):
    aggregator, x = random_aggregator(dataclasses.replace(CONFIG, kind=kind, refiner_blocks=0)), states()
    context = compiled(aggregator)(x)
    assert context.tokens.shape == (2, 7, OUT)
    assert np.isfinite(context.tokens).all()
    np.testing.assert_array_equal(context.mask, ORDERED_MASK)
    if kind == "lap":
        return
    text, image = x.text[:, -1], x.image[:, -1]
    if kind == "last_layer_vit":
        weight = 1 / (1 + np.exp(-float(aggregator.vision_weight[...])))
        image = image * (1 - weight) + x.image[:, 0] * weight
    expected = in_order(text, image) @ np.asarray(aggregator.out.kernel[...]) + np.asarray(aggregator.out.bias[...])
    np.testing.assert_allclose(context.tokens[ORDERED_MASK], expected[ORDERED_MASK], rtol=1e-5, atol=1e-5)


def test_padding_changes_nothing(dla):
    x = states()
    context = dla(x)
    text, image = x.text.copy(), x.image.copy()
    text[1, :, 3], image[1, :, 2] = 1e4, -1e4
    text_positions, image_positions = x.text_positions.copy(), x.image_positions.copy()
    text_positions[1, 3], image_positions[1, 2] = -5, 3
    filled = dla(x._replace(
        text=text, image=image, text_positions=text_positions, image_positions=image_positions
    ))  # fmt: skip
    np.testing.assert_array_equal(filled.mask, ORDERED_MASK)
    np.testing.assert_allclose(filled.tokens[ORDERED_MASK], context.tokens[ORDERED_MASK], rtol=1e-5, atol=1e-6)
    assert np.isfinite(filled.tokens).all()


def test_padding_equals_no_padding_and_batches_are_independent(dla):
    x = states()
    short = HiddenStates(
        x.text[1:, :, :3], TEXT_MASK[1:, :3], TEXT_POSITIONS[1:, :3],
        x.image[1:, :, :2], IMAGE_MASK[1:, :2], IMAGE_POSITIONS[1:, :2],
    )  # fmt: skip
    np.testing.assert_allclose(dla(short).tokens[0], dla(x).tokens[1, :5], rtol=1e-5, atol=1e-6)


def test_text_alone_needs_no_image_tokens(dla):
    """A prompt without references: image axes of length 0 equal image axes of padding."""
    x = states()
    none = x._replace(image=x.image[:, :, :0], image_mask=IMAGE_MASK[:, :0], image_positions=IMAGE_POSITIONS[:, :0])
    hidden = x._replace(image_mask=np.zeros_like(IMAGE_MASK))
    bare, masked = dla(none), dla(hidden)
    assert bare.tokens.shape == (2, 4, OUT)
    keep = bare.mask
    np.testing.assert_array_equal(keep, masked.mask[:, :4])
    np.testing.assert_allclose(bare.tokens[keep], masked.tokens[:, :4][keep], rtol=1e-5, atol=1e-6)


def test_the_refiner_looks_both_ways(dla):
    """The MLLM is causal; after the refiner a first token knows the last one."""
    x = states()
    text = x.text.copy()
    text[0, :, 3] += 1.0  # position 6, the last
    changed, plain = dla(x._replace(text=text)).tokens, dla(x).tokens
    assert np.abs(changed[0] - plain[0]).max(axis=-1).min() > 1e-4
    np.testing.assert_allclose(changed[1], plain[1], rtol=1e-5, atol=1e-6)


def test_a_subset_of_layers_equals_a_record_that_holds_only_those(dla):
    subset, x = (1, 3), states()
    chosen = random_aggregator(dataclasses.replace(CONFIG, layers=subset, refiner_blocks=0))
    dense = random_aggregator(dataclasses.replace(CONFIG, layers=(0, 1), refiner_blocks=0))
    nnx.update(dense, nnx.state(chosen))
    whole = compiled(chosen)(x)
    noise = np.full_like(x.text[:, 0], 1e4), np.full_like(x.image[:, 0], 1e4)
    text, image = x.text.copy(), x.image.copy()
    text[:, 0], image[:, 0] = noise  # layers outside the subset are not looked at
    np.testing.assert_array_equal(compiled(chosen)(x._replace(text=text, image=image)).tokens, whole.tokens)
    held = compiled(dense)(x._replace(text=x.text[:, list(subset)], image=x.image[:, list(subset)]))
    np.testing.assert_allclose(held.tokens, whole.tokens, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", [(1, 3), (0, 2), (2,)])
def test_a_record_that_holds_only_what_is_read_gives_the_same_context(kind, layers):
    config, x = dataclasses.replace(CONFIG, kind=kind, layers=layers, refiner_blocks=0), states()
    run = compiled(random_aggregator(config))
    held = x._replace(text=x.text[:, list(config.reads)], image=x.image[:, list(config.reads)])
    np.testing.assert_array_equal(run(held).tokens, run(x).tokens)
    assert config.reads[-1] == layers[-1]
    unread = [layer for layer in range(LAYERS) if layer not in config.reads]
    text, image = x.text.copy(), x.image.copy()
    text[:, unread] = image[:, unread] = np.nan
    np.testing.assert_array_equal(run(x._replace(text=text, image=image)).tokens, run(x).tokens)


def test_layers_that_the_record_lacks_are_named():
    aggregator = nnx.eval_shape(lambda: Aggregator(CONFIG, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="asks for layer 3, the hidden states have 2"):
        jax.eval_shape(nnx.merge(*nnx.split(aggregator)), states(layers=2))


def test_gradient_reaches_every_parameter_of_both_pools():
    aggregator, x = random_aggregator(), states()
    graph, state = nnx.split(aggregator)

    @jax.jit
    def gradient(state):
        def loss(state):
            context = nnx.merge(graph, state)(x)
            return jnp.sum(jnp.where(context.mask[..., None], jnp.sin(context.tokens), 0.0))

        return jax.grad(loss)(state)

    leaves = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(gradient(state))}
    assert {name.split(".")[1] for name in leaves if name.startswith("pools")} == {"text", "image"}
    for name, value in leaves.items():
        assert bool(jnp.all(jnp.isfinite(value))) and bool(jnp.any(value != 0)), name


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_the_parameters_it_uses(kind):
    config = dataclasses.replace(CONFIG, kind=kind)
    names = {
        ".".join(map(str, path[:2] if path[0] == "pools" else path[:1]))
        for path, _ in nnx.to_flat_state(nnx.state(nnx.eval_shape(lambda: Aggregator(config, rngs=nnx.Rngs(0)))))
    }
    own = {
        "dla": {"pools.text", "pools.image"}, "lap": {"pools.shared"}, "last_layer": set(),
        "last_layer_vit": {"vision_weight"},
    }[kind]  # fmt: skip
    assert names == own | {"refiner_blocks", "out"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"heads": 5}, "multiple of aggregator.heads 5"),
        ({"layers": ()}, "distinct, ascending"),
        ({"layers": (2, 1)}, "distinct, ascending"),
        ({"layers": (1, 1)}, "distinct, ascending"),
        ({"layers": (-1, 2)}, "not negative"),
    ],
)
def test_impossible_settings_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **values)
