"""The certificate of an export: our system and the exported PyTorch files on the same noise and
conditions."""

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from squeeze_jax.array_types import Array, Json
from squeeze_jax.batch import Context, HiddenStates, References
from squeeze_jax.checkpoints.trained import Trained
from squeeze_jax.data.feature_extractor import FeatureExtractor
from squeeze_jax.data.images import load_image, to_uint8
from squeeze_jax.data.placement import mesh_of, shard_inputs
from squeeze_jax.data.references import encode_references
from squeeze_jax.errors import OutputError
from squeeze_jax.interop.exported import (
    ENCODERS,
    TRANSFORMER,
    TorchCode,
    about_of,
    torch_code,
)
from squeeze_jax.interop.load import (
    DEMO,
    autoencoder_format,
    autoencoder_source,
    dit_source,
    internvl_source,
    load_autoencoder,
    load_dit,
    load_internvl,
    save_dit,
    save_internvl,
)
from squeeze_jax.models.system import System
from squeeze_jax.sampling.batching import pad_references
from squeeze_jax.sampling.pipeline import Pipeline, Settings
from squeeze_jax.sampling.schedule import noise_for
from squeeze_jax.sharding import use_mesh

TOLERANCE = {"part": 1e-4, "latents": 1e-4, "pixels": 1e-3}
"""Largest relative error of a part and of the latents, and share of values off by more than one
grey level (float32)."""
PROMPT = "a small critter running on the beach at night, with a blue flag, on the left"
STEPS = 8
"""Of the sampling that both programs do."""
PACKAGES = ("jax", "flax", "torch", "diffusers", "transformers", "peft", "safetensors")


def certificate(
    folder: Path,
    trained: Trained,
    mesh: Mesh | None = None,
    progress: Callable[[str], None] = print,
) -> Json:
    """Relative errors of every part and of whole pictures, with settings and versions, as JSON
    values.

    Both sides compute in float32, PyTorch reads the files of `folder` in their own type; ours runs
    on the `mesh` that it lies on, its adapters unmerged. Raises OutputError where they differ by
    more than `TOLERANCE`, and InputError where base or encoders are not there.
    """
    import torch

    config = trained.config
    pipeline = Pipeline.of(trained.system, config, FeatureExtractor.of(config, mesh))
    exact = about_of(folder)["dtype"] == "float32"
    with torch_pipeline(folder, trained) as theirs:
        pictures = [load_image(DEMO / "references" / f"critter-{i}.png") for i in range(2)]
        states = pipeline.encoders.read([PROMPT], [pictures])
        (latents,) = encode_references(
            pipeline.encoders, [pictures], config.data.reference_long_side
        )
        settings = Settings(steps=min(config.sampling.steps, STEPS))
        resolved = pipeline.resolved(settings)
        grid = config.grid(resolved.height, resolved.width)
        noise = np.array(noise_for([0], grid[0] * grid[1], config.model.dit.in_channels))
        with torch.no_grad():
            rows, velocity = _parts(pipeline, theirs, states, latents, pictures, noise, grid)
            x = torch.from_numpy(noise)
            options = {"num_inference_steps": resolved.steps, "latents": x}
            found = theirs(PROMPT, pictures, output_type="latent", **options)
            drawn = theirs.decode(found, grid)
            if (
                config.lora is not None and (folder / TRANSFORMER).is_dir()
            ):  # whoever loads the folder alone gets this one
                kind = theirs.classes[TRANSFORMER]
                merged = _transformer(kind, folder / TRANSFORMER, torch.float32)
                theirs.register_modules(transformer=merged)
                rows["merged transformer, velocity"] = velocity()
    for name, error in rows.items():
        progress(f"  {name:32}{error:.1e}")
    tokens = pipeline.sample(states, [latents], [0], settings)
    expected = pipeline.decode(tokens, settings)
    off = np.abs(to_uint8(drawn).astype(int) - to_uint8(expected).astype(int)) > 1
    whole = {"latents": relative_error(found.numpy(), tokens), "pixels": float(off.mean())}
    progress(f"  {'whole picture, latents':32}{whole['latents']:.1e}")
    progress(f"  {'whole picture, off by > 1 grey':32}{whole['pixels']:.4%}")
    limits = {**dict.fromkeys(rows, TOLERANCE["part"]), **{name: TOLERANCE[name] for name in whole}}
    failed = [name for name, value in {**rows, **whole}.items() if not value <= limits[name]]
    if failed and exact:
        raise OutputError(
            f"the exported files do not compute the same ({', '.join(failed)} differ by more than "
            f"{max(limits[name] for name in failed):g}); nothing is written: report this, "
            "or write them with --no-check"
        )
    return {
        "parts": rows,
        "whole": whole,
        "tolerance": TOLERANCE if exact else None,
        "settings": {**vars(resolved), "prompt": PROMPT, "references": len(pictures)},
        "versions": {name: version(name) for name in PACKAGES},
    }


def _parts(
    pipeline: Pipeline, theirs: Any, states: HiddenStates, latents: list[np.ndarray],
    pictures: list[Any], noise: np.ndarray, grid: tuple[int, int],
) -> tuple[dict[str, float], Callable[[], float]]:  # fmt: skip
    """Relative error of each part, every one on the inputs that ours gets; and the transformer's,
    to measure again."""
    import torch

    system, config = nnx.merge(pipeline.graphdef, *pipeline.params), pipeline.config
    sequence, is_image = in_order(states)
    rows = {
        "MLLM, hidden states": relative_error(theirs.read(PROMPT, pictures)[0].numpy(), sequence)
    }
    mesh = mesh_of(pipeline.params)

    @nnx.jit
    def aggregate(system: System, states: HiddenStates) -> Context:
        with use_mesh(mesh):
            return system.aggregate(states)

    context = aggregate(system, shard_inputs(mesh, states))
    ours = np.array(context.tokens)[0, np.asarray(context.mask)[0]]
    rows["aggregator"] = relative_error(
        theirs.aggregator(torch.tensor(sequence), torch.tensor(is_image)).numpy(), ours
    )
    shown = [theirs.encode(picture) for picture in pictures]
    encoded = torch.cat([latent.flatten() for latent in shown])
    in_their_order = [latent.transpose(2, 0, 1).ravel() for latent in latents]
    rows["autoencoder, encode"] = relative_error(encoded.numpy(), np.concatenate(in_their_order))
    references = pad_references([latents], grid, config.model.dit.reference_positions)
    assert references is not None

    @nnx.jit
    def ours_of(
        system: System, x: Array, t: Array, context: Context, references: References
    ) -> jax.Array:
        with use_mesh(mesh):
            return system.velocity(x, grid, t, context, references, config.diffusion.guidance)

    inputs = shard_inputs(mesh, (noise, np.array([0.7], np.float32), context, references))
    expected = ours_of(system, *inputs)
    kept, x = references.mask[0], torch.from_numpy(noise)
    positions = theirs.positions(grid, shown).float()
    conditions = positions, torch.tensor(ours), torch.tensor(references.tokens[:, kept])

    def velocity() -> float:
        return relative_error(theirs.velocity(x, 0.7, *conditions).numpy(), expected)

    rows["transformer, velocity"] = velocity()
    rows["autoencoder, decode"] = relative_error(
        theirs.decode(x, grid), pipeline.decode(jnp.asarray(noise))
    )
    return rows, velocity


def in_order(states: HiddenStates) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states [M, L, C] of one sequence without padding, in its order, and which tokens are
    image tokens."""
    parts = [
        (states.text, states.text_mask, states.text_positions),
        (states.image, states.image_mask, states.image_positions),
    ]  # fmt: skip
    kept = [np.asarray(mask)[0] for _, mask, _ in parts]
    values = np.concatenate(
        [np.asarray(x)[0][:, keep] for (x, _, _), keep in zip(parts, kept)], axis=1
    )
    order = np.argsort(
        np.concatenate([np.asarray(place)[0][keep] for (_, _, place), keep in zip(parts, kept)])
    )
    is_image = np.repeat([False, True], [keep.sum() for keep in kept])
    return values[:, order], is_image[order]


@contextmanager
def torch_pipeline(folder: Path, trained: Trained) -> Iterator[Any]:
    """The exported folder as its user loads it, in float32, the base rounded as the run kept it.

    Published files in other layouts are rewritten for it.
    """
    import torch

    model = trained.config.model
    code = torch_code(model.dit)
    with tempfile.TemporaryDirectory() as rewritten, exported_pipeline(folder, code) as pipeline:
        parts: dict[str, Any] = {}
        if trained.config.lora is not None and model.dit_weights is not None:
            kept = (
                torch.float32 if model.frozen_dtype == "float32" else torch.bfloat16
            )  # what the run knew of it
            base = _in_their_layout(TRANSFORMER, model.dit_weights, Path(rewritten))
            parts[TRANSFORMER] = _transformer(pipeline.classes[TRANSFORMER], base, kept)
        for name, field in ENCODERS.items():
            if not (folder / name).is_dir():
                parts[name] = _in_their_layout(name, getattr(model, field), Path(rewritten))
        loaded = pipeline.load(str(folder), **parts, torch_dtype=torch.float32)
        loaded.set_progress_bar_config(disable=True)
        yield loaded


def _transformer(kind: Any, folder: str | Path, dtype: Any) -> Any:
    """A transformer's folder as a float32 module of the class `kind`, rounded to a type."""
    model = kind.from_pretrained(folder, torch_dtype=dtype, use_safetensors=True)
    return model.float().eval()


def _in_their_layout(name: str, source: str, rewritten: Path) -> str:
    """A published checkpoint that diffusers and transformers read: itself, or rewritten in
    float32."""
    read = {TRANSFORMER: dit_source, "vae": autoencoder_source, "mllm": internvl_source}[name](
        source
    )
    if read.layout in ("diffusers", "transformers (-hf)") and Path(source).is_dir():
        return source
    into = rewritten / name
    if name == TRANSFORMER:
        save_dit(into, load_dit(source, jnp.float32), jnp.float32)
    elif name == "vae":
        autoencoder_format(read.config).save_autoencoder(load_autoencoder(source), into)
    else:
        save_internvl(into, load_internvl(source, jnp.float32), jnp.float32)
        (into / "tokenizer.json").write_bytes((Path(source) / "tokenizer.json").read_bytes())
    return str(into)


@contextmanager
def exported_pipeline(folder: Path, code: TorchCode) -> Iterator[Any]:
    """The pipeline's class of a folder, imported as its user imports it, and forgotten
    afterwards."""
    import transformers

    sys.path.insert(0, str(folder))
    kept, sys.dont_write_bytecode = (
        sys.dont_write_bytecode,
        True,
    )  # nothing but what was exported is in the folder
    transformers.utils.logging.disable_progress_bar()
    try:
        yield getattr(import_module(code.modules[0]), code.pipeline)
    finally:
        sys.dont_write_bytecode = kept
        sys.path.remove(str(folder))
        for name in code.modules:
            sys.modules.pop(name, None)


def relative_error(ours: Any, theirs: Any) -> float:
    """‖a − b‖ / ‖b‖ in float64, to two digits. Raises OutputError where their shapes differ."""
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if a.shape != b.shape:
        raise OutputError(
            f"the exported files give shape {a.shape} where ours give {b.shape}; report this"
        )
    return float(f"{np.linalg.norm(a - b) / np.linalg.norm(b):.1e}")
