"""Pictures of several sizes on one canvas have the latents that each has alone, and few programs
are compiled for many sizes."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from small_internvl import randomly

from squeeze_jax.data.feature_extractor import FeatureExtractor
from squeeze_jax.data.references import CANVAS, canvas_side, encode_pictures, encode_references
from squeeze_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from squeeze_jax.models.flux2_autoencoder import Flux2Autoencoder, Flux2AutoencoderConfig

SMALL = {"block_out_channels": (8, 16, 16, 24), "norm_groups": 4}
KINDS = {
    "flux1": (Autoencoder, AutoencoderConfig(**SMALL)),
    "flux2": (Flux2Autoencoder, Flux2AutoencoderConfig(latent_channels=8, **SMALL)),
}
SIZES = [(48, 80), (64, 16), (16, 128), (64, 128)]


@pytest.fixture(params=KINDS)
def autoencoder(request):
    made, config = KINDS[request.param]
    module = randomly(lambda: made(config, rngs=nnx.Rngs(0)))
    if request.param == "flux2":
        variance = np.random.default_rng(1).uniform(0.3, 3.0, 32)
        module.bn.running_var.set_value(jnp.asarray(variance, jnp.float32))
    return module


def some_pictures(sizes):
    rng = np.random.default_rng(0)
    return [rng.uniform(-1, 1, (*size, 3)).astype(np.float32) for size in sizes]


def test_a_picture_on_a_canvas_has_the_latents_that_it_has_alone(autoencoder):
    """Whatever lies beside it: here noise, larger than any picture."""
    pictures = some_pictures(SIZES)
    canvas = np.random.default_rng(2).normal(0, 9, (len(SIZES), 64, 128, 3)).astype(np.float32)
    for place, picture in zip(canvas, pictures):
        place[: picture.shape[0], : picture.shape[1]] = picture
    found = autoencoder.encode_unpacked(canvas, np.array(SIZES, np.int32))
    for one, picture in zip(found, pictures):
        alone = autoencoder.encode_unpacked(picture[None])[0]
        same = one[: alone.shape[0], : alone.shape[1]]
        np.testing.assert_allclose(same, alone, rtol=1e-4, atol=2e-5 * float(jnp.abs(alone).max()))


def test_a_long_grid_attends_row_by_row_on_a_canvas_too(autoencoder, monkeypatch):
    from squeeze_jax.models import autoencoder as module

    pictures = some_pictures(SIZES[:1])
    canvas = np.zeros((1, 64, 128, 3), np.float32)
    canvas[0, :48, :80] = pictures[0]
    sizes = np.array(SIZES[:1], np.int32)
    wanted = autoencoder.encode(canvas, sizes)
    monkeypatch.setattr(module, "ATTENTION_TOKENS", 16)
    np.testing.assert_allclose(autoencoder.encode(canvas, sizes), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.telling
@pytest.mark.slow
def test_many_sizes_take_few_programs_and_keep_their_order(autoencoder):
    encoder = FeatureExtractor(lambda: None, autoencoder, {})
    asked = []

    class Watched:
        def latents(self, images, canvas=None):
            asked.append((canvas, len(images)))
            return encoder.latents(images, canvas)

    rng = np.random.default_rng(3)
    pictures = some_pictures(16 * rng.integers(1, 9, (40, 2)))
    found = encode_pictures(Watched(), pictures, 8, on_canvases=True)
    # Sides of 64 and 128 pixels; 1, 2, 4 or 8 pictures.
    assert len({canvas for canvas, _ in asked}) == 4
    assert len(set(asked)) <= 16
    assert sum(count for _, count in asked) == 40
    for i in (0, 7, 23, 39):
        (alone,) = encoder.latents([pictures[i]])
        assert found[i].shape == alone.shape
        scale = float(np.abs(alone).max())
        np.testing.assert_allclose(found[i], alone, rtol=1e-4, atol=2e-5 * scale)


def test_a_picture_that_fills_its_canvas_is_encoded_as_it_was(autoencoder):
    (picture,) = some_pictures([(64, 128)])
    (wanted,) = autoencoder.encode_unpacked(picture[None])
    encoder = FeatureExtractor(lambda: None, autoencoder, {})
    image = Image.fromarray(np.uint8(np.rint((picture + 1) * 127.5)))
    (found,) = encoder.latents([picture], (64, 128))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    ((reference,),) = encode_references(encoder, [[image]], 128)
    assert reference.shape == found.shape


def test_a_canvas_holds_its_pictures():
    for side in range(16, 1025, 16):
        assert side <= canvas_side(side) < side + CANVAS
    assert {canvas_side(side) for side in range(16, 513, 16)} == {64, 128, 256, 384, 512}
