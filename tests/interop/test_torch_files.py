"""The exported PyTorch files against our modules, part by part."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parity import relative_error
from PIL import Image
from small_internvl import randomly

from squeeze_jax.batch import HiddenStates
from squeeze_jax.data.images import load_image
from squeeze_jax.interop import aggregator as aggregator_format
from squeeze_jax.interop.mapping import export_entries, load_entries, parameters_by_path
from squeeze_jax.interop.tensors import TensorFolder, write_tensors
from squeeze_jax.models.aggregator import KINDS, Aggregator, AggregatorConfig

torch = pytest.importorskip("torch", reason="PyTorch is not installed: parity tests are skipped")
FILES = Path(aggregator_format.__file__).with_name("torch_files")
CONFIG = AggregatorConfig(
    layers=(0, 2, 3, 5),
    width=24,
    out_width=20,
    heads=3,
    mlp_width=40,
    layer_blocks=2,
    refiner_blocks=2,
)


@pytest.fixture(scope="module", autouse=True)
def importable():
    sys.path.insert(0, str(FILES))
    yield
    sys.path.remove(str(FILES))


def small(kind: str) -> Aggregator:
    module = randomly(
        lambda: Aggregator(dataclasses.replace(CONFIG, kind=kind, norm_eps=0.1), rngs=nnx.Rngs(0))
    )
    for path, leaf in parameters_by_path(module).items():  # around what training makes of them
        if path.endswith("scale"):
            leaf.set_value(leaf[...] - 1)
    return module


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("images", [(), ((2, 6),), ((1, 4), (6, 9))])
def test_the_aggregator_in_pytorch_is_ours(tmp_path, kind, images):
    from squeeze_aggregator import Aggregator as Theirs

    ours = small(kind)
    write_tensors(
        tmp_path / "model.safetensors", export_entries(ours, aggregator_format.entries(ours.config))
    )
    (tmp_path / "config.json").write_text(json.dumps(aggregator_format.config_to_json(ours.config)))
    theirs = Theirs.load(tmp_path)
    states = np.random.default_rng(1).standard_normal((7, 11, 24)).astype(np.float32)
    is_image = np.zeros(11, bool)
    for start, end in images:
        is_image[start:end] = True
    place = np.arange(11, dtype=np.int32)
    apart = [
        (states[None][:, :, m], np.ones((1, m.sum()), bool), place[m][None])
        for m in (~is_image, is_image)
    ]
    expected = ours(jax.tree.map(jnp.asarray, HiddenStates(*apart[0], *apart[1])))
    with torch.no_grad():
        found = theirs(torch.from_numpy(states), torch.from_numpy(is_image)).numpy()
    assert relative_error(found, expected.tokens[0]) < 1e-5
    again = nnx.eval_shape(lambda: Aggregator(ours.config, rngs=nnx.Rngs(0)))
    load_entries(again, aggregator_format.entries(ours.config), TensorFolder(tmp_path))
    for path, leaf in parameters_by_path(ours).items():
        np.testing.assert_array_equal(parameters_by_path(again)[path][...], leaf[...], err_msg=path)


def test_files_that_people_bring_become_the_same_picture(tmp_path):
    """A phone's photograph, upright by its red corner; a palette with a transparent colour; an
    animation."""
    from squeeze_pipeline import to_rgb

    photo, exif = Image.new("RGB", (40, 20)), Image.Exif()
    photo.paste((255, 0, 0), (0, 0, 8, 8))
    exif[0x0112] = 6
    photo.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "phone.png", exif=exif)
    palette = Image.new("P", (4, 2))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "palette.png", transparency=0)
    photo.save(tmp_path / "frames.gif", save_all=True, append_images=[Image.new("RGB", (40, 20))])
    for name in ("phone.png", "palette.png", "frames.gif"):
        with Image.open(tmp_path / name) as image:
            theirs = to_rgb(image)
        np.testing.assert_array_equal(theirs, load_image(tmp_path / name), err_msg=name)
    with Image.open(tmp_path / "phone.png") as image:
        np.testing.assert_array_equal(to_rgb(image), photo)
