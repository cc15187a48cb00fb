"""What is computed in float32 whatever the activations are: bfloat16 in, float64's result rounded once, bfloat16 out."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from squeeze_jax.data.chat import image_tiles, preprocess_image
from squeeze_jax.layers.modulation import modulate
from squeeze_jax.layers.norm import LayerNorm, RMSNorm, layer_norm

B, T, C = 4, 16, 192
RNG = np.random.default_rng(0)
X = (3.0 + 2.0 * RNG.standard_normal((B, T, C))).astype(ml_dtypes.bfloat16)  # a mean that bfloat16 would lose figures of
SCALE, BIAS = 1.0 + 0.3 * RNG.standard_normal(C), 0.5 * RNG.standard_normal(C)
SHIFTS, SCALES = (0.5 * RNG.standard_normal((B, 1, C)).astype(np.float32) for _ in range(2))


def normal(x, eps):
    x = np.asarray(x, np.float64)
    x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)


def rms(x, eps):
    x = np.asarray(x, np.float64)
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)


def given(module, **leaves):
    for name, value in leaves.items():
        getattr(module, name).set_value(jnp.asarray(value, jnp.float32))
    return module


CASES = {
    "layer_norm": (lambda x: layer_norm(x, 1e-6), normal(X, 1e-6)),
    "LayerNorm": (given(LayerNorm(C, eps=1e-6), scale=SCALE, bias=BIAS), normal(X, 1e-6) * SCALE + BIAS),
    "RMSNorm": (given(RMSNorm(C, eps=1e-6), scale=SCALE), rms(X, 1e-6) * SCALE),
    "RMSNorm around 1": (given(RMSNorm(C, eps=1e-5, zero_centred=True), scale=SCALE - 1.0), rms(X, 1e-5) * SCALE),
    "modulate": (lambda x: modulate(x, jnp.asarray(SHIFTS), jnp.asarray(SCALES)), (1 + SCALES) * normal(X, 1e-6) + SHIFTS),
}


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_is_rounded_once(name):
    """But for float32's own rounding, which tips the scale for one value in hundreds at most."""
    function, exact = CASES[name]
    for run in (function, nnx.jit(function)) if isinstance(function, nnx.Module) else (function, jax.jit(function)):
        out = run(jnp.asarray(X))
        assert out.dtype == jnp.bfloat16
        assert np.mean(np.asarray(out) != exact.astype(ml_dtypes.bfloat16)) < 0.004


def test_the_mllms_tiles_have_imagenets_mean_and_deviation():
    """(value / 255 − mean) / deviation of red, green and blue, by the published numbers."""
    colour = (10, 128, 250)
    image = Image.new("RGB", (40, 30), colour)
    expected = [(10 / 255 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (250 / 255 - 0.406) / 0.225]
    for tiles in (preprocess_image(image, 28)[None], image_tiles(image, 28), image_tiles(image, 28, 6)):
        assert tiles.shape[1:] == (28, 28, 3)
        np.testing.assert_allclose(tiles, np.broadcast_to(expected, tiles.shape), rtol=1e-5)
