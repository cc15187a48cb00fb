"""FLUX.1's two checkpoint layouts: every tensor of the real model has its place, and both give the same model."""

import dataclasses
import inspect
import json
from collections import Counter
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_dit import CONFIG, like_twin, random_dit, torch_twin
from tiny import tiny_config

from squeeze_jax.checkpoints.build import build_system
from squeeze_jax.errors import InputError
from squeeze_jax.interop.flux import (
    config_from_json,
    config_to_json,
    diffusers_entries,
    original_entries,
)
from squeeze_jax.interop.load import load_dit, save_dit
from squeeze_jax.interop.mapping import (
    Entry,
    MappingError,
    export_entries,
    load_entries,
    parameters_by_path,
    to_ours,
    to_theirs,
)
from squeeze_jax.layers.lora import LoRAConfig, add_lora
from squeeze_jax.models.dit import DiT, DiTConfig

FOLDER = Path(__file__).parent / "checkpoints"
SCHNELL = dataclasses.replace(CONFIG, guidance=False)


def shapes_of_the_real_model() -> dict[str, tuple[int, ...]]:
    rows = (line.split("\t") for line in (FOLDER / "flux1_dev_transformer.params.tsv").read_text().splitlines())
    return {name: tuple(map(int, shape.split("x"))) for name, shape in rows}


def abstract(config: DiTConfig) -> DiT:
    return nnx.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0)))


def values(dit) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf[...]) for path, leaf in parameters_by_path(dit).items()}


# --- the real size, abstractly ---------------------------------------------------------------------------------------


def places(table) -> Counter:
    """How often a table fills each (parameter, layer)."""
    return Counter((entry.path, entry.layer) for entry in table)


def test_every_tensor_of_flux1_dev_has_exactly_one_place_of_its_shape():
    shapes = shapes_of_the_real_model()
    config = config_from_json(json.loads((FOLDER / "flux1_dev_transformer.config.json").read_text()))
    assert config == DiTConfig()
    parameters, table = parameters_by_path(abstract(config)), diffusers_entries(config)
    assert Counter(name for entry in table for name in entry.sources) == dict.fromkeys(shapes, 1)
    assert set(places(table).values()) == {1}
    assert {entry.path for entry in table} == set(parameters)
    for entry in table:
        rows = sum(shapes[name][0] for name in entry.sources)
        if len(entry.sources) > 1:
            assert entry.sizes == tuple(shapes[name][0] for name in entry.sources)
        rest = shapes[entry.sources[0]][1:]
        assert all(shapes[name][1:] == rest for name in entry.sources)
        expected = (*rest, rows)  # linear weights are transposed; vectors have no rest
        ours = parameters[entry.path].shape
        assert (ours if entry.layer is None else ours[1:]) == expected, entry
        assert entry.layout in (("linear", "swap_halves") if rest else ("same", "swap_halves"))
    depth = Counter(path for path, _ in places(table))
    assert all(depth[path] == (leaf.shape[0] if "blocks" in path else 1) for path, leaf in parameters.items())
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == sum(leaf.size for leaf in parameters.values())


def test_the_original_layout_of_flux1_dev_fills_the_same_places():
    """Black Forest Labs' file has 780 tensors: q, k, v (and the feed-forward's first layer) are one there."""
    config = DiTConfig()
    table = original_entries(config)
    assert places(table) == places(diffusers_entries(config))
    names = [name for entry in table for name in entry.sources]
    assert len(names) == len(set(names)) == 780
    for known in (
        "double_blocks.18.img_attn.norm.key_norm.scale", "double_blocks.0.txt_mlp.2.bias",
        "double_blocks.7.img_mod.lin.weight",
        "single_blocks.37.linear1.weight", "single_blocks.0.norm.query_norm.scale", "single_blocks.3.modulation.lin.bias",
        "guidance_in.in_layer.weight", "final_layer.adaLN_modulation.1.weight", "final_layer.linear.bias", "img_in.weight",
    ):  # fmt: skip
        assert known in names


def test_schnell_has_no_guidance():
    config = dataclasses.replace(DiTConfig(), guidance=False)
    for table in (diffusers_entries(config), original_entries(config)):
        assert not any("guidance" in name for entry in table for name in entry.sources)
        assert {entry.path for entry in table} == set(parameters_by_path(abstract(config)))


def test_configs_go_there_and_back():
    assert config_from_json(config_to_json(CONFIG)) == CONFIG
    published = json.loads((FOLDER / "flux1_dev_transformer.config.json").read_text())
    ours = config_to_json(DiTConfig())
    assert all(ours[key] == published[key] for key in ours.keys() & published.keys())
    assert published.keys() - ours.keys() <= {"_diffusers_version", "out_channels"}


# --- small, by value -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [CONFIG, SCHNELL], ids=["dev", "schnell"])
@pytest.mark.parametrize("entries", [diffusers_entries, original_entries])
def test_export_and_import_are_inverse(entries, config):
    dit, other = random_dit(config), abstract(config)
    tensors = export_entries(dit, entries(config))
    load_entries(other, entries(config), tensors)
    before, after = values(dit), values(other)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[path], after[path]) for path in before)
    again = export_entries(other, entries(config))
    assert all(np.array_equal(again[name], tensors[name]) for name in tensors)


def their_converter(width: int):
    """diffusers' own converter from the original layout, for a width other than FLUX.1's (it is a constant there)."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: parity tests are skipped")
    module = pytest.importorskip("diffusers.loaders.single_file_utils")
    source = inspect.getsource(module.convert_flux_transformer_checkpoint_to_diffusers)
    if source.count("inner_dim = 3072") != 1:
        pytest.skip("diffusers' converter has changed: it no longer has the width as a constant")
    scope = {"torch": torch}
    exec(source.replace("inner_dim = 3072", f"inner_dim = {width}"), scope)
    return lambda tensors: {
        name: tensor.numpy()
        for name, tensor in scope["convert_flux_transformer_checkpoint_to_diffusers"](
            {name: torch.tensor(tensor) for name, tensor in tensors.items()}
        ).items()
    }


@pytest.mark.parametrize("config", [CONFIG, SCHNELL], ids=["dev", "schnell"])
def test_both_layouts_of_one_model_give_identical_parameters(config):
    """An original file, and what diffusers makes of it (which swaps the final layer's shift and scale)."""
    table = original_entries(config)
    original = export_entries(random_dit(config), table)
    converted = their_converter(config.width)(original)
    assert sorted(converted) == sorted(n for entry in diffusers_entries(config) for n in entry.sources)
    from_original, from_diffusers = abstract(config), abstract(config)
    load_entries(from_original, table, original)
    load_entries(from_diffusers, diffusers_entries(config), converted)
    one, two = values(from_original), values(from_diffusers)
    assert all(np.array_equal(one[path], two[path]) for path in one)
    swapped = converted["norm_out.linear.weight"]
    assert not np.array_equal(swapped, original["final_layer.adaLN_modulation.1.weight"])


def test_swapped_halves_swap_outputs_and_never_inputs():
    weight, bias = np.arange(12.0).reshape(4, 3), np.arange(4.0)
    kernel = to_ours([weight], "swap_halves")
    np.testing.assert_array_equal(kernel, weight[[2, 3, 0, 1]].T)
    np.testing.assert_array_equal(to_ours([bias], "swap_halves"), [2, 3, 0, 1])
    for array, theirs in ((kernel, weight), (to_ours([bias], "swap_halves"), bias)):
        np.testing.assert_array_equal(to_theirs(array, Entry(("x",), "y", "swap_halves"))[0], theirs)


def test_a_folder_of_either_layout_loads_and_saves(tmp_path):
    from safetensors.numpy import save_file

    dit = random_dit()
    save_dit(tmp_path / "theirs", dit, jnp.float32)
    (tmp_path / "original").mkdir()
    save_file(export_entries(dit, original_entries(CONFIG)), tmp_path / "original" / "flux1-dev.safetensors")
    (tmp_path / "original" / "config.json").write_text(json.dumps(config_to_json(CONFIG)))
    for name in ("theirs", "original"):
        loaded = load_dit(tmp_path / name, jnp.float32)
        expected = values(dit)
        assert all(np.array_equal(value, expected[path]) for path, value in values(loaded).items()), name
    half = load_dit(tmp_path / "theirs")
    assert {leaf.dtype for leaf in parameters_by_path(half).values()} == {jnp.dtype(jnp.bfloat16)}


def test_diffusers_loads_our_export():
    torch, twin = torch_twin()
    _, weights = like_twin(twin)
    exported = export_entries(random_dit(), diffusers_entries(CONFIG))
    assert {name: array.shape for name, array in exported.items()} == {n: a.shape for n, a in weights.items()}
    twin.load_state_dict({name: torch.tensor(array) for name, array in exported.items()}, strict=True)


# --- what does not fit is named --------------------------------------------------------------------------------------


def broken(change, config=CONFIG, entries=diffusers_entries):
    """The message about a checkpoint that `change` spoilt, after checking that nothing was set."""
    dit = random_dit()
    tensors = export_entries(dit, diffusers_entries(CONFIG))
    change(tensors)
    module = random_dit(config, seed=1)
    before = values(module)
    with pytest.raises(MappingError) as error:
        load_entries(module, entries(config), tensors)
    assert all(np.array_equal(value, before[path]) for path, value in values(module).items())
    return str(error.value)


def test_missing_and_misspelt_names_are_listed_with_the_nearest():
    def rename(tensors):
        tensors["x_embeder.weight"] = tensors.pop("x_embedder.weight")
        del tensors["proj_out.bias"]

    message = broken(rename)
    assert "(3 differences)" in message
    assert "missing: x_embedder.weight (nearest: x_embeder.weight)" in message
    assert "missing: proj_out.bias" in message
    assert "unexpected: x_embeder.weight (nearest: x_embedder.weight)" in message


def test_wrong_shapes_are_listed_together():
    def spoil(tensors):
        tensors["x_embedder.weight"] = tensors["x_embedder.weight"][:, :32]
        tensors["transformer_blocks.1.attn.to_k.bias"] = np.zeros(7, np.float32)

    message = broken(spoil)
    assert "(2 differences)" in message
    assert "x_embedder.weight gives (32, 72), the model wants (64, 72)" in message
    assert "transformer_blocks.1.attn.to_k.bias" in message


def test_guidance_weights_into_a_model_without_guidance_are_refused():
    message = broken(lambda tensors: None, config=SCHNELL)
    assert "(4 differences)" in message
    assert "unexpected: time_text_embed.guidance_embedder.linear_1.weight" in message


def test_a_model_with_guidance_refuses_weights_without():
    def drop(tensors):
        for name in [name for name in tensors if "guidance" in name]:
            del tensors[name]

    message = broken(drop)
    assert "(4 differences)" in message
    assert "missing: time_text_embed.guidance_embedder.linear_2.bias" in message


def test_adapters_are_not_parameters_of_the_base():
    """A transformer that carries adapters takes a base checkpoint, and keeps them."""
    dit = random_dit()
    tensors = export_entries(random_dit(seed=5), diffusers_entries(CONFIG))
    add_lora(dit, LoRAConfig(4, target=r"single_blocks\.linear1"), rngs=nnx.Rngs(0))
    assert set(parameters_by_path(dit)) == set(parameters_by_path(random_dit()))
    down = np.asarray(dit.single_blocks.linear1.adapter.parts[0].down[...])
    load_entries(dit, diffusers_entries(CONFIG), tensors)
    assert all(np.array_equal(value, values(random_dit(seed=5))[path]) for path, value in values(dit).items())
    np.testing.assert_array_equal(dit.single_blocks.linear1.adapter.parts[0].down[...], down)


# --- a base under a config -------------------------------------------------------------------------------------------


def with_base(folder, **changes):
    config = tiny_config()
    values = {name: changes.pop(name) for name in ("dtype", "frozen_dtype", "dit") if name in changes}
    model = dataclasses.replace(config.model, dit_weights=str(folder), **values)
    return dataclasses.replace(config, model=model, **changes)


@pytest.mark.parametrize(
    ("lora", "dtype", "frozen_dtype"), [(None, "bfloat16", "bfloat16"), (LoRAConfig(2), "float32", "bfloat16")]
)
def test_a_base_computes_in_the_configs_dtype(tmp_path, lora, dtype, frozen_dtype):
    """What weights are kept in and what products are computed in are two settings."""
    base = random_dit(tiny_config().model.dit)
    save_dit(tmp_path, base, jnp.float32)
    dit = build_system(with_base(tmp_path, lora=lora, dtype=dtype, frozen_dtype=frozen_dtype)).dit
    layer = dit.double_blocks.img_attn.qkv
    assert layer.dtype == dit.img_in.dtype == jnp.dtype(dtype)
    assert dit.time_in.in_layer.dtype == jnp.float32  # modulation is float32 always
    kept = jnp.float32 if lora is None else jnp.bfloat16
    np.testing.assert_array_equal(layer.kernel[...], base.double_blocks.img_attn.qkv.kernel[...].astype(kept))
    assert (layer.adapter is None) == (lora is None)


def test_a_base_of_another_shape_than_the_config_is_refused(tmp_path):
    """Guidance weights, for instance, are not dropped because the config says that there are none."""
    dit = tiny_config().model.dit
    save_dit(tmp_path, random_dit(dit), jnp.float32)
    with pytest.raises(InputError, match=r"guidance=False.*make them equal"):
        build_system(with_base(tmp_path, dit=dataclasses.replace(dit, guidance=False)))
