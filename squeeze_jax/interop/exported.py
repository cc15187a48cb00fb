"""Exported folders, what PyTorch's users get.

They are written from a trained system, and read back as its trained leaves.

    config.json                       the training run's config
    export.json                       which base it belongs to (fingerprint), the step, the type of
                                      its numbers
    aggregator/                       config.json, model.safetensors
    pytorch_lora_weights.safetensors  the LoRA in diffusers' spelling (a transformer trained whole
                                      has none)
    transformer/                      diffusers' folder with everything merged, where asked for or
                                      trained whole
    vae/  mllm/                       the miniature's, where the config uses these
    squeeze_aggregator.py  squeeze_pipeline.py  (squeeze_flux2.py)
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Sharding

from squeeze_jax.array_types import DType
from squeeze_jax.config import Config
from squeeze_jax.config_json import to_json
from squeeze_jax.errors import InputError
from squeeze_jax.interop import aggregator as aggregator_format
from squeeze_jax.interop.adapters import adapter_leaves
from squeeze_jax.interop.formats import format_of
from squeeze_jax.interop.load import SHIPPED, check_transformer, dit_source
from squeeze_jax.interop.lora import save_lora
from squeeze_jax.interop.lora_dialects import DialectName
from squeeze_jax.interop.mapping import (
    MappingError,
    export_entries,
    load_entries,
    parameters_by_path,
)
from squeeze_jax.interop.merged import save_merged
from squeeze_jax.interop.tensors import TensorFolder, read_json, write_json, write_tensors
from squeeze_jax.layers.lora import add_lora
from squeeze_jax.models.aggregator import Aggregator
from squeeze_jax.models.backbone import Backbone, BackboneConfig
from squeeze_jax.models.system import System
from squeeze_jax.storage import AnyPath

ABOUT, LORA = "export.json", "pytorch_lora_weights.safetensors"
AGGREGATOR, TRANSFORMER = "aggregator", "transformer"
TORCH_FILES = Path(__file__).with_name("torch_files")
ENCODERS = {"vae": "autoencoder", "mllm": "mllm"}
"""A folder of an export → the field of `model` and the folder of the miniature that it is copied
from."""


class TorchCode(NamedTuple):
    """What draws with a family of transformers in PyTorch."""

    pipeline: str
    """The class to load."""
    modules: tuple[str, ...]
    """The modules that a folder holds; the first one has the class."""


TORCH_CODE = {
    "FluxTransformer2DModel": TorchCode(
        "SqueezePipeline", ("squeeze_pipeline", "squeeze_aggregator")
    ),
    "Flux2Transformer2DModel": TorchCode(
        "SqueezeFlux2Pipeline", ("squeeze_flux2", "squeeze_pipeline", "squeeze_aggregator")
    ),
}
"""diffusers' class of a transformer → its code."""

Place = Callable[[str, tuple[int, ...]], Sharding]


def torch_code(config: BackboneConfig) -> TorchCode:
    """Returns the PyTorch code for a transformer's config."""
    return TORCH_CODE[format_of(config).class_name]


def write_exported(
    folder: Path, system: System, config: Config, about: dict[str, Any], dtype: DType, *,
    merge: bool, dialect: DialectName | None = None,
) -> None:  # fmt: skip
    """Writes everything but the card and the certificate.

    `dialect`: one more LoRA file, in a folder of its name.
    """
    dit = system.dit
    aggregator = export_entries(system.aggregator, aggregator_format.entries(config.aggregator))
    aggregator = {name: tensor.astype(np.dtype(dtype)) for name, tensor in aggregator.items()}
    write_tensors(folder / AGGREGATOR / "model.safetensors", aggregator)
    about_aggregator = aggregator_format.config_to_json(config.aggregator)
    write_json(folder / AGGREGATOR / "config.json", about_aggregator)
    if config.lora is not None:
        save_lora(folder / LORA, dit, "diffusers", dtype, header=True)
    if dialect is not None:
        save_lora(folder / dialect / "lora.safetensors", dit, dialect, dtype)
    if merge or config.lora is None:
        save_merged(folder / TRANSFORMER, dit, dtype)
    for name, part in ENCODERS.items():
        if shipped := SHIPPED.get(getattr(config.model, part)):
            shutil.copytree(shipped / part, folder / name)
    for module in torch_code(config.model.dit).modules:
        shutil.copyfile(TORCH_FILES / f"{module}.py", folder / f"{module}.py")
    write_json(folder / ABOUT, about)
    (folder / "config.json").write_text(to_json(config) + "\n")


def is_exported(folder: AnyPath) -> bool:
    """Whether a folder is one that `export` wrote."""
    return (folder / ABOUT).is_file()


def merged_config(folder: AnyPath, config: Config) -> Config:
    """The config to sample with: base and LoRA, or where the base is not there the merged
    transformer."""
    base = config.model.dit_weights
    if config.lora is None or (base and Path(base).exists()) or not (folder / TRANSFORMER).is_dir():
        return config
    model = replace(config.model, dit_weights=None, frozen_dtype="float32")
    return replace(config, lora=None, model=model)


def is_merged(folder: AnyPath, config: Config) -> bool:
    """Whether a config takes a folder's merged transformer in place of base and LoRA.

    See `merged_config`.
    """
    return config.lora is None and is_exported(folder) and (folder / LORA).is_file()


def read_exported(
    folder: AnyPath,
    config: Config,
    place: Place | None = None,
    fresh: np.random.Generator | None = None,
) -> dict[str, Any]:
    """The trained leaves of a config, by dotted path, float32.

    They are NumPy arrays or, with `place`, laid out on a mesh. A merged transformer, which nobody
    trains, stays in its files' dtype. fresh: see `adapters.adapter_leaves`. Raises InputError where
    the config wants a LoRA and the folder has none.
    """
    aggregator = nnx.eval_shape(lambda: Aggregator(config.aggregator, rngs=nnx.Rngs(0)))
    table = aggregator_format.entries(config.aggregator)
    where = folder / AGGREGATOR
    leaves = _read("aggregator", aggregator, table, TensorFolder(where), where, place)
    if config.lora is None:
        merged = is_merged(folder, config)
        return leaves | transformer_leaves(folder / TRANSFORMER, config, place, as_it_is=merged)
    if not (folder / LORA).is_file():
        raise InputError(
            f"{folder}: it has no LoRA, its transformer was trained whole; set lora to None"
        )
    return leaves | lora_leaves(folder / LORA, config, place, fresh)


def transformer_leaves(
    folder: AnyPath, config: Config, place: Place | None = None, *, as_it_is: bool = False
) -> dict[str, Any]:
    """The whole transformer of a folder as trained leaves, float32 or in its files' dtype."""
    source = dit_source(folder)
    check_transformer(folder, source.config, config.model.dit)
    module = format_of(source.config).module
    dit = nnx.eval_shape(lambda: module(source.config, rngs=nnx.Rngs(0)))
    entries = list(source.entries(source.config))
    kept = source.tensors.dtype(entries[0].sources[0]) if as_it_is else np.float32
    return _read("dit", dit, entries, source.tensors, folder, place, kept)


def lora_leaves(
    file: AnyPath,
    config: Config,
    place: Place | None = None,
    fresh: np.random.Generator | None = None,
) -> dict[str, Any]:
    """The adapters of a LoRA file as trained leaves (`fresh`: see `adapters.adapter_leaves`)."""
    lora = config.lora
    assert lora is not None

    def make() -> Backbone:
        dit = format_of(config.model.dit).module(config.model.dit, rngs=nnx.Rngs(0))
        add_lora(dit, lora, rngs=nnx.Rngs(0))
        return dit

    alpha = lora.rank if lora.alpha is None else lora.alpha
    leaves = adapter_leaves(
        nnx.eval_shape(make), str(file), alpha / lora.rank, fresh, lora.init_gain
    )
    if place is None:
        return dict(leaves)
    return {
        name: jax.make_array_from_callback(
            leaf.shape, place(name, leaf.shape), lambda index, leaf=leaf: leaf[index]
        )
        for name, leaf in leaves.items()
    }


def _read(
    prefix: str,
    module: nnx.Module,
    table: Any,
    tensors: Any,
    where: AnyPath,
    place: Place | None,
    dtype: Any = np.float32,
) -> dict[str, Any]:
    # The sharding table goes by whole paths.
    lay = place and (lambda path, shape: place(f"{prefix}.{path}", shape))
    try:
        load_entries(module, table, tensors, np.dtype(dtype), lay)
    except MappingError as error:
        raise InputError(f"{where}: {error}") from None
    leaves = {f"{prefix}.{path}": leaf[...] for path, leaf in parameters_by_path(module).items()}
    if place is not None:
        return leaves
    return {name: np.asarray(leaf) for name, leaf in leaves.items()}


def about_of(folder: AnyPath) -> dict[str, Any]:
    """What `export.json` says."""
    return read_json(folder / ABOUT)
