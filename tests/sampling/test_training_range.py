"""What a checkpoint was not trained for is said before it is drawn."""

import dataclasses
from pathlib import Path

import pytest

from squeeze_jax.config import load_preset
from squeeze_jax.sampling.training_range import beyond_training

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    ("preset", "references", "size", "words"),
    [
        ("demo_weights", 1, (64, 64), []),
        ("demo_weights", 0, (64, 64), []),
        ("demo_weights", 2, (64, 64), ["one reference, not with 2"]),
        ("demo_weights", 1, (64, 80), ["64 x 64 pixels, not at 64 x 80"]),
        ("demo_weights", 4, (32, 64), ["not with 4", "not at 32 x 64"]),
        ("emoji", 1, (96, 48), ["64 x 64 pixels, not at 96 x 48"]),
        ("emoji_multi_subject", 1, (96, 48), []),
        ("emoji", 2, (64, 64), ["one reference, not with 2"]),
        ("emoji_multi_subject", 2, (64, 96), []),
        ("emoji_multi_subject", 3, (64, 112), ["up to 2 references, not with 3", "48 to 96 pixels"]),
        ("flux_stage2", 4, (1024, 512), []),
    ],
)  # fmt: skip
def test_what_is_beyond_the_training_data_is_said(preset, references, size, words):
    found = beyond_training(load_preset(CONFIGS / f"{preset}.py"), references, *size)
    assert len(found) == len(words)
    assert all(word in sentence for word, sentence in zip(words, found))


def test_a_pretrained_transformer_is_not_bound_to_the_sizes_of_its_fine_tuning():
    config = load_preset(CONFIGS / "flux_stage2.py")
    assert config.lora is not None
    assert not beyond_training(config, 1, 1536, 512)
    assert beyond_training(dataclasses.replace(config, lora=None), 1, 1536, 512)
