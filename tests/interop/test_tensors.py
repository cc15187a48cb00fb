"""Checkpoint folders: what is read, in parts too, and what is refused with its cause."""

import json
import struct

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_dit import CONFIG, random_dit

from squeeze_jax.errors import InputError
from squeeze_jax.interop import load_dit
from squeeze_jax.interop.load import WEIGHTS, save_dit
from squeeze_jax.interop.mapping import parameters_by_path
from squeeze_jax.interop.tensors import TensorFolder, write_tensors
from squeeze_jax.sharding import make_mesh, parameter_spec


def raw(path, header, data=b""):
    """A safetensors file by hand."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def sharded(folder, **shards):
    """Shards with an index: name → tensors."""
    weight_map = {}
    for shard, tensors in shards.items():
        save_file(tensors, folder / f"{shard}.safetensors")
        weight_map |= dict.fromkeys(tensors, f"{shard}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def test_bfloat16_keeps_its_bits_and_its_name(tmp_path):
    bits = np.arange(65536, dtype=np.uint16)
    write_tensors(tmp_path / "x.safetensors", {"a": bits.view(ml_dtypes.bfloat16)})
    head = (tmp_path / "x.safetensors").read_bytes()[8:200]
    assert b'"BF16"' in head
    np.testing.assert_array_equal(TensorFolder(tmp_path).read("a").view(np.uint16), bits)
    part = TensorFolder(tmp_path).read("a", (slice(3, 9),))
    np.testing.assert_array_equal(part.view(np.uint16), bits[3:9])


def test_the_index_is_the_authority(tmp_path):
    sharded(tmp_path, one={"a": np.ones(2)}, two={"b": np.zeros((3, 4))})
    save_file({"a": np.full(2, 7.0), "c": np.ones(1)}, tmp_path / "stray.safetensors")
    folder = TensorFolder(tmp_path)
    assert sorted(folder.names()) == ["a", "b"]
    assert folder.shape("b") == (3, 4)
    np.testing.assert_array_equal(folder.read("a"), [1, 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.update(b="two.safetensors.part"), "the shard two.safetensors.part is missing"),
        (lambda w: w.update(c="one.safetensors"), r"one\.safetensors: lacks c, which .* says it holds"),
        (lambda w: w.update(b="../two.safetensors"), "points to '../two.safetensors', out of the folder"),
        (lambda w: w.update(b="/etc/passwd"), "out of the folder"),
        (lambda w: w.update(b=".."), "out of the folder"),
        (lambda w: w.update(b=3), "not an index of shards"),
    ],
)
def test_an_index_that_is_wrong_is_refused(tmp_path, change, message):
    weight_map = sharded(tmp_path, one={"a": np.ones(2)}, two={"b": np.zeros(3)})
    change(weight_map)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError, match=message):
        TensorFolder(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": {}}', "{"])
def test_an_index_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InputError, match=r"index\.json"):
        TensorFolder(tmp_path)


GOOD = entry("F32", [2], 0, 8)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": GOOD}, b"\0" * 4, "not a whole safetensors file"),
        ({"a": entry("F32", [3], 0, 8)}, b"\0" * 8, "not a whole safetensors file"),
        (b'{"a": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}, "a": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
         b"\0" * 8, "a name stands twice"),
        ({"__metadata__": {"format": "pt"}}, b"", "no tensor in it"),
        (b"[" * 100_000, b"", "not a whole safetensors file"),
        (b'{"a": ' + b"9" * 5000 + b"}", b"", "not a whole safetensors file"),
        (b"\xff\xfe", b"", "not a whole safetensors file"),
    ],
)  # fmt: skip
def test_a_file_that_is_broken_says_so(tmp_path, header, data, message):
    raw(tmp_path / "x.safetensors", header, data)
    with pytest.raises(InputError, match=message):
        TensorFolder(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (struct.pack("<Q", 1 << 62) + b"{}", "its header does not end"),
        (b"", "its header does not end"),
        (b"<html>", "its header does not end"),
        (b"PK\x03\x04" + bytes(60), "a pickle .PyTorch., which is not read"),
        (b"GGUF" + bytes(60), "a GGUF file, which is not read"),
    ],
)
def test_what_is_no_safetensors_file_says_so(tmp_path, content, message):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=message) as refused:
        TensorFolder(tmp_path)
    assert str(refused.value).count("x.safetensors") == 1, "said once"


def test_a_good_file_may_begin_as_a_pickle_does(tmp_path):
    """A header of 640 bytes is written as 80 02 00 …"""
    path, values = tmp_path / "x.safetensors", np.arange(3.0)
    for padding in range(700):
        save_file({"a": values}, path, metadata={"m": "x" * padding})
        if path.read_bytes().startswith(b"\x80\x02"):
            break
    assert path.read_bytes().startswith(b"\x80\x02")
    assert np.array_equal(TensorFolder(path).read("a"), values)


def test_an_empty_tensor_loads(tmp_path):
    save_file({"a": np.zeros((0, 3), np.float32), "b": np.ones(1)}, tmp_path / "x.safetensors")
    assert TensorFolder(tmp_path).read("a").shape == (0, 3)


def test_links_out_of_the_folder_are_refused_and_those_of_a_download_cache_are_not(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    save_file({"a": np.ones(1)}, tmp_path / "elsewhere" / "x.safetensors")
    folder = tmp_path / "repo" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (folder / "x.safetensors").symlink_to(tmp_path / "elsewhere" / "x.safetensors")
    with pytest.raises(InputError, match="a link out of the folder"):
        TensorFolder(folder)
    blobs = tmp_path / "repo" / "blobs"
    blobs.mkdir()
    (tmp_path / "elsewhere" / "x.safetensors").rename(blobs / "0123")
    (folder / "x.safetensors").unlink()
    (folder / "x.safetensors").symlink_to("../../blobs/0123")
    assert TensorFolder(folder).names() == ["a"]
    part = folder / "transformer"  # one of a repository's folders
    part.mkdir()
    (part / "y.safetensors").symlink_to("../../../blobs/0123")
    assert TensorFolder(part).names() == ["a"]


def test_names_that_no_file_has_and_folders_in_a_files_place(tmp_path):
    sharded(tmp_path, one={"a": np.ones(2)}, two={"b": np.zeros(3)})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "x" * 300}}))
    with pytest.raises(InputError, match=r"the shard x{80} is missing"):
        TensorFolder(tmp_path)
    index.write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"index\.json: not JSON"):
        TensorFolder(tmp_path)
    (tmp_path / "model.fp16.safetensors.index.json").write_text("{}")
    with pytest.raises(InputError, match="2 indexes of shards"):
        TensorFolder(tmp_path)
    other = tmp_path / "other"
    (other / "x.safetensors").mkdir(parents=True)
    with pytest.raises(InputError, match=r"x\.safetensors: cannot be read"):
        TensorFolder(other)


def test_types_that_numpy_has_not_are_refused(tmp_path):
    raw(tmp_path / "x.safetensors", {"a": entry("F4", [2], 0, 1)}, b"\0")
    with pytest.raises(InputError, match=r"a is of type F4|not a whole safetensors file"):
        TensorFolder(tmp_path)


@pytest.mark.parametrize("shape", [(2,), (2, 3), (1, 6), (0,), (2, 2)])
def test_scales_of_no_meaning_are_refused(tmp_path, shape):
    scale = np.ones(shape, np.float32)
    raw(
        tmp_path / "x.safetensors",
        {"l.weight": entry("F8_E4M3", [4, 6], 0, 24), "l.scale_weight": entry("F32", list(shape), 24, 24 + scale.nbytes)},
        b"\0" * 24 + scale.tobytes(),
    )
    with pytest.raises(InputError, match=r"l\.scale_weight has shape .*one scale, or one a row"):
        TensorFolder(tmp_path)


@pytest.mark.parametrize("spelling", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("shape", [(), (1,), (4,)])
def test_float8_is_read_with_its_scale(tmp_path, spelling, shape):
    rng = np.random.default_rng(0)
    stored = rng.standard_normal((4, 6)).astype(ml_dtypes.float8_e4m3fn)
    scale = rng.uniform(1, 3, shape).astype(np.float32)
    file = raw(
        tmp_path / "x.safetensors",
        {
            "l.weight": entry("F8_E4M3", [4, 6], 0, 24),
            f"l.{spelling}": entry("F32", list(shape), 24, 24 + scale.nbytes),
            "scaled_fp8": entry("F32", [], 24 + scale.nbytes, 28 + scale.nbytes),
        },
        stored.tobytes() + scale.tobytes() + b"\0" * 4,
    )
    folder = TensorFolder(file)
    assert folder.names() == ["l.weight"]
    wanted = stored.astype(np.float32) * (scale[:, None] if shape == (4,) else scale)
    np.testing.assert_allclose(folder.read("l.weight").astype(np.float32), wanted, rtol=1 / 256)
    part = folder.read("l.weight", (slice(1, 3), slice(2, 5)))
    np.testing.assert_allclose(part.astype(np.float32), wanted[1:3, 2:5], rtol=1 / 256)


def test_scaled_float8_without_its_scale_is_refused(tmp_path):
    raw(
        tmp_path / "x.safetensors",
        {"l.weight": entry("F8_E4M3", [2], 0, 2), "scaled_fp8": entry("F32", [], 2, 6)},
        b"\0" * 6,
    )
    with pytest.raises(InputError, match=r"l\.weight is float8 and has no scale"):
        TensorFolder(tmp_path)


def test_every_process_reads_its_part_onto_its_devices(tmp_path):
    dit = random_dit()
    save_dit(tmp_path, dit, jnp.float32)
    mesh = make_mesh(1, 8, 1)
    loaded = load_dit(tmp_path, jnp.float32, mesh=mesh)
    wanted = parameters_by_path(dit)
    for path, leaf in parameters_by_path(loaded).items():
        array = leaf[...]
        assert array.sharding.spec == parameter_spec(path, array.shape, mesh), path
        np.testing.assert_array_equal(array, wanted[path][...], err_msg=path)
    split = parameters_by_path(loaded)["double_blocks.img_attn.qkv.kernel"][...]
    assert {shard.data.size * 8 for shard in split.addressable_shards} == {split.size}


def test_a_device_reads_nothing_but_its_slice(tmp_path, monkeypatch):
    save_dit(tmp_path, random_dit(), jnp.float32)
    count, read = {}, TensorFolder.read

    def counted(self, name, index=()):
        part = read(self, name, index)
        count[name] = count.get(name, 0) + part.size
        return part

    monkeypatch.setattr(TensorFolder, "read", counted)
    mesh = make_mesh(1, 8, 1)
    load_dit(tmp_path, jnp.float32, mesh=mesh)
    sizes = {name: tensor.size for name, tensor in load_file(tmp_path / WEIGHTS).items()}
    for name in ("transformer_blocks.1.attn.to_k.weight", "single_transformer_blocks.0.proj_mlp.weight"):
        assert count[name] == sizes[name], name  # eight devices, an eighth each


def test_parts_read_are_the_parts_of_the_whole(tmp_path):
    """Of fused, transposed and swapped tensors, each cut on both axes."""
    dit = random_dit()
    save_dit(tmp_path, dit, jnp.float32)
    mesh = make_mesh(1, 4, 2)
    loaded = load_dit(tmp_path, jnp.float32, mesh=mesh)
    wanted = parameters_by_path(dit)
    for path, leaf in parameters_by_path(loaded).items():
        np.testing.assert_array_equal(leaf[...], wanted[path][...], err_msg=path)
    assert CONFIG.width % 4 == 0


def test_a_misshapen_tensor_is_named_before_anything_is_read(tmp_path, monkeypatch):
    save_dit(tmp_path, random_dit(), jnp.float32)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["x_embedder.weight"] = np.ones((4, 4), np.float32)
    save_file(tensors, tmp_path / WEIGHTS)
    monkeypatch.setattr(TensorFolder, "read", lambda *a: pytest.fail("read"))
    with pytest.raises(InputError, match=r"x_embedder\.weight gives \(4, 4\), the model wants \(64, 72\)"):
        load_dit(tmp_path)

