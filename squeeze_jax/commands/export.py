"""`export`: a trained system as a folder that PyTorch's users load, with a certificate that it
draws the same."""

import sys
import time
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from etils import epath

from squeeze_jax.commands.parallel import Parallel
from squeeze_jax.commands.run import guarded, setup

if TYPE_CHECKING:
    from squeeze_jax.config import Config

NEEDED = ("torch", "diffusers", "transformers", "peft")
"""What the certificate runs; without one of them it is skipped."""


@dataclass(frozen=True)
class Export:
    """Writes LoRA (or transformer), aggregator, a diffusers pipeline, model card and certificate,
    ready to upload."""

    checkpoint: Annotated[epath.Path, tyro.conf.Positional]
    """Work folder (also gs://bucket/…), weights or exported folder; `demo` and
    `emoji` are the shipped miniatures."""
    out: Path
    """Folder to write; it must not exist."""
    lora_format: Literal["diffusers", "comfyui", "kohya", "ai_toolkit"] = "diffusers"
    """A second LoRA file in this dialect, in a folder of its name; diffusers' is written always."""
    merge: bool = False
    """Also the whole transformer with the LoRA merged in, in shards."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the numbers in the files; float32 loses nothing, bfloat16 is half as large."""
    check: bool = True
    """Runs both sides on the same noise and conditions and writes parity.json, if PyTorch is
    installed."""
    parallel: Parallel = field(default_factory=Parallel)


def main(arguments: list[str] | None = None) -> int:
    given = tyro.cli(
        Export, args=sys.argv[1:] if arguments is None else arguments, prog="squeeze_jax export"
    )
    return guarded(lambda: run(given))


def run(given: Export) -> None:
    setup()
    import jax

    from squeeze_jax.checkpoints.build import DTYPES
    from squeeze_jax.checkpoints.manager import read_config
    from squeeze_jax.checkpoints.trained import load_trained
    from squeeze_jax.errors import InputError
    from squeeze_jax.export.card import write_card
    from squeeze_jax.export.folder import digests, size_of, whole_folder
    from squeeze_jax.interop.exported import write_exported
    from squeeze_jax.interop.load import checkpoint_folder
    from squeeze_jax.interop.tensors import write_json

    started = time.perf_counter()
    checkpoint = checkpoint_folder(given.checkpoint)
    # Everything that the user may have got wrong is looked at before anything is loaded.
    if given.out.exists():
        raise InputError(f"--out {given.out} exists; give another folder or remove it")
    config = read_config(checkpoint)
    check_exportable(config, given)
    missing = [name for name in NEEDED if find_spec(name) is None]
    if given.check and missing:
        print(f"{', '.join(missing)} not installed: the check is skipped, and the card says so")
    # Products in float32, whatever the run computed in: differences are then the two programs',
    # not the rounding's.
    with jax.default_matmul_precision("highest"), whole_folder(given.out) as folder:
        mesh = given.parallel.mesh(checkpoint, 1)
        trained = load_trained(checkpoint, exact, merged=False, mesh=mesh)
        base = (
            trained.base if config.model.frozen_dtype != "int8" else None
        )  # it is that of the rounded base
        about = {"base": base, "dtype": given.dtype, "step": trained.step}
        write_exported(
            folder, trained.system, config, about, DTYPES[given.dtype], merge=given.merge,
            dialect=None if given.lora_format == "diffusers" else given.lora_format,
        )  # fmt: skip
        scores = checkpoint / "scores.json"
        if scores.is_file():
            (folder / "scores.json").write_bytes(scores.read_bytes())
        report: dict[str, Any] | None = None
        if given.check and not missing:
            from squeeze_jax.export.certificate import certificate

            report = certificate(folder, trained, mesh, progress=print)
        write_card(folder, config, about, report)
        if report is not None:
            write_json(folder / "parity.json", {**report, "files": digests(folder)})
    print(
        f"exported: {given.out} ({size_of(given.out) / 1e6:,.1f} MB) "
        f"in {time.perf_counter() - started:.0f} s"
    )
    print(f"how to use it: {given.out / 'README.md'}")


def check_exportable(config: "Config", given: Export) -> None:
    """Raises InputError for what the exported pipeline could not run."""
    from squeeze_jax.errors import InputError
    from squeeze_jax.interop.load import check_autoencoder, encoder_configs

    if config.model.mllm_source != "internvl":
        raise InputError(
            f"{given.checkpoint} reads with another MLLM "
            f"(model.mllm_source {config.model.mllm_source}); "
            "the exported pipeline knows InternVL3 only"
        )
    if config.model.dit.reference_attention == "cached":
        raise InputError(
            f"{given.checkpoint} has learned cached reference attention; "
            "the exported pipeline knows joint attention only"
        )
    autoencoder, _ = encoder_configs(config)
    check_autoencoder(config.model.autoencoder, autoencoder, config.model.dit)
    if config.lora is None and given.lora_format != "diffusers":
        raise InputError(
            f"{given.checkpoint} has no LoRA, its transformer was trained whole; "
            "leave --lora-format out"
        )
    if config.lora is not None and config.model.dit_weights is None and not given.merge:
        raise InputError(
            f"{given.checkpoint}: its LoRA lies on random weights of the config's seed, "
            "which nobody else has; give --merge"
        )
    if config.model.frozen_dtype == "int8" and given.merge:
        print("the base is kept in int8; --merge takes it in bfloat16, as it was published")


def exact(config: "Config") -> "Config":
    """The config computed in float32, on a base that is not rounded to int8."""
    frozen = "bfloat16" if config.model.frozen_dtype == "int8" else config.model.frozen_dtype
    return replace(config, model=replace(config.model, dtype="float32", frozen_dtype=frozen))
