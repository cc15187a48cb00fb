"""The autoencoder against diffusers' AutoencoderKL, and its table against FLUX.1's real tensor list."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from squeeze_jax.interop.autoencoder import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    config_from_json,
    config_to_json,
    entries,
    save_autoencoder,
)
from squeeze_jax.interop.mapping import export_entries, load_entries, parameters_by_path
from squeeze_jax.models import autoencoder as model
from squeeze_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from squeeze_jax.models.tiled_decoding import decode_tiles

CHECKPOINTS = Path(__file__).parents[1] / "interop" / "checkpoints"
SMALL = AutoencoderConfig(
    latent_channels=4, block_out_channels=(8, 8, 16, 24), norm_groups=4, scaling_factor=0.7, shift_factor=0.3
)


def small(config: AutoencoderConfig = SMALL, **how) -> Autoencoder:
    """A module in which every parameter matters: random norms, biases and second convolutions."""
    module = nnx.eval_shape(lambda: Autoencoder(config, rngs=nnx.Rngs(0), **how))
    rng = np.random.default_rng(1)
    for path, leaf in parameters_by_path(module).items():
        value = rng.normal(size=leaf.shape) * (np.prod(leaf.shape[:-1]) ** -0.5 if len(leaf.shape) > 1 else 0.3)
        leaf.set_value(jnp.asarray(value + path.endswith("scale"), leaf.dtype))
    return module


encode = nnx.jit(lambda module, images: module.encode(images))
decode = nnx.jit(lambda module, latents: module.decode(latents))
posterior = nnx.jit(lambda module, images: module.posterior(images))


def pictures(batch: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(2).uniform(-1, 1, (batch, height, width, 3)).astype(np.float32)


def relative(ours, theirs) -> float:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@pytest.fixture(scope="module")
def theirs():
    """diffusers' model with the tensors of `small()`, loaded strictly."""
    torch = pytest.importorskip("torch", reason="parity with diffusers needs the `parity` extra")
    diffusers = pytest.importorskip("diffusers", reason="parity with diffusers needs the `parity` extra")
    settings = {name: value for name, value in config_to_json(SMALL).items() if name != "_class_name"}
    reference = diffusers.AutoencoderKL(**settings).eval()
    tensors = export_entries(small(), entries(SMALL))
    reference.load_state_dict({name: torch.tensor(tensor) for name, tensor in tensors.items()}, strict=True)
    return reference


def to_torch(array):
    import torch

    return torch.from_numpy(np.asarray(array).transpose(0, 3, 1, 2).copy())


@pytest.mark.parametrize("size", [(72, 40), (16, 16)])
def test_encode_equals_diffusers(theirs, size):
    import torch

    images = pictures(2, *size)
    with torch.no_grad():
        wanted = theirs.encode(to_torch(images)).latent_dist
    mean, log_variance = posterior(small(), images)
    # float32 round-off through 25 convolutions
    assert relative(mean, wanted.mean.permute(0, 2, 3, 1)) < 1e-5
    assert relative(log_variance, wanted.logvar.permute(0, 2, 3, 1)) < 1e-5
    scaled = (wanted.mode() - SMALL.shift_factor) * SMALL.scaling_factor
    assert relative(encode(small(), images), scaled.permute(0, 2, 3, 1)) < 1e-5


@pytest.mark.parametrize("size", [(9, 5), (2, 2)])
def test_decode_equals_diffusers(theirs, size):
    import torch

    latents = np.random.default_rng(3).normal(size=(2, *size, 4)).astype(np.float32)
    with torch.no_grad():
        images = theirs.decode(to_torch(latents) / SMALL.scaling_factor + SMALL.shift_factor).sample
    assert relative(decode(small(), latents), images.permute(0, 2, 3, 1)) < 1e-5


@pytest.mark.parametrize("size", [pytest.param((20, 13), marks=pytest.mark.slow), (8, 30), (9, 8)])
def test_tiles_equal_diffusers(theirs, size):
    import torch

    latents = np.random.default_rng(3).normal(size=(2, *size, 4)).astype(np.float32)
    theirs.enable_tiling()
    theirs.tile_latent_min_size, theirs.tile_sample_min_size = 8, 64
    try:
        with torch.no_grad():
            images = theirs.decode(to_torch(latents) / SMALL.scaling_factor + SMALL.shift_factor).sample
    finally:
        theirs.disable_tiling()
    drawn = decode_tiles(lambda part: np.asarray(decode(small(), part)), latents, tile=8)
    assert relative(drawn, images.permute(0, 2, 3, 1)) < 1e-5
    assert relative(drawn, decode(small(), latents)) > 1e-3, "norms of their own"


@pytest.mark.parametrize("size", [(4, 4), (5, 9), (16, 7)])
def test_tiles_of_a_local_decoder_have_no_seams(size):
    """Where a pixel depends on its own latent alone, tiles give what decoding all at once gives."""
    latents, sizes = np.random.default_rng(0).standard_normal((1, *size, 3)).astype(np.float32), []

    def local(part):
        sizes.append(part.shape[1:3])
        return part.repeat(2, axis=1).repeat(2, axis=2)

    np.testing.assert_allclose(decode_tiles(local, latents, tile=4), local(latents), atol=1e-6)
    assert np.max(sizes[:-1]) <= 4, "never more than a tile"


def test_sample_is_the_posterior_draw():
    module, images, key = small(), jnp.asarray(pictures(1, 16, 24)), jax.random.key(5)
    mean, log_variance = posterior(module, images)
    draw = mean + jnp.exp(log_variance / 2) * jax.random.normal(key, mean.shape)
    sample = nnx.jit(lambda module, key: module.sample(images, key))
    assert relative(sample(module, key), module.normalise(draw)) < 1e-6
    assert not np.allclose(sample(module, jax.random.key(6)), module.normalise(draw))


def test_log_variance_is_limited():
    module = small()
    module.encoder.conv_out.bias.set_value(jnp.full_like(module.encoder.conv_out.bias[...], 1e4))
    assert float(posterior(module, pictures(1, 8, 8))[1].max()) == 20.0


def test_shift_and_scale_undo_each_other():
    module = small(AutoencoderConfig(latent_channels=4, block_out_channels=(8, 8), norm_groups=4))
    raw = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 4, 4)) * 3, jnp.float32)
    assert np.allclose(module.denormalise(module.normalise(raw)), raw, atol=1e-6)
    images = jnp.asarray(pictures(1, 8, 8))
    # decode(encode(x)) is the bare decoder on the bare mean: no shift or scale is left over on either side
    assert relative(decode(module, encode(module, images)), module.decoder(posterior(module, images)[0])) < 1e-5
    other = small(AutoencoderConfig(latent_channels=4, block_out_channels=(8, 8), norm_groups=4, shift_factor=2.0))
    assert relative(encode(other, images) + 2.0 * 0.3611, encode(module, images) + 0.1159 * 0.3611) < 1e-5


def test_attention_by_rows_equals_attention_at_once(monkeypatch):
    module, images = small(), jnp.asarray(pictures(2, 40, 72))
    at_once = encode(module, images)
    monkeypatch.setattr(model, "ATTENTION_TOKENS", 1)
    assert relative(nnx.jit(lambda module: module.encode(images))(module), at_once) < 1e-6


def test_each_picture_is_on_its_own():
    module, images = small(), jnp.asarray(pictures(3, 16, 16))
    assert relative(encode(module, images)[1:2], encode(module, images[1:2])) < 1e-6


def test_bfloat16_stays_close_to_diffusers_float32_and_comes_out_as_float32(theirs):
    import torch

    images, half = pictures(1, 32, 32), small(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    raw = np.random.default_rng(3).normal(size=(1, 9, 5, 4)).astype(np.float32)
    with torch.no_grad():
        mean = theirs.encode(to_torch(images)).latent_dist.mode()
        drawn = theirs.decode(to_torch(raw) / SMALL.scaling_factor + SMALL.shift_factor).sample
    latents, decoded = encode(half, jnp.asarray(images)), decode(half, raw)
    assert latents.dtype == decoded.dtype == jnp.float32
    wanted = (mean - SMALL.shift_factor) * SMALL.scaling_factor
    assert relative(latents, wanted.permute(0, 2, 3, 1)) < 2e-2
    assert relative(decoded, drawn.permute(0, 2, 3, 1)) < 2e-2


@pytest.mark.parametrize("size", [(250, 128), (128, 130), (4, 8)])
def test_sizes_that_do_not_divide_are_refused(size):
    module = nnx.eval_shape(lambda: Autoencoder(SMALL, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=rf"{size[0]} x {size[1]}.*multiples of 8.*resize"):
        jax.eval_shape(lambda images: module.encode(images), jax.ShapeDtypeStruct((1, *size, 3), jnp.float32))


def test_impossible_configs_are_refused():
    with pytest.raises(ValueError, match="width 24 does not divide into 32 groups"):
        AutoencoderConfig(block_out_channels=(24, 64))
    with pytest.raises(ValueError, match="scaling_factor is 0"):
        AutoencoderConfig(scaling_factor=0.0)


def test_every_tensor_of_flux_has_one_parameter():
    rows = (CHECKPOINTS / "flux1_dev_vae.params.tsv").read_text().splitlines()
    shapes = {name: tuple(map(int, shape.split("x"))) for name, shape in (row.split("\t") for row in rows)}
    module = nnx.eval_shape(lambda: Autoencoder(AutoencoderConfig(), rngs=nnx.Rngs(0)))
    parameters, table = parameters_by_path(module), entries(AutoencoderConfig())
    assert len(shapes) == len(table) == 244
    assert {entry.sources[0] for entry in table} == set(shapes)
    assert sorted(entry.path for entry in table) == sorted(parameters)
    for entry in table:
        shape = shapes[entry.sources[0]]
        if entry.layout == "conv":
            shape = (shape[2], shape[3], shape[1], shape[0])
        elif entry.layout == "linear":
            shape = shape[::-1]
        assert parameters[entry.path].shape == shape, entry
    assert sum(leaf.size for leaf in parameters.values()) == 83_819_683


def test_the_file_goes_in_and_out_bit_for_bit(tmp_path):
    save_autoencoder(small(), tmp_path, sample_size=64)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    config = config_from_json(json.loads((tmp_path / CONFIG_FILE).read_text()))
    assert config == SMALL
    loaded = nnx.eval_shape(lambda: Autoencoder(config, rngs=nnx.Rngs(7)))
    load_entries(loaded, entries(config), tensors)
    again = export_entries(loaded, entries(config))
    assert again.keys() == tensors.keys()
    assert all(again[name].tobytes() == tensor.tobytes() for name, tensor in tensors.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]


def test_bfloat16_file_keeps_its_type(tmp_path):
    save_autoencoder(small(), tmp_path, dtype=jnp.bfloat16)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(jnp.bfloat16)}


def test_diffusers_reads_our_folder(theirs, tmp_path):
    import diffusers

    save_autoencoder(small(), tmp_path)
    loaded = diffusers.AutoencoderKL.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert loaded.config.shift_factor == SMALL.shift_factor
    ours = theirs.state_dict()
    assert all(bool((ours[name] == tensor).all()) for name, tensor in loaded.state_dict().items())


def test_config_of_flux():
    values = json.loads(FLUX_JSON)
    assert config_from_json(values) == AutoencoderConfig()
    assert config_to_json(AutoencoderConfig()) == values


@pytest.mark.parametrize(
    ("field", "value"),
    [("use_quant_conv", True), ("use_post_quant_conv", None), ("act_fn", "relu"), ("mid_block_add_attention", False)],
)
def test_what_the_model_does_not_do_is_refused(field, value):
    values = json.loads(FLUX_JSON)
    if value is None:
        del values[field]
    else:
        values[field] = value
    with pytest.raises(ValueError, match=field):
        config_from_json(values)


FLUX_JSON = """{"_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": [128, 256, 512, 512],
"down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D"],
"force_upcast": true, "in_channels": 3, "latent_channels": 16, "layers_per_block": 2, "mid_block_add_attention": true,
"norm_num_groups": 32, "out_channels": 3, "sample_size": 1024, "scaling_factor": 0.3611, "shift_factor": 0.1159,
"up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"],
"use_post_quant_conv": false, "use_quant_conv": false}"""
