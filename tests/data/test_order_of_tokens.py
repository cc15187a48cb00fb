"""Places of tokens in the MLLM's sequence, from the encoder through records to batches; order of references on-line."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_encoders import some_examples
from PIL import Image
from tiny import tiny_config

from squeeze_jax.batch import RawBatch
from squeeze_jax.data.feature_extractor import FeatureExtractor
from squeeze_jax.data.online import make_online
from squeeze_jax.data.pipeline import make_dataset
from squeeze_jax.data.record_writer import Example, extract
from squeeze_jax.models.internvl import InternVL, split_hidden_states
from squeeze_jax.models.online_encoders import Encoders

IMAGE, LAYERS, WIDTH = 9, 2, 4
SEQUENCES = [[1, 9, 9, 2, 3], [9, 9, 9, 4], [1, 2, 9, 3, 9, 9, 5, 6], [1, 1]]


class Reader:
    """Hidden states that say which place they are of: place p of sequence i is 100·i + p + layer/2."""

    width, layers, settings = WIDTH, LAYERS - 1, {}

    def check(self, prompt, references):
        pass

    def read(self, prompts, images):
        ids = np.zeros((len(prompts), 8), np.int32)
        valid = np.zeros(ids.shape, bool)
        for row, prompt in enumerate(prompts):
            sequence = SEQUENCES[int(prompt)]
            ids[row, : len(sequence)], valid[row, : len(sequence)] = sequence, True
        number = 100 * np.array([int(prompt) for prompt in prompts])[:, None] + np.arange(8)
        hidden = number[:, None, :, None] + np.arange(LAYERS)[:, None, None] / 2 + np.zeros(WIDTH)
        hidden = jnp.asarray(hidden, jnp.float32)
        return split_hidden_states(hidden, jnp.asarray(ids), jnp.asarray(valid), IMAGE, text_length=6, image_length=4)


def frozen():
    encoders = object.__new__(FeatureExtractor)
    encoders._reader, encoders.settings = Reader(), {"mllm": "places"}
    return encoders


def check(text, text_places, image, image_places, number):
    """Each kind's places in order, and at each place the token that the MLLM had there."""
    ids = np.array(SEQUENCES[number])
    assert text_places.tolist() == np.flatnonzero(ids != IMAGE).tolist()
    assert image_places.tolist() == np.flatnonzero(ids == IMAGE).tolist()
    for states, places in ((text, text_places), (image, image_places)):
        wanted = 100 * number + places[None, :, None] + np.arange(LAYERS)[:, None, None] / 2 + np.zeros(WIDTH)
        np.testing.assert_array_equal(np.asarray(states, np.float32), np.float32(wanted.astype(states.dtype)))


def test_an_encoded_prompt_says_where_each_token_stood():
    prompts = [str(i) for i in range(4)]
    for number, one in enumerate(frozen().hidden_states(prompts, [[]] * 4)):
        check(one.text, one.text_positions, one.image, one.image_positions, number)


def test_a_batch_of_records_says_where_each_token_stood(tmp_path):
    encoders = frozen()
    encoders.latents = lambda pictures, canvas=None: [np.zeros((4, 4, 16), np.float32) for _ in pictures]
    examples = [Example(str(i), one.references, one.target) for i, one in enumerate(some_examples(4, ((32, 32),) * 3))]
    extract(examples, encoders, tmp_path, target_size=(32, 32), reference_long_side=32)
    batch = next(make_dataset(tmp_path, batch=4, seed=0))
    states = batch.hidden_states
    for place, number in enumerate(batch.index.tolist()):
        text, image = states.text_mask[place], states.image_mask[place]
        check(
            states.text[place][:, text], states.text_positions[place][text],
            states.image[place][:, image], states.image_positions[place][image], number,
        )  # fmt: skip


# --- on-line -----------------------------------------------------------------------------------------------------------


class Listed(list):
    """Examples in memory, with what on-line reading asks of a source."""

    source, prompts_are_valid = "in memory", True

    def prompt(self, index):
        return self[index].prompt

    def references(self, index):
        return len(self[index].references)

    def name(self, index):
        return f"row {index + 1}"


def test_references_keep_their_order_on_line():
    """What the MLLM sees of them and what becomes latents, both the first one first."""
    greys = [(40, 200), (90, 10)]
    pictures = [[Image.new("RGB", (32, 32), (grey,) * 3) for grey in two] for two in greys]
    rows = Listed(Example("two", two, Image.new("RGB", (32, 32))) for two in pictures)
    raw = next(make_online(rows, tiny_config(), batch=2, seed=0))
    assert raw.tiles.shape[1] == raw.references.shape[1] == 2
    for place, number in enumerate(raw.index.tolist()):
        assert raw.tiles[place].mean(axis=(1, 2, 3)).tolist() == list(greys[number])
        assert raw.references[place].mean(axis=(1, 2, 3)).tolist() == list(greys[number])


class HeardError(Exception):
    """What the MLLM was given."""


class Ear(InternVL):
    def __init__(self):
        self.head = None

    def __call__(self, ids, tiles, valid):
        raise HeardError(tiles)


def test_tiles_on_line_have_imagenets_mean_and_deviation():
    encoders = object.__new__(Encoders)
    object.__setattr__(encoders, "mllm", Ear())
    tiles = np.broadcast_to(np.array([10, 128, 250], np.uint8), (1, 2, 4, 4, 3))
    nothing = jnp.zeros((1, 0), jnp.int32)
    picture = jnp.zeros((1, 16, 16, 3), jnp.uint8)
    one = jnp.ones(1, jnp.int32)
    raw = RawBatch(picture, picture[:, None], one, nothing, nothing > 0, jnp.asarray(tiles), one)
    with pytest.raises(HeardError) as heard:
        encoders.hidden_states(raw, (0,))
    expected = [(10 / 255 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (250 / 255 - 0.406) / 0.225]
    found = np.asarray(jax.device_get(heard.value.args[0]))
    np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), rtol=1e-5)
