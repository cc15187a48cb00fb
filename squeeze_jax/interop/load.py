"""Published checkpoint folders as modules (transformer, autoencoder, MLLM)."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, Sharding
from safetensors import SafetensorError

from squeeze_jax.array_types import DType
from squeeze_jax.config import Config
from squeeze_jax.errors import InputError
from squeeze_jax.interop import autoencoder as flux1_autoencoder
from squeeze_jax.interop import flux2_autoencoder
from squeeze_jax.interop import internvl as internvl_format
from squeeze_jax.interop.formats import FORMATS, find_format, format_of
from squeeze_jax.interop.mapping import (
    Entry,
    MappingError,
    Tensors,
    export_entries,
    load_entries,
    without_prefix,
)
from squeeze_jax.interop.tensors import TensorFolder, read_json, write_json, write_tensors
from squeeze_jax.interop.variants import is_standard
from squeeze_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from squeeze_jax.models.backbone import Backbone, BackboneConfig, ReferenceAttention
from squeeze_jax.models.flux2_autoencoder import Flux2Autoencoder, Flux2AutoencoderConfig
from squeeze_jax.models.internvl import INTERNVL3_2B, InternVL, InternVLConfig
from squeeze_jax.sharding import parameter_spec
from squeeze_jax.storage import AnyPath, as_path

Module = TypeVar("Module", bound=nnx.Module)
ParsedConfig = TypeVar("ParsedConfig")
AnyAutoencoderConfig = AutoencoderConfig | Flux2AutoencoderConfig
DEMO = Path(__file__).parent.parent / "demo"
"""The shipped miniature of critters: `autoencoder`, `mllm` and `system` below it."""
EMOJI = Path(__file__).parent.parent / "demo_emoji"
"""The shipped miniature of emoji, laid out alike."""
SHIPPED = {"demo": DEMO, "emoji": EMOJI}
"""What stands in place of a folder, in a config or on a command line."""
WEIGHTS = "diffusion_pytorch_model.safetensors"  # diffusers' name


DIT_PREFIXES = ("model.diffusion_model.",)
AUTOENCODER_PREFIXES = ("first_stage_model.", "vae.")
"""What stands before the names in a file that holds a whole system."""


def load_dit(
    folder: str | Path,
    dtype: DType = jnp.bfloat16,
    *,
    compute_dtype: DType | None = None,
    mesh: Mesh | None = None,
    reference_attention: ReferenceAttention = "joint",
    variant: str | None = None,
    **options: Any,
) -> Backbone:
    """Loads a transformer of a family in `formats.FORMATS`.

    `folder`: a diffusers folder, or Black Forest Labs' single file (or a folder with it). Weights
    are kept in `dtype` and products computed in `compute_dtype` (default: the same). On a mesh they
    lie as the sharding table says, and each process reads its own part alone. How references are
    seen (`reference_attention`) is no property of published weights. `variant` (`fp16`) is read
    where a folder has several. `options` go to the module (remat, unroll). Raises InputError for
    what is no such checkpoint.
    """
    source = dit_source(folder, variant)
    config = dataclasses.replace(source.config, reference_attention=reference_attention)
    family, source = format_of(config), source._replace(config=config)
    kinds: Any = {"dtype": compute_dtype or dtype, "param_dtype": dtype}
    make = lambda: family.module(config, **kinds, rngs=nnx.Rngs(0), **options)  # noqa: E731
    return _load(make, source, dtype, folder, mesh)


def load_autoencoder(
    folder: str | Path,
    dtype: DType = jnp.float32,
    mesh: Mesh | None = None,
    variant: str | None = None,
) -> Autoencoder:
    """Loads FLUX.1's or FLUX.2's autoencoder, whose class its config.json or its names tell.

    `folder`: a diffusers folder, or the single file `ae.safetensors`; `demo` and `emoji` are the miniatures'.
    """
    source = autoencoder_source(folder, variant)
    module = autoencoder_of(source.config)
    kinds: Any = {"dtype": dtype, "param_dtype": dtype}
    make = lambda: module(source.config, **kinds, rngs=nnx.Rngs(0))  # noqa: E731
    return _load(make, source, dtype, folder, mesh)


def load_internvl(
    folder: str | Path,
    dtype: DType = jnp.bfloat16,
    mesh: Mesh | None = None,
    variant: str | None = None,
) -> InternVL:
    """InternVL3 from a transformers `-hf` folder or one in the original layout (`demo` and
    `emoji`: the miniatures')."""
    source = internvl_source(folder, variant)
    kinds: Any = {"dtype": dtype, "param_dtype": dtype}
    make = lambda: InternVL(source.config, **kinds, rngs=nnx.Rngs(0))  # noqa: E731
    return _load(make, source, dtype, folder, mesh)


def encoder_configs(config: Config) -> tuple[AnyAutoencoderConfig, InternVLConfig]:
    """Returns the sizes of a config's autoencoder and MLLM.

    Where a folder is not there (a plan needs no weights) they are the published ones: of the
    transformer's family, and of the InternVL3 whose hidden states have the aggregator's width.
    """
    model = config.model
    autoencoder = format_of(model.dit).autoencoder()
    small = config.aggregator.width == INTERNVL3_2B.text.hidden_size
    mllm = INTERNVL3_2B if small else InternVLConfig()
    if model.autoencoder in SHIPPED or Path(model.autoencoder).exists():
        autoencoder = autoencoder_source(model.autoencoder).config
    ours = model.mllm_source == "internvl"  # else PyTorch runs it, and its sizes are its own
    if ours and (model.mllm in SHIPPED or Path(model.mllm).exists()):
        mllm = internvl_source(model.mllm).config
    return autoencoder, mllm


class Source(NamedTuple):
    """A published checkpoint and how it is to be read."""

    config: Any
    entries: Callable[[Any], list[Entry]]
    """The mapping table of its layout, for a config."""
    tensors: Tensors
    layout: str
    """Whose names it has."""


def dit_source(folder: str | AnyPath, variant: str | None = None) -> Source:
    """A transformer's checkpoint; without any family's mark it is taken for FLUX.1's, the first.
    Raises InputError where the folder lacks its config.json or holds no whole transformer."""
    tensors = without_prefix(TensorFolder(folder, variant), DIT_PREFIXES)
    original = any(name.startswith("double_blocks.") for name in tensors.names())
    file = _config_file(folder)
    class_name = read_json(file).get("_class_name") if file is not None else None
    family = find_format(class_name, tensors.names()) or FORMATS[0]
    if file is not None:
        config = _config(family.config_from_json, file)
    elif original:
        try:
            config = family.config_from_shapes(tensors)
        except (KeyError, ValueError, IndexError, SafetensorError) as error:
            raise InputError(
                f"{folder}: no {family.name} transformer in it ({error}); download it again"
            ) from None
    elif Path(folder).is_file():
        raise InputError(
            f"{folder}: diffusers' names, whose sizes config.json holds; "
            "give the folder that has both"
        )
    else:
        raise InputError(f"{folder}: no config.json in it; download the whole folder")
    if original:
        return Source(config, family.entries["original"], tensors, "Black Forest Labs")
    return Source(config, family.entries["diffusers"], tensors, "diffusers")


def is_transformer(folder: str | AnyPath) -> bool:
    """Returns whether a folder or file holds a transformer of one of the families."""
    names = without_prefix(TensorFolder(folder), DIT_PREFIXES).names()
    return find_format(None, names) is not None


def check_transformer(folder: str | AnyPath, found: BackboneConfig, wanted: BackboneConfig) -> None:
    """Raises InputError unless a folder's transformer is the one that a config's `model.dit`
    describes.

    """
    families = [format_of(config) for config in (found, wanted)]
    if families[0] is not families[1]:
        raise InputError(
            f"{folder} holds a {families[0].name} transformer, but model.dit is "
            f"{families[1].name}'s; give the other"
        )
    theirs, ours = _sizes(found), _sizes(wanted)
    differing = [name for name in theirs if theirs[name] != ours[name]]
    if differing:
        known = {name: _sizes(config) for name, config in families[0].published.items()}

        def describe(sizes: dict[str, Any]) -> str:
            values = ", ".join(f"{name}={sizes[name]}" for name in differing)
            name = next((name for name, published in known.items() if published == sizes), None)
            return f"{name or f'a {families[0].name} transformer'} ({values})"

        raise InputError(
            f"{folder} holds {describe(theirs)}, but model.dit is {describe(ours)}; "
            "make them equal"
        )


def _sizes(config: BackboneConfig) -> dict[str, Any]:
    """A config's fields without how references are seen, which is no property of published
    weights."""
    values = dataclasses.asdict(config)  # pyright: ignore[reportArgumentType]
    return {name: value for name, value in values.items() if name != "reference_attention"}


def check_autoencoder(folder: str | Path, found: AnyAutoencoderConfig, dit: BackboneConfig) -> None:
    """Raises InputError unless an autoencoder is of the transformer's family."""
    wanted = format_of(dit)
    if type(found) is not wanted.autoencoder:
        theirs = next(family.name for family in FORMATS if family.autoencoder is type(found))
        raise InputError(
            f"{folder} is {theirs}'s autoencoder, but model.dit is {wanted.name}'s; "
            f"give {wanted.name}'s autoencoder"
        )


def autoencoder_source(folder: str | Path, variant: str | None = None) -> Source:
    """An autoencoder's checkpoint; one without config.json has the published sizes."""
    folder = encoder_folder(folder, "autoencoder")
    tensors = without_prefix(TensorFolder(folder, variant), AUTOENCODER_PREFIXES)
    tensors = flux2_autoencoder.without_batches(tensors)
    file = _config_file(folder)
    class_name = None if file is None else read_json(file).get("_class_name")
    flux2 = any(name.startswith("bn.") for name in tensors.names())
    flux2 = class_name == "AutoencoderKLFlux2" if class_name else flux2
    published = Flux2AutoencoderConfig() if flux2 else AutoencoderConfig()
    format = autoencoder_format(published)
    config = published if file is None else _config(format.config_from_json, file)
    if "encoder.norm_out.weight" in tensors.names():
        return Source(config, format.original_entries, tensors, "Black Forest Labs")
    return Source(config, format.entries, tensors, "diffusers")


def autoencoder_of(config: AnyAutoencoderConfig) -> Callable[..., Autoencoder]:
    """Returns the class that an autoencoder's config is of."""
    return Flux2Autoencoder if isinstance(config, Flux2AutoencoderConfig) else Autoencoder


def autoencoder_format(config: AnyAutoencoderConfig) -> ModuleType:
    """Returns the module with the tables of an autoencoder's family."""
    flux2 = isinstance(config, Flux2AutoencoderConfig)
    return flux2_autoencoder if flux2 else flux1_autoencoder


def internvl_source(folder: str | Path, variant: str | None = None) -> Source:
    """An MLLM's checkpoint. Raises InputError for a single file: the tokenizer lies beside it."""
    folder = encoder_folder(folder, "mllm")
    if folder.is_file():
        raise InputError(
            f"{folder}: InternVL is read from its folder, with config.json and tokenizer.json; "
            "give that"
        )
    tensors = TensorFolder(folder, variant)
    file = folder / "config.json"
    if "llm_config" in read_json(file):
        config = _config(internvl_format.original_config_from_json, file)
        return Source(config, internvl_format.original_entries, tensors, "InternVL's own code")
    config = _config(internvl_format.config_from_json, file)
    return Source(config, internvl_format.entries, tensors, "transformers (-hf)")


def save_dit(folder: Path, dit: Backbone, dtype: DType) -> None:
    """Writes a diffusers folder: config.json and one safetensors file."""
    family = format_of(dit.config)
    tensors = export_entries(dit, family.entries["diffusers"](dit.config))
    write_tensors(
        folder / WEIGHTS, {name: tensor.astype(np.dtype(dtype)) for name, tensor in tensors.items()}
    )
    write_json(folder / "config.json", family.config_to_json(dit.config))


def save_internvl(folder: Path, mllm: InternVL, dtype: DType) -> None:
    """Writes a transformers `-hf` folder: config.json and one safetensors file (the tokenizer is
    not part of it)."""
    tensors = export_entries(mllm, internvl_format.entries(mllm.config))
    write_tensors(
        folder / "model.safetensors",
        {k: tensor.astype(np.dtype(dtype)) for k, tensor in tensors.items()},
    )
    write_json(folder / "config.json", internvl_format.config_to_json(mllm.config))


def checkpoint_folder(named: str | AnyPath | None) -> AnyPath:
    """Where a checkpoint lies: the folder (or file) itself, or a shipped miniature's, which `demo`,
    `emoji` and None (the one that is drawn with by default) stand for.
    """
    if named is None:
        return DEMO / "system"
    shipped = SHIPPED.get(str(named))
    return as_path(named) if shipped is None else shipped / "system"


def encoder_folder(folder: str | Path, part: str) -> Path:
    """The folder (or file) itself, or a shipped miniature's part where it is called as that.
    Raises InputError where there is none."""
    shipped = SHIPPED.get(str(folder))
    path = Path(folder) if shipped is None else shipped / part
    if not path.exists():
        train = "train it with `python -m squeeze_jax demo-encoders`"
        how = "download it" if shipped is None else train
        raise InputError(f"no folder {path} for the {part}; {how}")
    return path


def _config_file(folder: str | AnyPath) -> Path | None:
    """The config.json in a folder, or beside a file that bears a folder's standard name; another
    file's is not looked for, it may be another model's."""
    path = Path(folder)
    path = (path.parent if is_standard(path) else path) / "config.json"
    return path if path.is_file() else None


def _config(parse: Callable[[dict[str, Any]], ParsedConfig], file: Path) -> ParsedConfig:
    """A parsed config.json; InputError says what in it cannot be used."""
    try:
        return parse(read_json(file))
    except InputError:
        raise
    except KeyError as error:
        raise InputError(
            f"{file}: has no field {error}; is it another model's, or cut short?"
        ) from None
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise InputError(f"{file}: {error}") from None


def _load(
    make: Callable[[], Module],
    source: Source,
    dtype: DType,
    folder: str | Path,
    mesh: Mesh | None = None,
) -> Module:
    module = nnx.eval_shape(make)
    place = partial(_by_table, mesh) if mesh is not None else None
    try:
        load_entries(module, source.entries(source.config), source.tensors, dtype, place)
    except MappingError as error:
        raise InputError(f"{folder}: {error}") from None
    return jax.block_until_ready(module)


def _by_table(mesh: Mesh, path: str, shape: tuple[int, ...]) -> Sharding:
    return NamedSharding(mesh, parameter_spec(path, shape, mesh))
