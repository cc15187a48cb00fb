"""Published checkpoint folders as modules (transformer, autoencoder, MLLM)."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, Sharding

from squeeze_jax.array_types import DType
from squeeze_jax.errors import InputError
from squeeze_jax.interop import autoencoder as autoencoder_format
from squeeze_jax.interop import flux as flux_format
from squeeze_jax.interop import internvl as internvl_format
from squeeze_jax.interop.mapping import Entry, MappingError, export_entries, load_entries
from squeeze_jax.interop.tensors import TensorFolder, read_json, write_json, write_tensors
from squeeze_jax.models.autoencoder import Autoencoder
from squeeze_jax.models.dit import DiT
from squeeze_jax.models.internvl import InternVL
from squeeze_jax.sharding import parameter_spec

Module = TypeVar("Module", bound=nnx.Module)
DEMO = Path(__file__).parent.parent / "demo"
"""The shipped miniature: `autoencoder`, `mllm` and `system` below it."""
WEIGHTS = "diffusion_pytorch_model.safetensors"  # diffusers' name


def load_dit(
    folder: str | Path,
    dtype: DType = jnp.bfloat16,
    *,
    compute_dtype: DType | None = None,
    mesh: Mesh | None = None,
    **options: Any,
) -> DiT:
    """FLUX.1's transformer from a diffusers folder (or Black Forest Labs' names beside its config.json).

    Weights are kept in `dtype` and products computed in `compute_dtype` (default: the same). On a mesh they lie as the
    sharding table says, and each process reads its own part alone. `options` go to `DiT` (remat, unroll).
    """
    config = flux_format.config_from_json(read_json(Path(folder) / "config.json"))
    tensors = TensorFolder(folder)
    original = any(name.startswith("double_blocks.") for name in tensors.names())
    table = flux_format.original_entries(config) if original else flux_format.diffusers_entries(config)
    kinds: Any = {"dtype": compute_dtype or dtype, "param_dtype": dtype}
    return _load(lambda: DiT(config, **kinds, rngs=nnx.Rngs(0), **options), table, tensors, dtype, mesh)


def load_autoencoder(folder: str | Path, dtype: DType = jnp.float32) -> Autoencoder:
    """FLUX.1's autoencoder from a diffusers folder (`demo`: the miniature's)."""
    folder = encoder_folder(folder, "autoencoder")
    config = autoencoder_format.config_from_json(read_json(folder / "config.json"))
    make = lambda: Autoencoder(config, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))  # noqa: E731
    return _load(make, autoencoder_format.entries(config), TensorFolder(folder), dtype)


def load_internvl(folder: str | Path, dtype: DType = jnp.bfloat16) -> InternVL:
    """InternVL3 from a transformers `-hf` folder (`demo`: the miniature's)."""
    folder = encoder_folder(folder, "mllm")
    config = internvl_format.config_from_json(read_json(folder / "config.json"))
    make = lambda: InternVL(config, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))  # noqa: E731
    return _load(make, internvl_format.entries(config), TensorFolder(folder), dtype)


def save_dit(folder: Path, dit: DiT, dtype: DType) -> None:
    """Writes a diffusers folder: config.json and one safetensors file."""
    tensors = export_entries(dit, flux_format.diffusers_entries(dit.config))
    write_tensors(folder / WEIGHTS, {name: tensor.astype(np.dtype(dtype)) for name, tensor in tensors.items()})
    write_json(folder / "config.json", flux_format.config_to_json(dit.config))


def save_internvl(folder: Path, mllm: InternVL, dtype: DType) -> None:
    """Writes a transformers `-hf` folder: config.json and one safetensors file (the tokenizer is not part of it)."""
    tensors = export_entries(mllm, internvl_format.entries(mllm.config))
    write_tensors(folder / "model.safetensors", {k: tensor.astype(np.dtype(dtype)) for k, tensor in tensors.items()})
    write_json(folder / "config.json", internvl_format.config_to_json(mllm.config))


def encoder_folder(folder: str | Path, part: str) -> Path:
    """The folder itself, or the shipped miniature's part where it is called `demo`."""
    path = DEMO / part if str(folder) == "demo" else Path(folder)
    if not path.is_dir():
        how = "train it with `python -m squeeze_jax demo-encoders`" if str(folder) == "demo" else "download it"
        raise InputError(f"no folder {path} for the {part}; {how}")
    return path


def _load(
    make: Callable[[], Module], table: list[Entry], tensors: TensorFolder, dtype: DType, mesh: Mesh | None = None
) -> Module:
    module = nnx.eval_shape(make)
    try:
        load_entries(module, table, tensors, dtype, partial(_by_table, mesh) if mesh is not None else None)
    except MappingError as error:
        where = next(iter(tensors.files.values())).parent if tensors.files else ""
        raise InputError(f"{where}: {error}") from None
    return jax.block_until_ready(module)


def _by_table(mesh: Mesh, path: str, shape: tuple[int, ...]) -> Sharding:
    return NamedSharding(mesh, parameter_spec(path, shape, mesh))
