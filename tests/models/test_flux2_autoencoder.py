"""FLUX.2's autoencoder against diffusers', with its pipeline's packing and normalisation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parity import relative_error

from squeeze_jax.errors import InputError
from squeeze_jax.interop.flux2_autoencoder import config_to_json, export_autoencoder
from squeeze_jax.interop.mapping import parameters_by_path
from squeeze_jax.models.flux2_autoencoder import TILE, Flux2Autoencoder, Flux2AutoencoderConfig
from squeeze_jax.models.tiled_decoding import decode_tiles

SMALL = Flux2AutoencoderConfig(latent_channels=4, block_out_channels=(8, 8, 16, 24), norm_groups=4)
SMALL_DECODER = dataclasses.replace(SMALL, decoder_block_out_channels=(4, 8, 8, 12))


def small(config: Flux2AutoencoderConfig = SMALL, **how) -> Flux2Autoencoder:
    """A module in which every parameter matters; one of the variances is as small as epsilon."""
    module = nnx.eval_shape(lambda: Flux2Autoencoder(config, rngs=nnx.Rngs(0), **how))
    rng = np.random.default_rng(1)
    for path, leaf in parameters_by_path(module).items():
        value = rng.normal(size=leaf.shape)
        value *= np.prod(leaf.shape[:-1]) ** -0.5 if len(leaf.shape) > 1 else 0.3
        if path == "bn.running_var":
            value = np.exp(value)
            value[0] = 1e-4
        leaf.set_value(jnp.asarray(value + path.endswith("scale"), leaf.dtype))
    return module


encode = nnx.jit(lambda module, images: module.encode(images))
decode = nnx.jit(lambda module, latents: module.decode(latents))


def pictures(batch: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(2).uniform(-1, 1, (batch, height, width, 3)).astype(np.float32)


def latents(batch: int, rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng(3).normal(size=(batch, rows, columns, 16)).astype(np.float32)


@pytest.fixture(scope="module", params=[SMALL, SMALL_DECODER], ids=["one width", "small decoder"])
def pair(request):
    """Ours, and diffusers' model with its tensors, loaded strictly."""
    torch = pytest.importorskip("torch", reason="parity with diffusers needs the `parity` extra")
    diffusers = pytest.importorskip("diffusers")
    module = small(request.param)
    values = {k: v for k, v in config_to_json(request.param).items() if not k.startswith("_")}
    theirs = diffusers.AutoencoderKLFlux2(**values).eval()
    tensors = export_autoencoder(module)
    theirs.load_state_dict({k: torch.tensor(v) for k, v in tensors.items()}, strict=True)
    return module, theirs


def to_torch(array):
    import torch

    return torch.from_numpy(np.asarray(array).transpose(0, 3, 1, 2).copy())


def encoded(theirs, images):
    """Pictures to latents by the pipeline's own method."""
    import torch
    from diffusers import Flux2KleinPipeline

    class Part:
        vae = theirs
        _patchify_latents = staticmethod(Flux2KleinPipeline._patchify_latents)

    with torch.no_grad():
        found = Flux2KleinPipeline._encode_vae_image(Part, to_torch(images), generator=None)
    return found.permute(0, 2, 3, 1)


def decoded(theirs, normalised):
    """Latents to pictures as the pipeline's last lines do it."""
    import torch
    from diffusers import Flux2KleinPipeline

    bn = theirs.bn
    deviation = torch.sqrt(bn.running_var.view(1, -1, 1, 1) + theirs.config.batch_norm_eps)
    packed = to_torch(normalised) * deviation + bn.running_mean.view(1, -1, 1, 1)
    with torch.no_grad():
        images = theirs.decode(Flux2KleinPipeline._unpatchify_latents(packed)).sample
    return images.permute(0, 2, 3, 1)


@pytest.mark.parametrize("size", [(80, 48), (16, 16)])
def test_encode_equals_diffusers(pair, size):
    module, theirs = pair
    images = pictures(2, *size)
    found = encode(module, images)
    assert found.shape == (2, size[0] // 16, size[1] // 16, 16)
    # float32 round-off through 26 convolutions
    assert relative_error(found, encoded(theirs, images)) < 1e-5


@pytest.mark.parametrize("size", [(5, 3), (1, 1)])
def test_decode_equals_diffusers(pair, size):
    module, theirs = pair
    assert (
        relative_error(decode(module, latents(2, *size)), decoded(theirs, latents(2, *size))) < 1e-5
    )


@pytest.mark.parametrize("size", [pytest.param((9, 6), marks=pytest.mark.slow), (4, 5)])
def test_tiles_equal_diffusers(pair, size):
    """Tiles of 4 x 4 latents, which are 8 x 8 before packing."""
    module, theirs = pair
    theirs.enable_tiling()
    theirs.tile_latent_min_size, theirs.tile_sample_min_size = 8, 64
    try:
        wanted = decoded(theirs, latents(2, *size))
    finally:
        theirs.disable_tiling()
    drawn = decode_tiles(lambda part: np.asarray(decode(module, part)), latents(2, *size), tile=4)
    assert relative_error(drawn, wanted) < 1e-5
    assert relative_error(drawn, decode(module, latents(2, *size))) > 1e-3, "norms of their own"


def test_a_picture_of_one_tile_is_decoded_at_once(pair):
    module, theirs = pair
    assert theirs.config.sample_size == TILE * 16
    once = decode_tiles(lambda part: np.asarray(decode(module, part)), latents(1, 4, 3), tile=TILE)
    np.testing.assert_array_equal(once, decode(module, latents(1, 4, 3)))


def test_tiles_of_a_local_decoder_equal_decoding_at_once():
    """Where a pixel depends on its own latent alone, tiles hide no seam."""

    def local(part):
        return part[..., :3].repeat(16, axis=1).repeat(16, axis=2)

    each = decode_tiles(local, latents(1, 9, 6), tile=4)
    np.testing.assert_allclose(each, local(latents(1, 9, 6)), atol=1e-6)


def test_normalisation_is_undone():
    module, images = small(), jnp.asarray(pictures(1, 32, 48))
    raw = nnx.jit(lambda module: module.posterior(images)[0])(module)
    assert raw.shape == (1, 4, 6, 4)
    assert relative_error(module.denormalise(module.normalise(raw)), raw) < 1e-6
    # One channel's variance is epsilon's: without epsilon it would come out 1.4 times as large.
    assert relative_error(decode(module, encode(module, images)), module.decoder(raw)) < 1e-5


def test_sample_is_the_normalised_posterior_draw():
    module, images, key = small(), jnp.asarray(pictures(1, 16, 32)), jax.random.key(5)
    mean, log_variance = module.posterior(images)
    draw = mean + jnp.exp(log_variance / 2) * jax.random.normal(key, mean.shape)
    assert relative_error(module.sample(images, key), module.normalise(draw)) < 1e-6


def test_bfloat16_stays_close_to_float32_and_comes_out_as_float32(pair):
    module, theirs = pair
    half = small(module.config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    images = pictures(1, 32, 32)
    found, drawn = encode(half, jnp.asarray(images)), decode(half, latents(1, 3, 2))
    assert found.dtype == drawn.dtype == jnp.float32
    assert relative_error(found, encoded(theirs, images)) < 3e-2
    assert relative_error(drawn, decoded(theirs, latents(1, 3, 2))) < 3e-2


@pytest.mark.parametrize("size", [(248, 128), (128, 136)])
def test_sizes_that_are_no_multiple_of_a_token_are_refused(size):
    module = nnx.eval_shape(lambda: Flux2Autoencoder(SMALL, rngs=nnx.Rngs(0)))
    images = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    with pytest.raises(ValueError, match=rf"{size[0]} x {size[1]}.*multiples of 16"):
        jax.eval_shape(lambda images: module.encode(images), images)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"decoder_block_out_channels": (64, 128)}, r"\(64, 128\) must be as many as"),
        ({"decoder_block_out_channels": (64, 100, 128, 128)}, "width 100 does not divide"),
        ({"batch_norm_eps": 0.0}, "batch_norm_eps is 0.0"),
    ],
)
def test_impossible_configs_are_refused(changes, words):
    with pytest.raises(ValueError, match=words) as stop:
        Flux2AutoencoderConfig(**changes)
    assert "divide" in words or isinstance(stop.value, InputError)
