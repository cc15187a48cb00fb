"""What `inspect` shows of an aggregator: attention as PyTorch computes it, weights as they are."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from fake_encoders import LAYERS, WIDTH, FakeEncoders, some_examples
from flax import nnx
from PIL import Image
from small_run import random_weights
from tiny import tiny_config

from squeeze_jax.checkpoints.manager import write_weights
from squeeze_jax.commands import inspect
from squeeze_jax.data.record_writer import extract
from squeeze_jax.evaluation.layer_use import inspect_checkpoint, measure_pool
from squeeze_jax.models.aggregator import AggregatorConfig, LayerPool

SIZES = {"width": WIDTH, "out_width": 24, "heads": 2, "mlp_width": 24, "refiner_blocks": 1}


class Various(FakeEncoders):
    """Every token and layer points another way; FakeEncoders' channels are all equal."""

    def _encode(self, prompt, pictures):
        encoded, rng = super()._encode(prompt, pictures), np.random.default_rng(len(prompt))

        def vary(states):
            return (states + 20 * rng.standard_normal(states.shape)).astype(states.dtype)

        return encoded._replace(text=vary(encoded.text), image=vary(encoded.image))


@pytest.fixture
def features(tmp_path):
    """Held-out records; the first has no reference and so no image tokens."""
    options = {"target_size": (32, 32), "reference_long_side": 32}
    extract(some_examples(5), Various(), tmp_path / "features" / "held_out", **options)
    return tmp_path / "features"


def write_run(folder, **aggregator):
    layers = {"layers": tuple(range(LAYERS))} | SIZES | aggregator
    config = tiny_config(aggregator=AggregatorConfig(**layers))
    write_weights(folder, *random_weights(config), jnp.float32)
    return folder


def rms(x, scale):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * (1 + torch.tensor(scale))


def test_attention_over_layers_is_what_pytorch_computes():
    """The first of two blocks, from the weights; and every row of both sums to 1 for each token."""
    config = AggregatorConfig(layers=(0, 1, 2), layer_blocks=2, **SIZES)
    pool, rng = (
        LayerPool(config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0)),
        np.random.default_rng(0),
    )
    for _, leaf in nnx.to_flat_state(nnx.state(pool, nnx.Param)):
        leaf.set_value(jnp.asarray(rng.standard_normal(leaf.shape) * 0.5, jnp.float32))
    states = rng.standard_normal((2, LAYERS, 5, WIDTH)).astype(np.float32)
    valid = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool)
    states[0, :, 3:] = 1e3
    attention, norms = measure_pool(pool, jnp.asarray(states), jnp.asarray(valid))
    block = jax.tree.map(
        lambda x: np.asarray(x[0]), nnx.to_pure_dict(nnx.state(pool.layer_blocks, nnx.Param))
    )
    tokens = torch.tensor(states.transpose(0, 2, 1, 3)[valid])  # the 8 valid tokens alone
    y = rms(tokens, block["norm1"]["scale"])
    q, k, _ = (
        (y @ torch.tensor(block["to_qkv"]["kernel"])).unflatten(-1, (3, 2, WIDTH // 2)).unbind(2)
    )
    q, k = rms(q, block["norm_q"]["scale"]), rms(k, block["norm_k"]["scale"])
    scores = torch.einsum("tqhd,tkhd->thqk", q, k) / (WIDTH // 2) ** 0.5
    np.testing.assert_allclose(attention[0], scores.softmax(-1).mean(1).sum(0), rtol=2e-5)
    np.testing.assert_allclose(attention.sum(-1), np.full((2, LAYERS), 8.0), rtol=1e-5)
    assert not np.allclose(attention[0], attention[1], rtol=1e-2)
    mixed = pool(jnp.asarray(states))  # the norms are of what the weights mix
    assert float(jnp.max(jnp.linalg.norm(mixed[1], axis=-1))) <= float(
        jnp.abs(pool.projector[...]) @ norms
    )


def test_weights_and_shares_of_each_modality(tmp_path, features):
    run = write_run(tmp_path / "run", layers=(0, 2))
    found = inspect_checkpoint(run, features)
    assert (found.kind, found.layers, found.examples) == ("dla", [0, 2], 5)
    _, leaves = random_weights(tiny_config(aggregator=AggregatorConfig(layers=(0, 2), **SIZES)))
    for name, use in found.use.items():
        np.testing.assert_allclose(
            use.weights, leaves[f"aggregator.pools.{name}.projector"], rtol=1e-6
        )
        assert sum(use.shares) == pytest.approx(1)
        np.testing.assert_allclose(np.sum(use.attention, -1), np.ones((1, 2)), rtol=1e-5)
    assert found.use["text"].attention != found.use["image"].attention


def test_one_pool_for_all_tokens_is_measured_on_each_kind(tmp_path, features):
    found = inspect_checkpoint(write_run(tmp_path / "run", kind="lap"), features)
    text, image = found.use["text"], found.use["image"]
    assert text.weights == image.weights
    assert text.attention != image.attention


@pytest.mark.parametrize(
    ("blocks", "kind"), [(0, "dla"), (2, "dla"), (1, "last_layer"), (1, "last_layer_vit")]
)
def test_the_command_writes_a_picture_and_the_numbers(tmp_path, features, capsys, blocks, kind):
    pytest.importorskip("matplotlib")
    run = write_run(tmp_path / "run", layer_blocks=blocks, kind=kind)
    out = tmp_path / "out"
    assert inspect.main([str(run), "--out", str(out), "--features", str(features)]) == 0
    values = json.loads((out / "layers.json").read_text())
    assert values["kind"] == kind
    assert (out / "layers.png").exists() == (kind == "dla")
    assert not list(tmp_path.rglob("*.part"))
    said = capsys.readouterr().out
    if kind == "dla":
        assert len(values["use"]["image"]["attention"]) == blocks
        pixels = np.asarray(Image.open(out / "layers.png").convert("L"))
        assert pixels.shape[1] > 1000
        assert 0.02 < np.mean(pixels < 250) < 0.9
        assert "text tokens: most of the pooled vector comes from layers" in said
    else:
        assert values["use"] == {}
        assert ("vision tower's share is" in said) == (kind == "last_layer_vit")


def test_a_folder_without_weights_is_refused(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert inspect.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
