"""Proves that a checkpoint is read right: names and shapes, then numbers against the PyTorch
original, block by block.

Real models do not fit twice in ordinary memory, so both implementations are built with a single
block of each kind, and the checkpoint's blocks go through them one after another, on the same
random input. Where PyTorch is missing, digests of our own outputs are given instead: two machines
that agree on them computed the same.
"""

import dataclasses
import gc
import json
import math
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from squeeze_jax.array_types import Json, PyTree
from squeeze_jax.errors import InputError
from squeeze_jax.interop import internvl as internvl_format
from squeeze_jax.interop.formats import FORMATS, find_format, format_of
from squeeze_jax.interop.load import (
    DIT_PREFIXES,
    Source,
    autoencoder_format,
    autoencoder_of,
    autoencoder_source,
    dit_source,
    internvl_source,
)
from squeeze_jax.interop.mapping import (
    Entry,
    Index,
    Renamed,
    Tensors,
    differences,
    export_entries,
    load_entries,
    parameters_by_path,
    without_prefix,
)
from squeeze_jax.interop.tensors import TensorFolder, read_json, write_tensors
from squeeze_jax.models.internvl import InternVL, InternVLConfig

Kind = str
"""What can be verified: a family of transformers (`formats.FORMATS`), `autoencoder` or `internvl`."""
TOLERANCE = 1e-5
"""Largest relative error ‖a − b‖ / ‖b‖ in float32 that passes (our decision)."""


class Row(NamedTuple):
    """One part of the model."""

    part: str
    error: float | None
    """Relative error against PyTorch; None where it is not installed."""
    digest: tuple[float, ...]
    """Norm of our output and three of its projections, to five digits."""

    @property
    def passed(self) -> bool:
        """Whether all is finite and near enough to PyTorch's."""
        finite = bool(np.isfinite(self.digest).all())
        return finite and (self.error is None or self.error <= TOLERANCE)


@dataclass
class Report:
    """What `verify` found."""

    folder: str
    kind: Kind
    layout: str
    parameters: int
    problems: list[str] = field(default_factory=list)
    """Missing, unexpected and misshapen tensors."""
    rows: list[Row] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every name and every number is right."""
        return not self.problems and all(row.passed for row in self.rows)

    def to_json(self) -> Json:
        """As `--json` writes it; NaN is null."""
        rows = [{**row._asdict(), "passed": row.passed} for row in self.rows]
        for row in rows:  # JSON has no NaN
            row["digest"] = [
                value if math.isfinite(value) else None for value in map(float, row["digest"])
            ]
            row["error"] = (
                row["error"] if row["error"] is None or math.isfinite(row["error"]) else None
            )
        found = {"rows": rows, "tolerance": TOLERANCE, "passed": self.passed}
        return dataclasses.asdict(self) | found


def detect(folder: str | Path, variant: str | None = None) -> Kind:
    """What a folder or file holds, by its config.json or its names. Raises InputError if
    unknown."""
    path = Path(folder) / "config.json"
    values = read_json(path) if path.is_file() else {}
    name = values.get("_class_name") or values.get("model_type") or ""
    names = without_prefix(TensorFolder(folder, variant), DIT_PREFIXES).names()
    if (family := find_format(name, names)) is not None:
        return family.kind
    kinds = {"AutoencoderKL": "autoencoder", "internvl": "internvl"}
    for beginning, kind in kinds.items():
        if str(name).startswith(beginning):
            return kind
    patterns = {
        r"(.*\.)?(double_blocks|transformer_blocks)\.0\..*": FORMATS[0].kind,
        r"(vision_model|vision_tower|mlp1)\..*": "internvl",
        r"(.*\.)?decoder\.conv_in\.weight": "autoencoder",
    }
    for pattern, kind in patterns.items():
        if any(re.fullmatch(pattern, name) for name in names):
            return kind
    raise InputError(
        f"{folder}: no transformer, autoencoder or InternVL of this system; say which with --kind"
    )


def verify(
    folder: str | Path,
    kind: Kind | None = None,
    *,
    variant: str | None = None,
    progress: Callable[[Row], None] = lambda row: None,
) -> Report:
    """Checks a checkpoint's names and shapes, then its numbers. Raises InputError where it
    cannot be read at all. `variant`: which one is read where a folder has several (`fp16`)."""
    kind = kind or detect(folder, variant)
    if kind not in KINDS:
        raise InputError(f"no kind {kind!r}; choose one of {', '.join(KINDS)}")
    read, class_of, parts = KINDS[kind]
    source = read(folder, variant)
    module = nnx.eval_shape(lambda: class_of(source.config)(source.config, rngs=nnx.Rngs(0)))
    table = source.entries(source.config)
    count = sum(int(np.prod(leaf.shape)) for leaf in parameters_by_path(module).values())
    report = Report(
        str(folder), kind, source.layout, count, differences(module, table, source.tensors)
    )
    if not report.problems:
        with jax.default_matmul_precision("highest"):
            for row in parts(source):
                report.rows.append(row)
                progress(row)
    return report


def _row(part: str, ours: np.ndarray, theirs: np.ndarray | None) -> Row:
    error = None
    if theirs is not None:
        error = float(
            np.linalg.norm(ours.astype(np.float64) - theirs)
            / np.linalg.norm(theirs.astype(np.float64))
        )
    flat = ours.astype(np.float64).ravel()
    directions = np.random.default_rng(1).standard_normal((3, flat.size)) / np.sqrt(flat.size)
    return Row(
        part,
        error,
        tuple(float(f"{value:.4e}") for value in (np.linalg.norm(flat), *directions @ flat)),
    )


def _loaded(make: Callable[..., PyTree], config: Any, table: list[Entry], tensors: Tensors) -> Any:
    module = nnx.eval_shape(lambda: make(config, rngs=nnx.Rngs(0)))
    load_entries(module, table, tensors, jnp.float32)
    return module


def _has(*modules: str) -> bool:
    return all(find_spec(module) is not None for module in modules)


# --- a transformer


def _dit_rows(source: Source) -> Iterator[Row]:
    full, family = source.config, format_of(source.config)
    config = dataclasses.replace(full, num_double_blocks=1, num_single_blocks=1)
    table = source.entries(config)
    grid, references = (4, 4), ((2, 3),)
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    inputs = {
        "target": normal(2, 16, config.in_channels),
        "reference": normal(2, 6, config.in_channels),
        "context": normal(2, 7, config.context_width),
        "t": np.array([0.25, 0.9], np.float32),
        "guidance": np.array([1.0, 3.5], np.float32),
    }
    extra = {name: normal(2, width) for name, width in family.extra_inputs(config).items()}

    @nnx.jit
    def ours(dit: Any, x: dict[str, jax.Array], extra: dict[str, jax.Array]) -> jax.Array:
        return dit(
            x["target"],
            x["context"],
            x["t"],
            guidance=x["guidance"] if config.guidance else None,
            target_grid=grid,
            references=[(x["reference"], references[0])],
            **extra,
        )

    for k in range(max(full.num_double_blocks, full.num_single_blocks)):
        double, single = min(k, full.num_double_blocks - 1), min(k, full.num_single_blocks - 1)
        layers = {
            r"^(double|transformer)_blocks\.0\.": double,
            r"^single_(transformer_)?blocks\.0\.": single,
        }
        tensors = _one_block(source.tensors, table, layers)
        dit = _loaded(family.module, config, table, tensors)
        found = np.asarray(ours(dit, jax.device_put(inputs), jax.device_put(extra)))
        theirs = None
        if _has("torch", "diffusers"):
            # The file's own tensors, or ours under diffusers' names where the file has others.
            weights = (
                {name: tensors.read(name) for name in tensors.names()}
                if source.layout == "diffusers"
                else export_entries(dit, family.entries["diffusers"](config))
            )
            del dit
            theirs = family.twin(config, weights, inputs | extra, grid, references)
        yield _row(f"double block {double}, single block {single}", found, theirs)
        gc.collect()


def _one_block(tensors: Tensors, table: list[Entry], layers: dict[str, int]) -> Tensors:
    """The tensors of a table for one block of each kind, taken from the blocks with these numbers."""
    names = {}
    for name in dict.fromkeys(name for entry in table for name in entry.sources):
        source = name
        for pattern, layer in layers.items():
            source = re.sub(
                pattern, lambda match, layer=layer: match[0].replace("0.", f"{layer}."), source
            )
        names[name] = source
    return Renamed(tensors, names)


# --- the autoencoder


def _autoencoder_rows(source: Source) -> Iterator[Row]:
    config, format = source.config, autoencoder_format(source.config)
    module = _loaded(autoencoder_of(config), config, source.entries(config), source.tensors)
    side, rng = config.downsampling, np.random.default_rng(0)
    pictures = rng.uniform(-1, 1, (1, 12 * side, 7 * side, 3)).astype(np.float32)
    encoded = np.asarray(nnx.jit(lambda module, x: module.encode(x))(module, pictures))
    latents = rng.standard_normal(encoded.shape).astype(np.float32)
    decoded = np.asarray(nnx.jit(lambda module, x: module.decode(x))(module, latents))
    theirs: tuple[np.ndarray | None, np.ndarray | None] = None, None
    if _has("torch", "diffusers"):
        if source.layout == "diffusers":
            weights = {name: source.tensors.read(name) for name in source.tensors.names()}
        else:
            weights = export_entries(module, format.entries(config))
        theirs = format.twin_codes(config, weights, pictures, latents)
    size = f"{pictures.shape[1]}x{pictures.shape[2]}"
    yield _row(f"encode {size}", encoded, theirs[0])
    yield _row(f"decode {size}", decoded, theirs[1])


# --- InternVL

WORDS = 64
"""Rows of the embedding that the check takes along: the whole of it would be most of the memory."""


class _FewWords:
    """A checkpoint whose vocabulary is cut to its first words."""

    def __init__(self, tensors: Tensors, names: tuple[str, ...]) -> None:
        self.tensors, self.cut = tensors, names

    def names(self) -> list[str]:
        return self.tensors.names()

    def dtype(self, name: str) -> np.dtype:
        return self.tensors.dtype(name)

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self.tensors.shape(name)
        return (min(WORDS, shape[0]), *shape[1:]) if name in self.cut else shape

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        if name in self.cut and not index:
            index = (slice(0, WORDS),)
        return self.tensors.read(name, index)


def _internvl_rows(source: Source) -> Iterator[Row]:
    full: InternVLConfig = source.config
    words = min(WORDS, full.text.vocab_size)
    config = dataclasses.replace(
        full,
        vision=dataclasses.replace(full.vision, num_hidden_layers=1),
        text=dataclasses.replace(full.text, num_hidden_layers=1, vocab_size=words),
        image_token_id=words - 1,
    )
    table = source.entries(config)
    rng = np.random.default_rng(0)
    image = [words - 1] * config.image_tokens
    ids = np.array([[1, 2, *image, 3, 4, 5], [6, *image, 7, 8, 9, 10]], np.int32)
    mask = np.ones(ids.shape, bool)
    mask[1, -2:] = False
    size = config.vision.image_size
    pixels = rng.standard_normal((2, size, size, 3)).astype(np.float32)
    forward = nnx.jit(lambda module, *inputs: module(*inputs))
    cut = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
    for k in range(max(full.vision.num_hidden_layers, full.text.num_hidden_layers)):
        vision, text = (
            min(k, full.vision.num_hidden_layers - 1),
            min(k, full.text.num_hidden_layers - 1),
        )
        layers = {
            r"^vision_(tower\.encoder\.layer|model\.encoder\.layers)\.0\.": vision,
            r"^language_model\.model\.layers\.0\.": text,
        }
        tensors = _FewWords(_one_block(source.tensors, table, layers), cut)
        module = _loaded(InternVL, config, table, tensors)
        found = np.asarray(forward(module, ids, pixels, mask))
        theirs = None
        if _has("torch", "transformers"):
            weights = (
                {name: tensors.read(name).astype(np.float32) for name in tensors.names()}
                if source.entries is internvl_format.entries
                else export_entries(module, internvl_format.entries(config))
            )
            theirs = _transformers_internvl(config, weights, ids, pixels, mask)
        seen = np.where(mask[:, None, :, None], found, 0)
        yield _row(
            f"vision layer {vision}, text layer {text}",
            seen,
            None if theirs is None else np.where(mask[:, None, :, None], theirs, 0),
        )
        gc.collect()


def _transformers_internvl(
    config: InternVLConfig,
    weights: dict[str, np.ndarray],
    ids: np.ndarray,
    pixels: np.ndarray,
    mask: np.ndarray,
) -> np.ndarray:
    import torch
    from transformers import InternVLForConditionalGeneration

    with tempfile.TemporaryDirectory() as folder:
        write_tensors(
            Path(folder) / "model.safetensors",
            {k: np.ascontiguousarray(v) for k, v in weights.items()},
        )
        (Path(folder) / "config.json").write_text(
            json.dumps(internvl_format.config_to_json(config))
        )
        twin = InternVLForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
    with torch.no_grad():
        states = twin.eval()(
            input_ids=torch.from_numpy(ids).long(),
            pixel_values=torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()),
            attention_mask=torch.from_numpy(mask).long(),
            output_hidden_states=True,
        ).hidden_states
    return torch.stack(states, 1).numpy()


KINDS: dict[
    Kind,
    tuple[Callable[..., Source], Callable[..., Any], Callable[[Source], Iterator[Row]]],
] = {
    **{
        family.kind: (dit_source, lambda config: format_of(config).module, _dit_rows)
        for family in FORMATS
    },
    "autoencoder": (autoencoder_source, autoencoder_of, _autoencoder_rows),
    "internvl": (internvl_source, lambda config: InternVL, _internvl_rows),
}
"""How a kind is read, built and compared."""
