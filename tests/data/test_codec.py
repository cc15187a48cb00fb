"""int8: how wrong it may be, with outliers, zeros and values that are no numbers; layer subsets, chosen and refused."""

import json

import ml_dtypes
import numpy as np
import pytest
from fake_encoders import FakeEncoders, some_examples

from squeeze_jax.data.codec import dequantise, outliers, quantise
from squeeze_jax.data.pipeline import make_dataset
from squeeze_jax.data.record_writer import extract
from squeeze_jax.data.records import METADATA_FILE, FeatureSource, read_metadata
from squeeze_jax.errors import InputError

OPTIONS = {"target_size": (64, 64), "reference_long_side": 64, "examples_per_shard": 4}


@pytest.mark.parametrize("kept", [0, 1, 3])
@pytest.mark.parametrize("spread", [0, 1, 5, 20])
def test_every_value_is_within_half_a_step_of_its_tokens_scale(kept, spread):
    rng = np.random.default_rng((kept, spread))
    states = (rng.standard_normal((20, 30, 16)) * np.exp(spread * rng.standard_normal((20, 30, 16)))).astype(np.float32)
    states[rng.random(states.shape) < 0.1] = 0.0
    parts = quantise(states, kept)
    assert np.abs(parts[""].astype(int)).max() <= 127
    error = np.abs(dequantise(parts).astype(np.float64) - states)
    largest = np.sort(np.abs(states), axis=-1)[..., -1 - kept]  # what is left when the largest are apart
    rounding = np.abs(states) * 2.0**-8 + 1e-40  # of bf16, subnormals
    assert np.all(error <= largest[..., None] / 127 / 2 * 1.001 + rounding)


def test_no_number_ever_stands_where_there_was_none():
    rng = np.random.default_rng(0)
    states = rng.choice(np.array([0.0, 1.0, -3.0, 1e5], np.float32), (4, 50, 600))
    for token in states.reshape(-1, 600)[:150]:
        places = rng.choice(600, rng.integers(1, 5), replace=False)
        token[places] = rng.choice(np.array([np.inf, -np.inf, np.nan], np.float32), len(places))
    back = dequantise(quantise(states, outliers(600))).astype(np.float32)
    bad = ~np.isfinite(states)
    assert not np.isfinite(back[bad]).any()
    few = bad.sum(axis=-1) <= outliers(600)
    assert 0 < few.sum() < few.size
    np.testing.assert_array_equal(back[few][bad[few]], states[few][bad[few]])
    assert np.isfinite(back[few][~bad[few]]).all()
    assert np.isnan(back[~few][~bad[~few]]).all()
    assert not back[few][states[few] == 0].any()


def test_zeros_and_no_tokens_at_all_survive():
    for shape in ((2, 3, 300), (2, 0, 300), (2, 3, 4)):
        zeros = np.zeros(shape, ml_dtypes.bfloat16)
        back = dequantise(quantise(zeros, outliers(shape[-1])))
        np.testing.assert_array_equal(back, zeros)


def test_channels_beside_outliers_keep_their_values():
    """As multimodal LLMs have them: a few channels, hundreds to thousands of times the others."""
    rng = np.random.default_rng(0)
    states = rng.standard_normal((2, 8, 3584)).astype(np.float32)
    large = rng.choice(3584, 6, replace=False)
    states[..., large] *= [3000, 800, 200, 100, 60, 40]

    def error(kept):
        difference = dequantise(quantise(states, kept)).astype(np.float32) - states
        rest = np.delete(difference, large, axis=-1), np.delete(states, large, axis=-1)
        return np.linalg.norm(rest[0]) / np.linalg.norm(rest[1])

    assert error(0) > 0.5, "one scale for all rounds the others away"
    assert error(outliers(3584)) < 0.01


def test_an_int8_folder_is_half_as_large_says_so_and_reads_back(tmp_path):
    examples = some_examples(9)
    extract(examples, FakeEncoders(), tmp_path / "a", **OPTIONS)
    extract(examples, FakeEncoders(), tmp_path / "b", codec="int8", **OPTIONS)
    assert json.loads((tmp_path / "b" / METADATA_FILE).read_text())["codec"] == 2
    exact, close = FeatureSource(tmp_path / "a"), FeatureSource(tmp_path / "b")
    for i in range(9):
        np.testing.assert_allclose(
            close[i].text.astype(np.float32), exact[i].text.astype(np.float32), rtol=2**-8, atol=127 / 127
        )
        np.testing.assert_array_equal(close[i].target, exact[i].target)
        np.testing.assert_array_equal(close[i].text_positions, exact[i].text_positions)
    with pytest.raises(InputError, match="codec 'int8' there and None now"):
        extract(examples, FakeEncoders(), tmp_path / "b", **OPTIONS)


@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_a_layer_is_found_by_its_number_whatever_the_records_hold(tmp_path, codec):
    extract(some_examples(9), FakeEncoders(), tmp_path / "all", codec=codec, **OPTIONS)
    extract(some_examples(9), FakeEncoders(), tmp_path / "two", codec=codec, layers=(0, 2), **OPTIONS)
    assert read_metadata(tmp_path / "all").layers == (0, 1, 2)
    assert read_metadata(tmp_path / "two").layers == (0, 2)
    for wanted in ((0, 2), (2,)):
        one = next(make_dataset(tmp_path / "all", batch=5, seed=1, layers=wanted))
        two = next(make_dataset(tmp_path / "two", batch=5, seed=1, layers=wanted))
        assert one.hidden_states.text.shape[1] == len(wanted)
        np.testing.assert_array_equal(one.hidden_states.text, two.hidden_states.text)
        np.testing.assert_array_equal(one.hidden_states.image, two.hidden_states.image)
        # The fake's hidden state of a layer is a number of the token, plus the layer.
        whole = next(make_dataset(tmp_path / "all", batch=5, seed=1)).hidden_states
        np.testing.assert_array_equal(one.hidden_states.text, whole.text[:, list(wanted)])
    with pytest.raises(InputError, match=r"two: records hold hidden states 0, 2, aggregator.layers asks for 1; extract"):
        make_dataset(tmp_path / "two", batch=5, seed=1, layers=(0, 1))


def test_a_folder_is_not_continued_with_other_layers(tmp_path):
    extract(some_examples(9), FakeEncoders(), tmp_path, layers=(0, 2), **OPTIONS)
    with pytest.raises(InputError, match=r"layers \[0, 2\] there and \[2\] now"):
        extract(some_examples(9), FakeEncoders(), tmp_path, layers=(2,), **OPTIONS)
