"""Thousands of spoilt files: each ends in a clean sentence or loads, never in a traceback, a hang or a flood of memory."""

import importlib.util
import json
import struct
import time
import tracemalloc
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
from PIL import Image
from safetensors.numpy import save

from squeeze_jax.data.manifest import read_manifest
from squeeze_jax.errors import InputError
from squeeze_jax.interop.lora import load_lora
from squeeze_jax.interop.tensors import TensorFolder
from squeeze_jax.layers.lora import remove_lora

from small_dit import CONFIG, random_dit  # isort: skip

TOKENS = [
    b'"', b"{", b"}", b"[", b"]", b",", b":", b"0", b"-1", b"1e999", b"99999999999999999999", b"null", b"true", b"NaN",
    b'"F32"', b'"F8_E4M3"', b'"I4"', b'"a"', b"\xff", b"\0", b"\\u0000", b"\\ud800", b"../", b"/etc/passwd", b"weight_map",
    b"__metadata__", b"data_offsets", b"shape", b" " * 50, b"[" * 3000, b"9" * 5000, b'{"a":' * 2000,
]  # fmt: skip


def spoiling():
    """The edits of `benchmarks/fuzz.py`, as a module."""
    path = Path(__file__).parents[2] / "benchmarks" / "spoiling.py"
    spec = importlib.util.spec_from_file_location("spoiling", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


mutated = partial(spoiling().mutated, tokens=TOKENS)


def outcome(load) -> str:
    """How a load ended. Anything but InputError goes through."""
    try:
        load()
    except InputError:
        return "refused"
    return "loaded"


def read_all(path):
    folder = TensorFolder(path)
    for name in folder.names():
        assert folder.read(name).shape == folder.shape(name)
        assert folder.read(name).dtype == folder.dtype(name)


def test_two_thousand_spoilt_checkpoints_and_manifests(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b.weight": np.ones(4, ml_dtypes.bfloat16)}
    tensors |= {"q.weight": np.ones((2, 3), ml_dtypes.float8_e4m3fn), "q.scale_weight": np.ones((2, 1), np.float32)}
    whole = save(tensors, {"format": "pt"})
    (header,) = struct.unpack("<Q", whole[:8])
    text, data = whole[8 : 8 + header], whole[8 + header :]
    index = json.dumps({"metadata": {"total_size": 32}, "weight_map": dict.fromkeys(tensors, "x.safetensors")})
    Image.new("RGB", (16, 16)).save(tmp_path / "p.png")
    manifest = json.dumps([{"prompt": "a cat", "image_paths": ["p.png"], "image_tgt_path": "p.png"}] * 2)
    counts: dict[str, int] = {}
    tracemalloc.start()
    for i in range(2_400):
        began = time.monotonic()
        kind = ("header", "length", "index", "manifest")[i % 4]
        if kind == "manifest":
            path = tmp_path / f"{i}.json"
            path.write_bytes(mutated(manifest.encode(), rng))
            ended = outcome(lambda path=path: read_manifest(path, need_targets=True))
            path.unlink()
        else:
            folder = tmp_path / str(i)
            folder.mkdir()
            file = folder / "x.safetensors"
            if kind == "header":
                spoilt = mutated(text, rng)
                file.write_bytes(struct.pack("<Q", len(spoilt)) + spoilt + data)
            elif kind == "length":
                file.write_bytes(mutated(whole, rng))
            else:
                file.write_bytes(whole)
                (folder / "model.safetensors.index.json").write_bytes(mutated(index.encode(), rng))
            ended = outcome(lambda folder=folder: read_all(folder))
        counts[f"{kind} {ended}"] = counts.get(f"{kind} {ended}", 0) + 1
        assert time.monotonic() - began < 5
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()
    assert all(counts[f"{kind} refused"] > 100 for kind in ("header", "length", "index", "manifest")), counts
    assert all(counts[f"{kind} loaded"] >= 3 for kind in ("header", "length", "index", "manifest")), counts


def test_spoilt_lora_files_attach_nothing(tmp_path):
    rng, dit = np.random.default_rng(1), random_dit()
    key = "transformer.transformer_blocks.0.attn.to_v"
    pair = {f"{key}.lora_A.weight": np.ones((2, CONFIG.width), np.float32)}
    pair[f"{key}.lora_B.weight"] = np.ones((CONFIG.width, 2), np.float32)
    whole = save(pair, {"lora_adapter_metadata": json.dumps({"transformer.r": 2, "transformer.lora_alpha": 2})})
    (header,) = struct.unpack("<Q", whole[:8])
    text, data = whole[8 : 8 + header], whole[8 + header :]
    refused = 0
    for i in range(400):
        spoilt = mutated(text, rng)
        file = tmp_path / f"{i}.safetensors"
        file.write_bytes(struct.pack("<Q", len(spoilt)) + spoilt + data)
        if outcome(partial(load_lora, dit, file)) == "loaded":
            remove_lora(dit)
        else:
            refused += 1
            assert dit.double_blocks.img_attn.qkv.adapter is None
    assert refused > 100
