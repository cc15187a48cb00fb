"""How the miniature's frozen parts are trained: what a conversation weighs, what is learned, what is measured."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import log_softmax

from squeeze_jax.data.chat import IMAGE
from squeeze_jax.miniature.critters import pair_at
from squeeze_jax.miniature.train_autoencoder import (
    DEMO_AUTOENCODER,
    pictures_of,
    to_float,
    with_measured_scale,
)
from squeeze_jax.miniature.train_mllm import (
    MLLMTraining,
    Speaker,
    demo_config,
    demo_tokenizer,
    describing_loss,
    initial_mllm,
    pretrain_vision,
)
from squeeze_jax.miniature.world import CRITTERS
from squeeze_jax.models.autoencoder import Autoencoder

TRAINING = MLLMTraining(vision_steps=40, vision_batch=32, batch=4, spelled=1.0)


@pytest.fixture(scope="module")
def tokenizer():
    return demo_tokenizer()


@pytest.fixture(scope="module")
def config(tokenizer):
    return demo_config(tokenizer)


def test_only_what_is_answered_and_prompted_is_weighed(config, tokenizer):
    batch = Speaker(config, tokenizer, TRAINING).batch(3)
    assert set(np.unique(batch.weights)) == {np.float32(0), np.float32(0.2), np.float32(1)}
    assert not batch.weights[batch.input_ids == tokenizer.token_to_id(IMAGE)].any()
    assert not batch.weights[~batch.mask].any()
    for ids, weights, mask in zip(batch.input_ids, batch.weights, batch.mask):
        said = tokenizer.decode([int(i) for i, m in zip(ids, mask) if m], skip_special_tokens=True)
        answers = tokenizer.decode([int(i) for i, w in zip(ids, weights) if w == 1.0], skip_special_tokens=True)
        assert "?" in said
        assert "?" not in answers
        assert answers


def test_a_prompt_spelled_in_bytes_is_the_same_prompt(config, tokenizer):
    speaker = Speaker(config, tokenizer, TRAINING)
    for index in range(8):
        text = pair_at(0, index).prompt
        spelled = speaker.spell(text, np.random.default_rng(index))
        assert tokenizer.decode(spelled) == text
        assert len(spelled) > len(speaker.text(text))


def test_the_loss_is_the_weighted_cross_entropy_of_the_next_token(config, tokenizer):
    mllm, batch = initial_mllm(config, 1), Speaker(config, tokenizer, TRAINING).batch(0)
    loss, metrics = nnx.jit(describing_loss)(mllm, batch)
    hidden = nnx.jit(lambda mllm: mllm.logits(mllm(batch.input_ids, batch.pixel_values, batch.mask)[:, -1]))(mllm)
    logits = log_softmax(np.asarray(hidden, np.float64), axis=-1)
    total = weight = right = answers = 0.0
    for b, t in zip(*np.nonzero(batch.weights)):
        w, wanted = float(batch.weights[b, t]), batch.input_ids[b, t]
        total -= w * logits[b, t - 1, wanted]
        weight += w
        right += (logits[b, t - 1].argmax() == wanted) * (w == 1.0)
        answers += w == 1.0
    np.testing.assert_allclose(float(loss), total / weight, rtol=1e-5)
    np.testing.assert_allclose(float(metrics["right"]), right / answers, rtol=1e-6)


@pytest.mark.slow
def test_the_eyes_learn_to_name_and_the_rest_is_untouched(config):
    mllm = initial_mllm(config, 0)
    before = {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(mllm))}
    right = []
    with jax.numpy_dtype_promotion("standard"):  # Optax's schedules divide integers
        pretrain_vision(mllm, TRAINING, progress=lambda step, metrics: right.append(metrics["right"]))
    assert np.mean(right[:3]) < 0.3
    assert np.mean(right[-3:]) > 0.45, "chance is 0.19"
    for path, leaf in nnx.to_flat_state(nnx.state(mllm)):
        same = np.array_equal(leaf[...], before[path])
        assert same == (path[0] not in ("vision_tower", "projector")), path


@pytest.mark.slow
def test_measured_latents_have_mean_zero_and_deviation_one():
    pictures = next(pictures_of(CRITTERS, 0, 8))
    raw = Autoencoder(DEMO_AUTOENCODER, rngs=nnx.Rngs(0))
    measured = with_measured_scale(raw, [pictures])
    latents = np.asarray(measured.encode(to_float(jnp.asarray(pictures))), np.float64)
    np.testing.assert_allclose([latents.mean(), latents.std()], [0.0, 1.0], atol=1e-4)
    assert jax.tree.all(jax.tree.map(np.array_equal, nnx.state(raw, nnx.Param), nnx.state(measured, nnx.Param)))
    assert dataclasses.replace(measured.config, shift_factor=0.0, scaling_factor=1.0) == DEMO_AUTOENCODER
