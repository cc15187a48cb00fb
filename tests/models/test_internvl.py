"""InternVL against transformers' PyTorch original, and what its hidden states promise."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from squeeze_jax.interop.internvl import config_from_json, config_to_json, entries
from squeeze_jax.interop.mapping import (
    MappingError,
    export_entries,
    load_entries,
    parameters_by_path,
    to_ours,
)
from squeeze_jax.models.internvl import (
    InternVL,
    InternVLConfig,
    TextConfig,
    VisionConfig,
    split_hidden_states,
)
from squeeze_jax.models.internvl_vision import pixel_shuffle

CHECKPOINTS = Path(__file__).parents[1] / "interop" / "checkpoints"
IMAGE, PAD = 60, 7
TINY = InternVLConfig(
    vision=VisionConfig(
        image_size=16, patch_size=4, hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=40
    ),
    text=TextConfig(
        vocab_size=64,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=56,
        max_position_embeddings=128,
    ),
    image_token_id=IMAGE,
)
# A sample with two pictures and text between, one with a single picture, one of text alone.
SAMPLES = [
    [1, 2, *[IMAGE] * 4, 3, 4, 5, *[IMAGE] * 4, 6, 8, 9],
    [1, *[IMAGE] * 4, 11, 12],
    [13, 14, 15, 16, 17],
]


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def padded(side: str, length: int = 20, pad: int = PAD) -> tuple[np.ndarray, np.ndarray]:
    ids, mask = np.full((len(SAMPLES), length), pad, np.int32), np.zeros((len(SAMPLES), length), bool)
    for row, sample in enumerate(SAMPLES):
        where = slice(0, len(sample)) if side == "right" else slice(length - len(sample), length)
        ids[row, where], mask[row, where] = sample, True
    return ids, mask


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(3, 16, 16, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def model() -> InternVL:
    """Random weights, with norms, biases and layer scales that matter."""
    model = InternVL(TINY, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    for path, leaf in parameters_by_path(model).items():
        if leaf[...].ndim <= 2 and path != "embedding":
            leaf.set_value(leaf[...] + jnp.asarray(rng.normal(size=leaf.shape, scale=0.3), jnp.float32))
        elif path == "embedding":
            leaf.set_value(leaf[...] * 50)
    return model


@pytest.fixture(scope="module")
def forward(model):
    return nnx.jit(lambda model, *inputs: model(*inputs))


@pytest.fixture(scope="module", params=["untied", "tied"])
def original(request, model):
    """The PyTorch model with `model`'s weights, written and read through the `-hf` names on disk."""
    torch = pytest.importorskip("torch", reason="parity needs PyTorch")
    pytest.importorskip("transformers")
    import tempfile

    from safetensors.numpy import save_file
    from transformers import InternVLForConditionalGeneration

    config = TINY
    if request.param == "tied":
        config = replace(TINY, text=replace(TINY.text, tie_word_embeddings=True))
        tied = InternVL(config, rngs=nnx.Rngs(0))
        weights = export_entries(model, [e for e in entries(TINY) if "head" not in e.path])
        load_entries(tied, entries(config), weights)
        model = tied
    with tempfile.TemporaryDirectory() as folder:
        save_file(export_entries(model, entries(config)), f"{folder}/model.safetensors", metadata={"format": "pt"})
        Path(folder, "config.json").write_text(json.dumps(config_to_json(config)))
        theirs, report = InternVLForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    return model, theirs.eval()


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_hidden_state_equals_transformers(original, forward, pictures, side):
    import torch

    model, theirs = original
    ids, mask = padded(side)
    ours = np.asarray(forward(model, ids, pictures, mask))
    with torch.no_grad():
        output = theirs(
            input_ids=torch.tensor(ids).long(),
            pixel_values=torch.tensor(pictures).permute(0, 3, 1, 2),
            attention_mask=torch.tensor(mask).long(),
            output_hidden_states=True,
        )
    assert ours.shape == (3, 4, 20, 48)
    assert len(output.hidden_states) == TINY.hidden_states
    for layer, state in enumerate(output.hidden_states):
        assert relative(ours[:, layer][mask], state.numpy()[mask]) <= 1e-5
    assert relative(np.asarray(model.logits(jnp.asarray(ours[:, -1])))[mask], output.logits.numpy()[mask]) <= 1e-5


def test_vision_equals_transformers(original, pictures):
    import torch

    model, theirs = original
    with torch.no_grad():
        expected = theirs.model.get_image_features(
            torch.tensor(pictures).permute(0, 3, 1, 2),
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
        ).pooler_output
    assert relative(np.asarray(model.vision(pictures)), expected.numpy()) <= 1e-5


def test_bfloat16_stays_near_transformers(original, forward, pictures):
    import torch

    model, theirs = original
    weights = export_entries(model, entries(model.config))
    half = InternVL(model.config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    load_entries(half, entries(model.config), weights)
    ids, mask = padded("right")
    ours = forward(half, ids, pictures, mask)
    assert ours.dtype == jnp.bfloat16
    with torch.no_grad():
        output = theirs(
            input_ids=torch.tensor(ids).long(),
            pixel_values=torch.tensor(pictures).permute(0, 3, 1, 2),
            attention_mask=torch.tensor(mask).long(),
            output_hidden_states=True,
        )
    for layer, state in enumerate(output.hidden_states):
        assert relative(np.asarray(ours[:, layer], np.float32)[mask], state.float().numpy()[mask]) <= 2e-2


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", [PAD, 0, IMAGE])
def test_valid_tokens_equal_the_prompt_alone(model, forward, pictures, side, pad):
    ids, mask = padded(side, pad=pad)
    together = np.asarray(forward(model, ids, pictures, mask))
    assert np.isfinite(together).all()
    own = [pictures[:2], pictures[2:], None]
    for row, sample in enumerate(SAMPLES):
        alone = np.asarray(forward(model, np.asarray([sample]), own[row]))
        assert relative(together[row][:, mask[row]], alone[0]) <= 1e-5


def test_a_later_token_changes_nothing_earlier(model, forward, pictures):
    ids, mask = padded("right")
    changed = ids.copy()
    changed[0, 15] = 33
    before, after = (np.asarray(forward(model, x, pictures, mask)) for x in (ids, changed))
    np.testing.assert_array_equal(before[0, :, :15], after[0, :, :15])
    assert (before[0, :, 15] != after[0, :, 15]).any()


def test_swapping_pictures_swaps_their_spans(model, forward, pictures):
    ids, mask = padded("right")
    before = np.asarray(forward(model, ids, pictures, mask))[0, 0]
    after = np.asarray(forward(model, ids, pictures[[1, 0, 2]], mask))[0, 0]
    np.testing.assert_array_equal(before[2:6], after[9:13])
    np.testing.assert_array_equal(before[9:13], after[2:6])
    text = [0, 1, 6, 7, 8, *range(13, 20)]
    np.testing.assert_array_equal(before[text], after[text])


def test_spare_pictures_do_nothing_and_missing_ones_are_loud(model, forward, pictures):
    ids, mask = padded("right")
    spare = np.concatenate([pictures, np.ones((1, 16, 16, 3), np.float32)])
    np.testing.assert_allclose(
        forward(model, ids, spare, mask), forward(model, ids, pictures, mask), rtol=1e-5, atol=1e-5
    )
    missing = forward(model, ids, pictures[:2], mask)
    assert np.isnan(missing[1, 0, 1:5]).all()


def test_bf16_gradients_are_finite_where_padding_attends_to_nothing(pictures):
    half = InternVL(TINY, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    ids, mask = padded("left")

    @nnx.jit
    @nnx.grad
    def gradients(model: InternVL) -> jax.Array:
        return jnp.square(model(ids, pictures, mask).astype(jnp.float32)).mean()

    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradients(half)))


def test_pixel_shuffle_joins_neighbourhoods():
    grid = jnp.arange(16.0).reshape(1, 4, 4, 1)
    expected = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    np.testing.assert_array_equal(pixel_shuffle(grid)[0], expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_split_puts_text_and_image_tokens_apart(model, forward, pictures, side):
    ids, mask = padded(side)
    hidden = forward(model, ids, pictures, mask)
    ids, mask, token = jnp.asarray(ids), jnp.asarray(mask), TINY.image_token_id
    split = split_hidden_states(hidden, ids, mask, token, text_length=25, image_length=10)
    assert split.text.shape == (3, 4, 25, 48)
    assert split.image.shape == (3, 4, 10, 48)
    for row, sample in enumerate(SAMPLES):
        image = np.flatnonzero(np.asarray(sample) == IMAGE)
        text = np.flatnonzero(np.asarray(sample) != IMAGE)
        valid = np.asarray(hidden)[row][:, mask[row]]
        for part, own, own_mask, positions in (
            (text, split.text, split.text_mask, split.text_positions),
            (image, split.image, split.image_mask, split.image_positions),
        ):
            n = len(part)
            np.testing.assert_array_equal(own_mask[row], np.arange(own_mask.shape[1]) < n)
            np.testing.assert_array_equal(positions[row, :n], part)
            np.testing.assert_array_equal(own[row, :, :n], valid[:, part])
            assert not np.asarray(own[row, :, n:]).any()


def test_split_refuses_to_cut(model, forward, pictures):
    ids, mask = padded("right")
    hidden = forward(model, ids, pictures, mask)
    with pytest.raises(ValueError, match="8 image tokens, but image_length is 4"):
        split_hidden_states(hidden, ids, mask, IMAGE, text_length=20, image_length=4)


def test_the_projectors_norm_has_an_epsilon_of_1e_5(model):
    """Seen on values as small as its root (PyTorch's default; the tower's own norms have 1e-6)."""
    torch = pytest.importorskip("torch", reason="parity needs PyTorch")
    norm = model.projector.norm
    x = (3e-3 * np.random.default_rng(0).standard_normal((2, 4, norm.scale.shape[0]))).astype(np.float32)
    scale, bias = (torch.tensor(np.asarray(leaf[...])) for leaf in (norm.scale, norm.bias))
    wanted = torch.nn.functional.layer_norm(torch.from_numpy(x), scale.shape, scale, bias, eps=1e-5)
    assert relative(np.asarray(norm(jnp.asarray(x))), wanted.numpy()) < 1e-5


@pytest.mark.parametrize("tied", [False, True])
def test_whether_embeddings_are_tied_is_the_whole_models_to_say(tied, tmp_path):
    transformers = pytest.importorskip("transformers")
    values = config_to_json(TINY) | {"tie_word_embeddings": tied}
    config = transformers.InternVLConfig.from_dict({k: v for k, v in values.items() if k != "architectures"})
    config.save_pretrained(tmp_path)
    read = config_from_json(json.loads((tmp_path / "config.json").read_text()))
    assert read.text.tie_word_embeddings is tied
    assert config_from_json(config_to_json(read)) == read


def test_published_config_is_the_default_and_round_trips():
    published = config_from_json(json.loads((CHECKPOINTS / "internvl3_8b.config.json").read_text()))
    assert published == InternVLConfig()
    assert published.image_tokens == 256
    assert published.hidden_states == 29
    assert config_from_json(config_to_json(TINY)) == TINY


def test_what_is_not_computed_is_refused():
    values = config_to_json(TINY)
    values["vision_config"]["use_qk_norm"] = True
    with pytest.raises(ValueError, match="use_qk_norm is True"):
        config_from_json(values)


def test_every_published_tensor_is_one_parameter():
    with (CHECKPOINTS / "internvl3_8b.params.tsv").open() as file:
        published = {name: tuple(map(int, shape.split("x"))) for name, shape in csv.reader(file, delimiter="\t")}
    config = InternVLConfig()
    model = nnx.eval_shape(lambda: InternVL(config, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    parameters, table = parameters_by_path(model), entries(config)
    names = [name for entry in table for name in entry.sources]
    assert sorted(names) == sorted(published)
    assert len({(entry.path, entry.layer) for entry in table}) == len(table)
    covered = {}
    for entry in table:
        shape = parameters[entry.path].shape
        wanted = shape if entry.layer is None else shape[1:]
        (source,) = entry.sources
        stand_in = np.broadcast_to(np.zeros((), np.int8), published[source])
        assert to_ours([stand_in], entry.layout).shape == wanted, entry
        covered.setdefault(entry.path, set()).add(entry.layer)
    assert set(covered) == set(parameters)
    for path, layers in covered.items():
        assert layers in ({None}, set(range(parameters[path].shape[0])))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_import_then_export_keeps_every_bit(dtype):
    first = InternVL(TINY, param_dtype=dtype, rngs=nnx.Rngs(3))
    weights = export_entries(first, entries(TINY))
    second = InternVL(TINY, param_dtype=dtype, rngs=nnx.Rngs(4))
    load_entries(second, entries(TINY), weights)
    again = export_entries(second, entries(TINY))
    assert weights.keys() == again.keys()
    for name, value in weights.items():
        assert value.dtype == again[name].dtype == dtype
        assert value.tobytes() == again[name].tobytes()


def test_a_missing_tensor_is_named():
    model = InternVL(TINY, rngs=nnx.Rngs(3))
    weights = export_entries(model, entries(TINY))
    del weights["vision_tower.encoder.layer.1.lambda_1"]
    with pytest.raises(MappingError, match=r"missing: vision_tower\.encoder\.layer\.1\.lambda_1"):
        load_entries(model, entries(TINY), weights)


def test_too_long_an_input_is_refused(model):
    with pytest.raises(ValueError, match="200 tokens, but positions end at 128"):
        model(jnp.zeros((1, 200), jnp.int32))
