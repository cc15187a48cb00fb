"""An exported folder read back: the same leaves, the same bytes when exported again."""

import dataclasses
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from exports import exporting, same_leaves
from flax import nnx
from small_dit import random_dit
from small_run import random_weights, small_config

from squeeze_jax.checkpoints.manager import (
    read_weights,
    write_weights,
)
from squeeze_jax.checkpoints.trained import load_initial_params, load_trained
from squeeze_jax.errors import InputError
from squeeze_jax.export.certificate import relative_error
from squeeze_jax.interop.exported import LORA
from squeeze_jax.interop.load import DEMO
from squeeze_jax.interop.lora import save_lora
from squeeze_jax.interop.mapping import parameters_by_path
from squeeze_jax.layers.lora import LoRAConfig, add_lora, linears
from squeeze_jax.sampling.schedule import noise_for
from squeeze_jax.sharding import make_mesh

torch = pytest.importorskip("torch", reason="PyTorch is not installed: parity tests are skipped")
pytest.importorskip("diffusers")
pytest.importorskip("peft")
torch.set_num_threads(1)  # on matrices this small, threads wait for each other most of the time


def contents(folder):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def same_folders(one, other):
    a, b = contents(one), contents(other)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name] == b[name], name


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--merge", "--lora-format", "comfyui"],
        ["--merge", "--lora-format", "kohya", "--dtype", "bfloat16"],
    ],
)
def test_export_import_export_is_byte_identical(home, tmp_path, flags):
    one = exporting(home / "run", tmp_path / "one", "--no-check", *flags)
    same_folders(one, exporting(one, tmp_path / "two", "--no-check", *flags))


@pytest.mark.parametrize(
    ("model", "lora"),
    [
        ({}, {"qkv": "separate", "target": ".*"}),
        ({"frozen_dtype": "int8"}, {"alpha": 3.3}),
    ],
    ids=["every layer, q k v apart", "int8 base"],
)
def test_other_loras_are_byte_identical_too(home, tmp_path, model, lora):
    if model:
        pytest.importorskip("qwix", reason="needs the `quantize` extra")
    config = small_config(home)
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, **model), lora=dataclasses.replace(config.lora, **lora)
    )
    write_weights(tmp_path / "run", *random_weights(config), jnp.float32)
    one = exporting(tmp_path / "run", tmp_path / "one", "--no-check", "--merge")
    same_folders(one, exporting(one, tmp_path / "two", "--no-check", "--merge"))
    same_leaves(tmp_path / "run", one)


def test_the_miniature_is_byte_identical_too(tmp_path):
    one = exporting("demo", tmp_path / "one", "--no-check")
    assert {path.name for path in one.iterdir() if path.is_dir()} == {"aggregator", "transformer", "vae", "mllm"}
    same_folders(one, exporting(one, tmp_path / "two", "--no-check"))
    same_leaves(DEMO / "system", one)


@pytest.mark.slow
def test_the_certificate_comes_out_the_same_again(exported, tmp_path):
    same_folders(exported, exporting(exported, tmp_path / "two", "--merge"))


def test_the_leaves_come_back_bit_for_bit(home, exported):
    same_leaves(home / "run", exported)


def test_training_begins_with_an_exported_folder_a_lora_or_a_transformer(home, exported):
    config, mesh = small_config(home), make_mesh(2, 2, 2)
    _, wanted, _ = read_weights(home / "run")
    base = load_trained(home / "run").base
    for start in (exported, home / "run", exported / LORA):
        leaves = load_initial_params(start, config, base, mesh)
        expected = {name: leaf for name, leaf in wanted.items() if start.suffix == "" or name.startswith("dit.")}
        assert leaves.keys() == expected.keys()
        for name in expected:
            np.testing.assert_array_equal(leaves[name], expected[name], err_msg=name)
    assert len(jax_devices(leaves)) == 8
    whole = dataclasses.replace(config, lora=None)
    leaves = load_initial_params(home / "base", whole, base, mesh)
    assert leaves.keys() == {name for name in random_weights(whole)[1] if name.startswith("dit.")}
    cached = dataclasses.replace(config.model, dit=dataclasses.replace(config.model.dit, reference_attention="cached"))
    with pytest.raises(InputError, match="has learned joint reference attention"):
        load_initial_params(home / "run", dataclasses.replace(config, model=cached), base, mesh)


def test_unos_lora_begins_a_run_of_a_larger_rank(home, tmp_path):
    """Its layers and shared down-projections are ours; rank 2 under rank 3, and alpha = rank where ours is 2 / 3."""
    dit = random_dit()
    add_lora(dit, LoRAConfig(rank=2), rngs=nnx.Rngs(3))
    for _, linear in linears(dit):
        for part in linear.adapter.parts if linear.adapter is not None else ():
            part.up.set_value(jnp.cos(jnp.arange(part.up.size, dtype=jnp.float32)).reshape(part.up.shape))
    save_lora(tmp_path / "uno.safetensors", dit, "xlabs")
    leaves = load_initial_params(tmp_path / "uno.safetensors", small_config(home), "", make_mesh())
    for path, linear in linears(dit):
        for number, part in enumerate(linear.adapter.parts if linear.adapter is not None else ()):
            down, up = (np.asarray(leaves.pop(f"dit.{path}.adapter.parts.{number}.{half}")) for half in ("down", "up"))
            assert down.shape[-1] == 3
            assert down[..., 2].all() and not up[..., 2, :].any()  # of two zero matrices neither would ever learn
            np.testing.assert_allclose(down @ up * np.float32(2 / 3), part.matrix(), atol=1e-5, err_msg=path)
    assert not leaves
    shared = small_config(home)
    save_lora(tmp_path / "apart.safetensors", separately_adapted(), "diffusers")
    with pytest.raises(InputError, match=r"set lora\.qkv to separate"):
        load_initial_params(tmp_path / "apart.safetensors", shared, "", make_mesh())
    smaller = dataclasses.replace(shared, lora=LoRAConfig(rank=1))
    with pytest.raises(InputError, match=r"has rank 2, the config's lora\.rank is 1"):
        load_initial_params(tmp_path / "uno.safetensors", smaller, "", make_mesh())


def separately_adapted():
    dit = random_dit()
    add_lora(dit, LoRAConfig(rank=2, qkv="separate"), rngs=nnx.Rngs(3))
    for _, linear in linears(dit):
        for part in linear.adapter.parts if linear.adapter is not None else ():
            part.up.set_value(part.up[...] + 1)  # of pairs without effect it would not matter
    return dit


def jax_devices(leaves):
    return {device for leaf in leaves.values() for device in leaf.sharding.device_set}


@pytest.mark.slow
def test_a_merged_export_samples_without_its_base(home, tmp_path):
    run = tmp_path / "run"
    config, leaves = random_weights(small_config(home))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dit_weights=str(tmp_path / "base")))
    shutil.copytree(home / "base", tmp_path / "base")
    write_weights(run, config, leaves, jnp.float32)
    out = exporting(run, tmp_path / "out", "--merge", "--no-check")
    halved = exporting(run, tmp_path / "halved", "--merge", "--no-check", "--dtype", "bfloat16")
    with_base = load_trained(out)
    shutil.rmtree(tmp_path / "base")
    without = load_trained(out)
    assert {str(leaf.dtype) for leaf in parameters_by_path(load_trained(halved).system.dit).values()} == {"bfloat16"}
    assert with_base.config.lora is not None and without.config.lora is None
    x = noise_for([0], 16, 64)
    context = jnp.zeros((1, 0, 40))
    first, second = (
        nnx.jit(lambda dit: dit(x, context, jnp.ones(1) * 0.5, jnp.ones(1), target_grid=(4, 4)))(side.system.dit)
        for side in (with_base, without)
    )
    assert relative_error(second, first) < 1e-5
