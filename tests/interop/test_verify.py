"""`verify`: good checkpoints of every layout pass against PyTorch, broken ones say what is
wrong."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from small_dit import CONFIG, random_dit
from small_flux2 import random_flux2
from small_internvl import INTERNVL, ORIGINAL_CONFIG, random_internvl, randomly

from squeeze_jax.commands import verify as verify_command
from squeeze_jax.errors import InputError
from squeeze_jax.interop import autoencoder as autoencoder_format
from squeeze_jax.interop import flux as flux_format
from squeeze_jax.interop import flux2_autoencoder
from squeeze_jax.interop import internvl as internvl_format
from squeeze_jax.interop import verify as verifier
from squeeze_jax.interop.flux2 import FLUX2
from squeeze_jax.interop.mapping import export_entries
from squeeze_jax.interop.verify import detect, verify
from squeeze_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from squeeze_jax.models.flux2 import Flux2Config
from squeeze_jax.models.flux2_autoencoder import Flux2Autoencoder, Flux2AutoencoderConfig

DIT = dataclasses.replace(CONFIG, heads=2, head_width=32, rope_axes=(4, 14, 14))
DIT2 = Flux2Config(
    in_channels=16,
    context_width=24,
    heads=2,
    head_width=32,
    num_double_blocks=2,
    num_single_blocks=3,
    rope_axes=(8, 8, 8, 8),
)
SMALL2 = Flux2AutoencoderConfig(block_out_channels=(8, 16), norm_groups=4, latent_channels=4)
SMALL = AutoencoderConfig(block_out_channels=(8, 16), norm_groups=4, latent_channels=4)


def write(folder, layout, change=lambda tensors: None):
    """A checkpoint folder; `change` edits its tensors first."""
    folder.mkdir(exist_ok=True)
    if layout.startswith("flux2"):
        dit, config = random_flux2(DIT2), FLUX2.config_to_json(DIT2)
        tensors = export_entries(dit, FLUX2.entries[layout.split("-")[1]](DIT2))
    elif layout == "autoencoder-flux2":
        module = randomly(lambda: Flux2Autoencoder(SMALL2, rngs=nnx.Rngs(0)))
        module.bn.running_var.set_value(jnp.abs(module.bn.running_var[...]) + 0.5)
        config = flux2_autoencoder.config_to_json(SMALL2)
        tensors = flux2_autoencoder.export_autoencoder(module)
    elif layout.startswith("flux"):
        dit, config = random_dit(DIT), flux_format.config_to_json(DIT)
        table = (
            flux_format.original_entries
            if layout == "flux-original"
            else flux_format.diffusers_entries
        )
        tensors = export_entries(dit, table(DIT))
    elif layout.startswith("autoencoder"):
        module, config = (
            randomly(lambda: Autoencoder(SMALL, rngs=nnx.Rngs(0))),
            autoencoder_format.config_to_json(SMALL),
        )
        original = layout == "autoencoder-original"
        tensors = export_entries(
            module,
            (autoencoder_format.original_entries if original else autoencoder_format.entries)(
                SMALL
            ),
        )
    else:
        original = layout == "internvl-original"
        config = ORIGINAL_CONFIG if original else internvl_format.config_to_json(INTERNVL)
        table = internvl_format.original_entries if original else internvl_format.entries
        tensors = export_entries(random_internvl(), table(INTERNVL))
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    if layout not in ("flux-original", "flux2-original"):
        (folder / "config.json").write_text(json.dumps(config))
    return folder


LAYOUTS = [
    "flux-diffusers", "flux-original", "autoencoder-diffusers", "autoencoder-original",
    "internvl", "internvl-original", "flux2-diffusers", "flux2-original", "autoencoder-flux2",
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_good_checkpoint_passes(tmp_path, layout):
    pytest.importorskip("torch", reason="PyTorch is not installed: parity tests are skipped")
    report = verify(write(tmp_path / "x", layout))
    assert report.kind == layout.split("-")[0]
    assert report.passed, report.rows
    assert len(report.rows) == {"flux": 3, "flux2": 3, "autoencoder": 2, "internvl": 3}[report.kind]
    assert all(row.error is not None and row.error > 0 for row in report.rows)
    assert json.loads(json.dumps(report.to_json()))["passed"] is True


def put(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


def test_weights_that_are_not_finite_fail_with_and_without_pytorch(tmp_path, monkeypatch):
    monkeypatch.setattr(verifier, "_has", lambda *modules: False)
    spoil = put("single_transformer_blocks.1.proj_out.bias", np.full(DIT.width, np.nan, np.float32))
    report = verify(write(tmp_path / "x", "flux-diffusers", spoil))
    assert [row.passed for row in report.rows] == [True, False, True]
    assert not report.passed


def test_a_wrong_computation_fails(tmp_path, monkeypatch):
    """The check can fail: here our context projection forgets its bias."""
    pytest.importorskip("torch", reason="PyTorch is not installed: parity tests are skipped")
    folder, loaded = write(tmp_path / "x", "flux-diffusers"), verifier._loaded

    def forgetful(*args):
        dit = loaded(*args)
        dit.txt_in.bias.set_value(jnp.zeros_like(dit.txt_in.bias[...]))
        return dit

    monkeypatch.setattr(verifier, "_loaded", forgetful)
    report = verify(folder)
    assert not report.passed
    assert all(row.error > 1e-3 for row in report.rows)


@pytest.mark.telling
@pytest.mark.slow
def test_without_pytorch_there_are_digests(tmp_path, monkeypatch):
    monkeypatch.setattr(verifier, "_has", lambda *modules: False)
    folder = write(tmp_path / "x", "flux-diffusers")
    one, two = verify(folder), verify(folder)
    assert one.rows == two.rows
    assert one.passed
    assert all(row.error is None and len(row.digest) == 4 for row in one.rows)

    def nudge(tensors):
        tensors["transformer_blocks.1.attn.to_q.weight"][0, 0] += 1.0

    other = verify(write(tmp_path / "y", "flux-diffusers", nudge))
    assert one.rows[0] == other.rows[0]
    assert one.rows[1].digest != other.rows[1].digest


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("flux-diffusers", lambda t: t.pop("proj_out.bias"), r"missing: proj_out\.bias"),
        (
            "flux-diffusers",
            lambda t: t.update(proj_ot=t.pop("proj_out.bias")),
            r"proj_out\.bias \(nearest: proj_ot\)",
        ),
        ("flux-original", put("extra", np.ones(1)), "unexpected: extra"),
        (
            "autoencoder-diffusers",
            put("encoder.conv_in.bias", np.ones(3)),
            r"shape: encoder\.conv_in\.bias",
        ),
        (
            "internvl",
            put("multi_modal_projector.linear_1.bias", np.ones(48, int)),
            r"dtype: .*linear_1\.bias is int64",
        ),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_computed(tmp_path, layout, change, message):
    report = verify(write(tmp_path / "x", layout, change))
    assert not report.passed
    assert not report.rows
    assert re.search(message, "\n".join(report.problems)), report.problems


def sharded(folder, change=lambda weight_map: None):
    """The one file in two shards with an index; `change` edits the index."""
    whole = folder / "model.safetensors"
    tensors, weight_map = load_file(whole), {}
    for number, names in enumerate(np.array_split(sorted(tensors), 2), 1):
        shard = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, folder / shard)
        weight_map |= dict.fromkeys(map(str, names), shard)
    whole.unlink()
    change(weight_map)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def rewritten(change):
    """Edits the file's tensors."""

    def apply(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def truncated(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def linked(folder):
    outside = folder.parent / "outside"
    outside.mkdir()
    (folder / "model.safetensors").rename(outside / "model.safetensors")
    (folder / "model.safetensors").symlink_to(outside / "model.safetensors")


def float8(folder, scales=True):
    """Matrices as float8 with a scale each, as quantised checkpoints are published."""

    def quantise(tensors):
        for name in [name for name, tensor in tensors.items() if tensor.ndim == 2]:
            scale = np.array(np.abs(tensors[name]).max() / 448, np.float32)
            tensors[name] = (tensors[name] / scale).astype(ml_dtypes.float8_e4m3fn)
            if scales or "linear1" not in name:
                tensors[name.removesuffix("weight") + "scale_weight"] = scale

    rewritten(quantise)(folder)


def without_scales(folder):
    float8(folder, scales=False)


ANY = "model.safetensors"
FIRST = {
    "flux-diffusers": "context_embedder.bias",
    "flux-original": "double_blocks.0.img_attn.norm.key_norm.scale",
    "autoencoder-diffusers": "decoder.conv_in.bias",
    "autoencoder-original": "decoder.conv_in.bias",
    "flux2-diffusers": "context_embedder.weight",
    "flux2-original": "double_blocks.0.img_attn.norm.key_norm.scale",
    "autoencoder-flux2": "bn.running_mean",
    "internvl": "language_model.lm_head.weight",
    "internvl-original": "language_model.lm_head.weight",
}
"""A tensor of each layout that stands in the first of two shards."""
BROKEN = {
    "a missing shard": (
        lambda folder: (sharded(folder), (folder / "model-00002-of-00002.safetensors").unlink()),
        r"the shard model-00002-of-00002\.safetensors is missing",
    ),
    "a name absent from its shard": (
        lambda folder: sharded(
            folder, lambda w: w.update({"one.more": "model-00001-of-00002.safetensors"})
        ),
        r"model-00001-of-00002\.safetensors: lacks one\.more",
    ),
    "an index that leads out": (
        lambda folder: sharded(folder, lambda w: w.update({"one.more": "../x.safetensors"})),
        "points to '../x.safetensors', out of the folder",
    ),
    "a truncated file": (truncated, f"{ANY}: not a whole safetensors file"),
    "a download pointer": (
        lambda folder: (folder / ANY).write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
        ),
        "a download pointer",
    ),
    "a pickle": (pickled, r"pytorch_model\.bin is a pickle, which is never read"),
    "a link that leads out": (linked, "a link out of the folder"),
}
DIFFERENT = {
    "a tensor missing": (lambda name: lambda tensors: tensors.pop(name), "missing: {}"),
    "a tensor too many": (lambda name: put("extra", np.ones(1, np.float32)), "unexpected: extra"),
    "another shape": (lambda name: lambda t: t.update({name: t[name][1:]}), "shape: .*{}"),
    "another type": (
        lambda name: lambda t: t.update({name: t[name].astype(np.int32)}),
        "dtype: {} is int32",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_broken_folder_has_its_own_sentence(tmp_path, layout, monkeypatch):
    monkeypatch.setattr(
        verifier, "_has", lambda *modules: pytest.fail("numbers of a broken folder were compared")
    )
    name, kind, said = FIRST[layout], layout.split("-")[0], []
    good = write(tmp_path / "good", layout)
    for number, (spoil, message) in enumerate(BROKEN.values()):
        folder = shutil.copytree(good, tmp_path / str(number) / "x")
        spoil(folder)
        with pytest.raises(InputError, match=message) as refusal:
            verify(folder, kind)
        said.append(str(refusal.value))
    for number, (change, message) in enumerate(DIFFERENT.values(), len(BROKEN)):
        folder = shutil.copytree(good, tmp_path / str(number))
        rewritten(change(name))(folder)
        report = verify(folder, kind)
        assert not report.passed
        found = "\n".join(report.problems)
        assert re.search(message.format(re.escape(name)), found), found
        said.append(found)
    assert len(set(said)) == len(said)


@pytest.mark.parametrize("layout", ["flux-diffusers", "internvl-original"])
def test_shards_with_a_stray_file_beside_them_pass(tmp_path, layout):
    pytest.importorskip("torch", reason="PyTorch is not installed: parity tests are skipped")
    folder = write(tmp_path / "x", layout)
    sharded(folder)
    save_file({"stray": np.ones(1)}, folder / "stray.safetensors")
    with pytest.warns(match=r"stray\.safetensors is not read beside"):
        assert verify(folder).passed


@pytest.mark.parametrize("layout", ["flux-original", "flux2-original"])
def test_float8_with_scales_passes_and_without_is_refused(tmp_path, layout):
    pytest.importorskip("torch", reason="PyTorch is not installed: parity tests are skipped")
    folder = write(tmp_path / "x", layout)
    float8(folder)
    report = verify(folder)
    assert report.passed, report
    folder = write(tmp_path / "y", layout)
    without_scales(folder)
    with pytest.raises(
        InputError, match=r"single_blocks\.0\.linear1\.weight is float8 and has no scale beside it"
    ):
        verify(folder)


@pytest.mark.slow
def test_half_precision_files_pass(tmp_path):
    pytest.importorskip("torch", reason="PyTorch is not installed: parity tests are skipped")
    folder = write(tmp_path / "x", "flux-diffusers")
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {k: v.astype(ml_dtypes.bfloat16) for k, v in tensors.items()}, folder / "model.safetensors"
    )
    assert verify(folder).passed


def test_what_a_folder_holds_is_found_out(tmp_path):
    save_file({"x": np.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="say which with --kind"):
        detect(tmp_path)


def test_the_command_prints_a_table_and_fails_with_one_sentence(tmp_path):
    good, bad = (
        write(tmp_path / "good", "autoencoder-original"),
        write(tmp_path / "bad", "autoencoder-diffusers", lambda t: t.pop("encoder.conv_in.bias")),
    )
    run = [sys.executable, "-m", "squeeze_jax", "verify"]
    done = subprocess.run(
        [*run, good, "--json", tmp_path / "r.json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "passed" in done.stdout
    assert json.loads((tmp_path / "r.json").read_text())["kind"] == "autoencoder"
    done = subprocess.run(
        [*run, bad, "--json", tmp_path / "b.json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error:")
    assert "encoder.conv_in.bias" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_command_reads_the_variant_that_it_is_told(tmp_path, monkeypatch, capsys):
    """The standard file is whole; that of the variant lacks a tensor."""
    monkeypatch.chdir(tmp_path)
    folder = write(tmp_path / "x", "autoencoder-diffusers")
    tensors = load_file(folder / "model.safetensors")
    del tensors["decoder.conv_in.bias"]
    save_file(tensors, folder / "model.fp16.safetensors")
    assert verify_command.main([str(folder), "--variant", "fp16"]) == 2
    assert "missing: decoder.conv_in.bias" in capsys.readouterr().err
    assert verify_command.main([str(folder), "--variant", "fp8"]) == 2
    assert "no variant 'fp8' in it; it has: fp16" in capsys.readouterr().err
