"""FLUX.2's autoencoder in both layouts: each tensor of the published one has its place."""

import json
import math
from collections import Counter
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from squeeze_jax.errors import InputError
from squeeze_jax.interop.flux2_autoencoder import (
    BATCHES,
    config_from_json,
    config_to_json,
    entries,
    export_autoencoder,
    original_entries,
    without_batches,
)
from squeeze_jax.interop.load import AUTOENCODER_PREFIXES
from squeeze_jax.interop.mapping import (
    ArrayTensors,
    differences,
    export_entries,
    load_entries,
    parameters_by_path,
    without_prefix,
)
from squeeze_jax.models.flux2_autoencoder import Flux2Autoencoder, Flux2AutoencoderConfig

FOLDER = Path(__file__).parent / "checkpoints"
PUBLISHED = json.loads((FOLDER / "flux2_vae.config.json").read_text())
SMALL = Flux2AutoencoderConfig(
    latent_channels=4,
    block_out_channels=(8, 8, 16),
    norm_groups=4,
    decoder_block_out_channels=(4, 8, 12),
)
HALF = Flux2AutoencoderConfig(decoder_block_out_channels=(64, 128, 256, 256))


def abstract(config: Flux2AutoencoderConfig) -> Flux2Autoencoder:
    return nnx.eval_shape(lambda: Flux2Autoencoder(config, rngs=nnx.Rngs(0)))


def random_autoencoder() -> Flux2Autoencoder:
    module, rng = abstract(SMALL), np.random.default_rng(0)
    for leaf in parameters_by_path(module).values():
        leaf.set_value(jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32))
    return module


def shapes_of_flux2() -> dict[str, tuple[int, ...]]:
    lines = (FOLDER / "flux2_vae.params.tsv").read_text().splitlines()
    rows = (line.split("\t") for line in lines)
    return {name: tuple(map(int, shape.split("x"))) if shape else () for name, shape in rows}


def empty(shapes):
    """A checkpoint of such shapes that takes no memory."""
    kinds = {name: np.int64 if name == BATCHES else np.float32 for name in shapes}
    return ArrayTensors(
        {name: np.broadcast_to(kinds[name](0), shape) for name, shape in shapes.items()}
    )


def diffusers_model(config, device):
    torch = pytest.importorskip(
        "torch", reason="PyTorch is not installed: parity tests are skipped"
    )
    diffusers = pytest.importorskip("diffusers")
    with torch.device(device):
        return torch, diffusers.AutoencoderKLFlux2.from_config(config_to_json(config)).eval()


def test_every_tensor_of_flux2_has_exactly_one_place_of_its_shape():
    shapes, config = shapes_of_flux2(), config_from_json(PUBLISHED)
    assert config == Flux2AutoencoderConfig()
    module, table = abstract(config), entries(config)
    assert len(shapes) == 251
    assert Counter(e.sources[0] for e in table) + Counter([BATCHES]) == dict.fromkeys(shapes, 1)
    assert Counter(e.path for e in table) == dict.fromkeys(parameters_by_path(module), 1)
    assert differences(module, table, without_batches(empty(shapes))) == []
    count = sum(leaf.size for leaf in parameters_by_path(module).values())
    assert count == sum(map(math.prod, shapes.values())) - 1 == 84_046_115 + 2 * 128


@pytest.mark.parametrize(
    "config", [Flux2AutoencoderConfig(), HALF], ids=["published", "small decoder"]
)
def test_the_tensors_are_those_that_diffusers_makes(config):
    _, theirs = diffusers_model(config, "meta")
    shapes = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    assert differences(abstract(config), entries(config), without_batches(empty(shapes))) == []
    if config != HALF:
        assert shapes == shapes_of_flux2()


def test_diffusers_tensors_come_back_byte_for_byte():
    torch, theirs = diffusers_model(SMALL, "cpu")
    torch.manual_seed(0)
    tensors = {
        name: (torch.rand_like(t) if t.is_floating_point() else t).numpy()
        for name, t in theirs.state_dict().items()
    }
    module = abstract(SMALL)
    load_entries(module, entries(SMALL), without_batches(ArrayTensors(tensors)))
    ours = export_autoencoder(module)
    assert ours.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        assert ours[name].tobytes() == tensor.tobytes(), name


@pytest.mark.parametrize("prefix", ["", "vae."])
def test_the_single_file_gives_the_same_parameters_as_diffusers_folder(prefix):
    """Against diffusers' converter of older files, whose 1x1 convolutions stand alone."""
    torch = pytest.importorskip(
        "torch", reason="PyTorch is not installed: parity tests are skipped"
    )
    module = pytest.importorskip("diffusers.loaders.single_file_utils")
    file = export_entries(random_autoencoder(), original_entries(SMALL))
    moved = {
        name.replace("encoder.quant", "quant").replace("decoder.post", "post"): torch.tensor(tensor)
        for name, tensor in file.items()
    }
    theirs = module.convert_ldm_vae_checkpoint(moved, config_to_json(SMALL))
    theirs |= {name: moved[name] for name in moved if name.startswith("bn.")}
    from_file, from_folder = abstract(SMALL), abstract(SMALL)
    named = ArrayTensors({prefix + name: tensor for name, tensor in file.items()})
    found = without_batches(without_prefix(named, AUTOENCODER_PREFIXES))
    load_entries(from_file, original_entries(SMALL), found)
    load_entries(from_folder, entries(SMALL), {name: t.numpy() for name, t in theirs.items()})
    one, two = parameters_by_path(from_file), parameters_by_path(from_folder)
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[path][...], two[path][...]) for path in one)
    again = export_entries(from_file, original_entries(SMALL))
    assert again.keys() == file.keys()
    assert all(again[name].tobytes() == tensor.tobytes() for name, tensor in file.items())


def test_configs_go_there_and_back():
    for config in (SMALL, HALF, Flux2AutoencoderConfig(batch_norm_eps=1e-3)):
        assert config_from_json(json.loads(json.dumps(config_to_json(config)))) == config
    assert config_to_json(Flux2AutoencoderConfig()) == PUBLISHED


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_quant_conv", False),
        ("patch_size", [1, 1]),
        ("act_fn", "relu"),
        ("out_channels", 4),
        ("mid_block_add_attention", False),
        ("_class_name", "AutoencoderKL"),
    ],
)
def test_what_the_model_does_not_do_is_refused(field, value):
    with pytest.raises(InputError, match=field):
        config_from_json({**PUBLISHED, field: value})
