"""FLUX.2's transformer in both layouts: each of klein 4B's tensors has its place; both are one."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parity import relative_error
from small_flux2 import CONFIG, inputs, random_flux2, run, run_twin, torch_twin

from squeeze_jax.errors import InputError
from squeeze_jax.interop.flux2 import (
    config_from_json,
    config_from_shapes,
    config_to_json,
    diffusers_entries,
    original_entries,
)
from squeeze_jax.interop.formats import distilled_name
from squeeze_jax.interop.load import DIT_PREFIXES, load_dit
from squeeze_jax.interop.mapping import (
    ArrayTensors,
    export_entries,
    load_entries,
    parameters_by_path,
    without_prefix,
)
from squeeze_jax.models.flux2 import Flux2, Flux2Config

FOLDER = Path(__file__).parent / "checkpoints"
DEV = dataclasses.replace(CONFIG, guidance=True)
PUBLISHED = json.loads((FOLDER / "flux2_klein_4b_transformer.config.json").read_text())


def shapes_of_klein() -> dict[str, tuple[int, ...]]:
    lines = (FOLDER / "flux2_klein_4b_transformer.params.tsv").read_text().splitlines()
    rows = (line.split("\t") for line in lines)
    return {name: tuple(map(int, shape.split("x"))) for name, shape in rows}


def abstract(config: Flux2Config) -> Flux2:
    return nnx.eval_shape(lambda: Flux2(config, rngs=nnx.Rngs(0)))


def values(model) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf[...]) for path, leaf in parameters_by_path(model).items()}


def places(table) -> Counter:
    """How often a table fills each (parameter, layer)."""
    return Counter((entry.path, entry.layer) for entry in table)


def test_every_tensor_of_klein_has_exactly_one_place_of_its_shape():
    shapes, config = shapes_of_klein(), config_from_json(PUBLISHED)
    assert config == Flux2Config()
    parameters, table = parameters_by_path(abstract(config)), diffusers_entries(config)
    assert len(shapes) == 169
    assert Counter(name for entry in table for name in entry.sources) == dict.fromkeys(shapes, 1)
    assert set(places(table).values()) == {1}
    assert {entry.path for entry in table} == set(parameters)
    for entry in table:
        rows, rest = [shapes[name][0] for name in entry.sources], shapes[entry.sources[0]][1:]
        assert all(shapes[name][1:] == rest for name in entry.sources)
        assert len(rows) == 1 or entry.sizes == tuple(rows)
        shape = parameters[entry.path].shape
        assert (shape if entry.layer is None else shape[1:]) == (*rest, sum(rows)), entry
        assert entry.layout in (("linear", "swap_halves") if rest else ("same",))
    depth = Counter(path for path, _ in places(table))
    stacked = {path: leaf.shape[0] if "blocks" in path else 1 for path, leaf in parameters.items()}
    assert depth == stacked
    assert sum(leaf.size for leaf in parameters.values()) == 3_875_544_576


def test_the_tensors_are_those_that_diffusers_makes():
    torch = pytest.importorskip(
        "torch", reason="PyTorch is not installed: parity tests are skipped"
    )
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        theirs = diffusers.Flux2Transformer2DModel.from_config(PUBLISHED).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in theirs.items()} == shapes_of_klein()


def converted(tensors):
    """What diffusers' own converter makes of a single file's tensors."""
    module = pytest.importorskip("diffusers.loaders.single_file_utils")
    return module.convert_flux2_transformer_checkpoint_to_diffusers(dict(tensors))


def test_diffusers_converts_the_single_file_of_klein_to_its_own_names():
    torch = pytest.importorskip(
        "torch", reason="PyTorch is not installed: parity tests are skipped"
    )
    config = Flux2Config()
    table, parameters = original_entries(config), parameters_by_path(abstract(config))
    assert places(table) == places(diffusers_entries(config))
    file = {}
    for entry in table:
        shape = parameters[entry.path].shape
        shape = shape if entry.layer is None else shape[1:]
        file[entry.sources[0]] = torch.empty(shape[::-1], device="meta")
    assert len(file) == len(table) == 149
    theirs = converted(file)
    assert {name: tuple(tensor.shape) for name, tensor in theirs.items()} == shapes_of_klein()


@pytest.mark.parametrize("config", [CONFIG, DEV], ids=["klein", "with guidance"])
@pytest.mark.parametrize("entries", [diffusers_entries, original_entries])
def test_import_and_export_are_inverse_byte_for_byte(entries, config):
    model, other = random_flux2(config), abstract(config)
    tensors = export_entries(model, entries(config))
    load_entries(other, entries(config), tensors)
    before, after = values(model), values(other)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[path], after[path]) for path in before)
    again = export_entries(other, entries(config))
    assert again.keys() == tensors.keys()
    assert all(again[name].tobytes() == tensor.tobytes() for name, tensor in tensors.items())


def test_diffusers_tensors_come_back_byte_for_byte():
    _, twin = torch_twin()
    theirs = {name: tensor.numpy() for name, tensor in twin.state_dict().items()}
    model = abstract(CONFIG)
    load_entries(model, diffusers_entries(CONFIG), theirs)
    ours = export_entries(model, diffusers_entries(CONFIG))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].tobytes() == tensor.tobytes() for name, tensor in theirs.items())


@pytest.mark.parametrize("config", [CONFIG, DEV], ids=["klein", "with guidance"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_both_layouts_of_one_model_give_identical_parameters(config, prefix):
    """A single file, and what diffusers makes of it (the final layer's shift and scale swapped)."""
    torch = pytest.importorskip(
        "torch", reason="PyTorch is not installed: parity tests are skipped"
    )
    table = original_entries(config)
    file = export_entries(random_flux2(config), table)
    theirs = {
        name: tensor.numpy()
        for name, tensor in converted({name: torch.tensor(t) for name, t in file.items()}).items()
    }
    named = ArrayTensors({prefix + name: tensor for name, tensor in file.items()})
    from_file, from_diffusers = abstract(config), abstract(config)
    load_entries(from_file, table, without_prefix(named, DIT_PREFIXES))
    load_entries(from_diffusers, diffusers_entries(config), theirs)
    one, two = values(from_file), values(from_diffusers)
    assert all(np.array_equal(one[path], two[path]) for path in one)
    swapped, final = theirs["norm_out.linear.weight"], file["final_layer.adaLN_modulation.1.weight"]
    assert not np.array_equal(swapped, final)


def test_the_entry_point_loads_what_diffusers_saves(tmp_path):
    """`load_dit` finds the family by config.json and returns what is called as FLUX.1's is."""
    torch, twin = torch_twin()
    twin.save_pretrained(tmp_path)
    x = inputs()
    with torch.no_grad():
        theirs = run_twin(torch, twin, x)

    def velocity(**options):
        return run(load_dit(tmp_path, dtype=jnp.float32, **options), x)

    joint, cached = velocity(), velocity(reference_attention="cached")
    assert relative_error(joint, theirs) < 1e-5
    assert relative_error(cached, theirs) > 1e-3


def test_configs_go_there_and_back():
    for config in (CONFIG, DEV):
        assert config_from_json(config_to_json(config)) == config
    ours = config_to_json(Flux2Config())
    assert {key: ours[key] for key in PUBLISHED} == PUBLISHED


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("patch_size", 2),
        ("eps", 1e-5),
        ("out_channels", 64),
        ("_class_name", "FluxTransformer2DModel"),
    ],
)
def test_a_config_of_another_model_is_refused(field, value):
    with pytest.raises(InputError, match=field):
        config_from_json({**PUBLISHED, field: value})


@pytest.mark.parametrize(
    "config", [Flux2Config(), Flux2Config(heads=4, guidance=True, num_double_blocks=3)]
)
def test_a_single_file_tells_its_sizes(config):
    parameters = parameters_by_path(abstract(config))
    file = {}
    for entry in original_entries(config):
        shape = parameters[entry.path].shape
        shape = shape if entry.layer is None else shape[1:]
        file[entry.sources[0]] = np.broadcast_to(np.float32(0), shape[::-1])
    assert config_from_shapes(ArrayTensors(file)) == config


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("weights/FLUX.2-klein-4B/transformer", "FLUX.2-klein-4B"),
        ("FLUX.2-klein-base-4B/transformer", None),
        ("FLUX.1-dev/transformer", None),
        (None, None),
    ],
)
def test_a_distilled_model_is_known_by_its_name(place, name):
    assert distilled_name(place) == name
