"""A checkpoint on a mesh: what every device keeps, and that it draws what one device draws."""

import dataclasses
import gc
import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parity import relative_error
from PIL import Image
from small_run import random_weights, small_config, write_home

from squeeze_jax.checkpoints.inference import convert_for_sampling, merge_adapters
from squeeze_jax.checkpoints.manager import write_weights
from squeeze_jax.checkpoints.trained import load_trained
from squeeze_jax.data.images import to_uint8
from squeeze_jax.errors import InputError
from squeeze_jax.interop.exported import write_exported
from squeeze_jax.layers.lora import linears
from squeeze_jax.models.dit import DiTConfig
from squeeze_jax.planning.sampler_program import kept_weights, mllm_fits
from squeeze_jax.sampling.layout import default_sizes, sampling_mesh
from squeeze_jax.sampling.pipeline import Pipeline, Settings
from squeeze_jax.sharding import make_mesh, parameter_spec

DIT = DiTConfig(
    in_channels=64,
    context_width=40,
    pooled_width=24,
    heads=4,
    head_width=16,
    num_double_blocks=1,
    num_single_blocks=2,
    rope_axes=(4, 6, 6),
)
SETTINGS = Settings(steps=4)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """`run` computes in float32; `half` in bfloat16; `bare` has a random base; and an export."""
    home = write_home(tmp_path_factory.mktemp("home"), DIT)
    config, leaves = random_weights(small_config(home, DIT))
    half = dataclasses.replace(config.model, dtype="bfloat16")
    write_weights(home / "half", dataclasses.replace(config, model=half), leaves, jnp.float32)
    bare = dataclasses.replace(config.model, dit_weights=None)
    write_weights(home / "bare", dataclasses.replace(config, model=bare), leaves, jnp.float32)
    trained, about = load_trained(home / "run"), {"dtype": "float32"}
    (home / "exported").mkdir()
    write_exported(
        home / "exported", trained.system, config, about, np.dtype("float32"), merge=False
    )
    return home


@pytest.fixture(scope="module")
def subject():
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (32, 24, 3), np.uint8))


def bytes_by_device(arrays):
    """Bytes of arrays on each device. (`addressable_shards` would make arrays itself.)"""
    kept = Counter()
    for array in arrays:
        size = math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
        kept.update(dict.fromkeys(array.sharding.device_set, size))
    return kept


@pytest.mark.parametrize(
    ("run", "axes", "merge_lora"),
    [("half", (1, 2, 4), True), ("half", (1, 8, 1), False), ("run", (2, 2, 2), True)],
)
def test_every_device_keeps_what_the_plan_says(home, run, axes, merge_lora):
    """Not a byte more: of all arrays that loading leaves alive, whoever holds them."""
    mesh = make_mesh(*axes)
    gc.collect()
    before = {id(array) for array in jax.live_arrays()}
    pipeline = Pipeline.load(home / run, mesh, merge_lora=merge_lora)
    gc.collect()
    kept = bytes_by_device(array for array in jax.live_arrays() if id(array) not in before)
    planned = kept_weights(pipeline.config, mesh, merge_lora=merge_lora)
    assert dict(kept) == dict.fromkeys(mesh.devices.flat, sum(planned))
    system = bytes_by_device(jax.tree.leaves(pipeline.params))
    assert dict(system) == dict.fromkeys(mesh.devices.flat, planned.system)
    pipeline.encoders.forget_reader()  # without a garbage collection
    kept = bytes_by_device(array for array in jax.live_arrays() if id(array) not in before)
    assert dict(kept) == dict.fromkeys(mesh.devices.flat, planned.system + planned.autoencoder)


@pytest.mark.parametrize("folder", ["half", "exported", "bare"])
def test_weights_lie_as_the_table_says_with_the_values_of_one_device(home, folder):
    """Those that are read, merged, rounded, and those of a base that is made from its seed."""
    mesh = make_mesh(1, 2, 4)
    spread, alone = (
        convert_for_sampling(trained.system, trained.config)
        for trained in (load_trained(home / folder, mesh=mesh), load_trained(home / folder))
    )
    wanted, cut = dict(nnx.to_flat_state(nnx.state(alone))), 0
    for path, leaf in nnx.to_flat_state(nnx.state(spread)):
        array, name = leaf.get_value(), ".".join(map(str, path))
        place = jax.sharding.NamedSharding(mesh, parameter_spec(name, array.shape, mesh))
        assert array.sharding.is_equivalent_to(place, array.ndim), name
        expected = wanted.pop(path).get_value()
        assert array.dtype == expected.dtype
        one, other = (np.asarray(x, np.float32) for x in (array, expected))
        np.testing.assert_allclose(one, other, rtol=2.0**-7, atol=1e-6, err_msg=name)
        assert np.linalg.norm(one - other) <= 1e-4 * np.linalg.norm(other), name
        cut += not array.is_fully_replicated
    assert not wanted and cut > 20


@pytest.fixture(scope="module")
def one_device(home):
    """On one device, as before there were meshes: adapters beside their kernels."""
    return Pipeline.load(home / "run", merge_lora=False)


@pytest.fixture(scope="module")
def drawn(one_device, subject):
    """Two images of a prompt with a reference."""
    return one_device("a red box", [subject], dataclasses.replace(SETTINGS, num_images=2))


@pytest.mark.telling
@pytest.mark.slow
@pytest.mark.parametrize("axes", [(1, 2, 4), pytest.param((1, 8, 1), marks=pytest.mark.slow)])
def test_eight_devices_draw_the_same_picture(home, subject, drawn, axes):
    """MLLM, autoencoder, aggregator and transformer on the mesh, adapters merged on it."""
    pipeline = Pipeline.load(home / "run", make_mesh(*axes))
    settings = dataclasses.replace(SETTINGS, num_images=2)
    found = pipeline("a red box", [subject], settings)
    assert np.ptp(to_uint8(drawn).astype(int)) > 50
    difference = np.abs(to_uint8(found).astype(int) - to_uint8(drawn).astype(int))
    assert difference.max() <= 1
    assert relative_error(found, drawn) < 1e-4


def test_adapters_merged_equal_adapters_beside(home, one_device):
    """To float32's rounding; in bfloat16 the merged kernel is the exact sum, rounded once."""
    exact = load_trained(home / "run").system
    sums = {
        path: np.asarray(linear.kernel[...], np.float64)
        + np.asarray(linear.adapter.matrix(linear.kernel.shape[-1]), np.float64)
        for path, linear in linears(exact.dit)
        if linear.adapter is not None
    }
    assert len(sums) == 6
    half = load_trained(home / "half")
    merged = dict(linears(convert_for_sampling(half.system, half.config).dit))
    for path, wanted in sums.items():
        kernel = merged[path].kernel[...]
        assert kernel.dtype == jnp.bfloat16 and merged[path].adapter is None
        error = np.abs(np.asarray(kernel, np.float64) - wanted)
        assert (error <= np.abs(wanted) * 2.0**-8 + 1e-6).all(), path  # half a last place
    merge_adapters(exact.dit)
    both = Pipeline.of(exact, one_device.config, one_device.encoders)
    states, latents = one_device.encode(["a red box"], [[]])
    tokens = [p.sample(states, latents, [3], SETTINGS) for p in (both, one_device)]
    assert relative_error(*tokens) < 1e-5


def test_matrices_are_kept_in_the_type_that_they_are_multiplied_in(home):
    """What a linear layer of a bfloat16 model rounds at every call, and nothing else."""
    half = load_trained(home / "half")
    kept = convert_for_sampling(half.system, half.config, merge_lora=False)
    for name, linear in linears(kept):
        assert linear.kernel.dtype == jnp.bfloat16
        if name.startswith("aggregator"):
            assert linear.dtype == jnp.bfloat16
        for part in () if linear.adapter is None else linear.adapter.parts:
            assert part.down.dtype == part.up.dtype == jnp.bfloat16
            assert part.scale.dtype == jnp.float32
    flat = nnx.to_flat_state(nnx.state(kept.aggregator))
    norms = [leaf.dtype for path, leaf in flat if path[-1] == "scale"]
    assert norms and set(norms) == {jnp.dtype("float32")}
    whole = load_trained(home / "run")
    types = [leaf.dtype for leaf in jax.tree.leaves(nnx.state(whole.system))]
    converted = convert_for_sampling(whole.system, whole.config, merge_lora=False)
    assert [leaf.dtype for leaf in jax.tree.leaves(nnx.state(converted))] == types


def test_an_mllm_that_is_not_kept_is_read_again_for_the_next_prompt(home, one_device):
    frees = dataclasses.replace(
        Pipeline.load(home / "run", merge_lora=False, encoders=one_device.encoders),
        keep_mllm=False,
    )
    first = frees.encode(["a red box"], [[]])[0]
    assert frees.encoders._reader is None
    again = frees.encode(["a red box"], [[]])[0]
    jax.tree.map(np.testing.assert_array_equal, first, again)


def test_the_mllm_is_kept_where_the_device_has_room(home, one_device, monkeypatch):
    config = one_device.config
    kept = sum(kept_weights(config, make_mesh(devices=jax.devices()[:1])))
    assert mllm_fits(config, None, merge_lora=False)  # a CPU does not say how much there is
    device = type(jax.devices()[0])
    for limit, fits in ((8 * kept / 7 + 8, True), (8 * kept / 7 - 8, False)):
        said = {"bytes_limit": limit}
        monkeypatch.setattr(device, "memory_stats", lambda self, said=said: said)
        assert mllm_fits(config, None) == fits


@pytest.mark.parametrize(
    ("count", "heads", "images", "sizes"),
    [
        (1, 24, 1, (1, 1, 1)),
        (4, 24, 1, (1, 1, 4)),
        (8, 24, 1, (1, 1, 8)),
        (8, 24, 2, (1, 2, 4)),
        (8, 24, 16, (1, 8, 1)),
        (16, 24, 1, (1, 2, 8)),  # 16 does not divide 24
        (16, 24, 4, (1, 4, 4)),
        (8, 3, 1, (1, 8, 1)),
        (6, 24, 4, (1, 3, 2)),
    ],
)
def test_one_image_is_shared_by_all_and_many_are_spread(count, heads, images, sizes):
    assert default_sizes(count, heads, images) == sizes


def test_a_mesh_of_some_devices_or_one(home):
    assert sampling_mesh(4, devices=jax.devices()[:1]) is None
    assert sampling_mesh(4, data=1, fsdp=1, tensor=1) is None
    assert dict(sampling_mesh(4, tensor=2).shape) == {"data": 1, "fsdp": 4, "tensor": 2}
    some = sampling_mesh(4, fsdp=1, tensor=4)
    assert list(some.devices.flat) == jax.devices()[:4]
    with pytest.raises(InputError, match=r"tensor=3 does not divide the transformer's 4"):
        sampling_mesh(4, fsdp=1, tensor=3)
    with pytest.raises(InputError, match="needs 16 devices, there are 8"):
        sampling_mesh(4, fsdp=16, tensor=1)
    with pytest.raises(InputError, match="tensor=0: sizes are at least 1"):
        sampling_mesh(4, tensor=0)
