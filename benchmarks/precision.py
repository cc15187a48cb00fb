"""What products of float32 cost and save in a bfloat16 model: the tables of docs/decisions.md.

    JAX_PLATFORMS=cpu python benchmarks/precision.py errors
    python benchmarks/precision.py cost

`errors` runs on a CPU, whose float32 products are exact, and rounds their operands to what other
devices would: 7 bits of fraction for JAX's default on TPU, 10 for TF32. `cost` asks the TPU's
compiler (extra `tpu`, no TPU needed; minutes) for the train step of `configs/flux_stage2.py` at
full width with one double and one single block. The compiler counts no passes over operands:
FLOPs of six-pass products are printed for that.
"""

import argparse
import dataclasses
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from squeeze_jax.commands.plan import ENVIRONMENT

os.environ.update(ENVIRONMENT)  # JAX reads it when it is imported

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import squeeze_jax
from squeeze_jax.config import load_preset
from squeeze_jax.data.images import load_image, to_float
from squeeze_jax.interop.load import load_autoencoder
from squeeze_jax.layers.linear import Linear
from squeeze_jax.layers.lora import LoRAConfig, LoRAParam, add_lora
from squeeze_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from squeeze_jax.models.dit import DiT, DiTConfig
from squeeze_jax.planning.flops import matmul_flops
from squeeze_jax.planning.train_program import compile_train_step, step_flops, topology_mesh

PASSES = 6
"""Products of bfloat16 that a TPU makes of one of float32 at the highest precision."""
SHALLOW = {"num_double_blocks": 1, "num_single_blocks": 1}
ROWS = 8
"""Rows that a TPU's matrix unit takes at least: one example's vector costs as much."""


@contextmanager
def rounded_operands(bits: int | None) -> Iterator[None]:
    """Within it, products of float32 have operands of so many bits of fraction; None: exact ones."""

    def rounding(product: Any) -> Any:
        def run(*operands: Any, **options: Any) -> Any:
            if all(getattr(x, "dtype", jnp.float32) == jnp.float32 for x in operands):
                operands = tuple(
                    x if isinstance(x, str | tuple) else jax.lax.reduce_precision(x, 8, bits)
                    for x in operands
                )
            return product(*operands, **options)

        return run

    with ExitStack() as stack:
        for room, name in ((jnp, "matmul"), (jnp, "einsum"), (jax.lax, "conv_general_dilated")):
            if bits is not None:
                stack.enter_context(patch.object(room, name, rounding(getattr(room, name))))
        yield


@contextmanager
def rounded_scales() -> Iterator[None]:
    """Within it, gates and the adapters' scales are rounded to the activations' dtype first."""

    def scaled(x: jax.Array, scale: jax.Array | float) -> jax.Array:
        return x * jnp.asarray(scale, x.dtype)

    def add_gated(x: jax.Array, gate: jax.Array, update: jax.Array) -> jax.Array:
        return x + gate.astype(x.dtype) * update

    with ExitStack() as stack:
        for room in ("layers.lora", "layers.splash", "models.aggregator"):
            stack.enter_context(patch(f"squeeze_jax.{room}.scaled", scaled))
        stack.enter_context(patch("squeeze_jax.models.dit_blocks.add_gated", add_gated))
        yield


def off(found: Any, exact: Any) -> float:
    """‖a − b‖ / ‖b‖ in float64."""
    a, b = (np.asarray(x, np.float64) for x in (found, exact))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def random_dit(dtype: Any) -> DiT:
    """Half of FLUX.1's width, two blocks of each kind, weights and adapters without zeros; stored in bfloat16."""
    config = DiTConfig(heads=12, num_double_blocks=2, num_single_blocks=2, context_width=1024)
    dit = nnx.eval_shape(
        lambda: DiT(config, dtype=dtype, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    )
    rng = np.random.default_rng(0)

    def fill(kind: Any) -> None:
        for path, leaf in nnx.to_flat_state(nnx.state(dit, kind)):
            noise = rng.standard_normal(leaf.shape, np.float32)
            spread = 0.2 if path[-1] in ("bias", "scale") else leaf.shape[-2] ** -0.5
            value = (path[-1] == "scale") + noise * spread
            leaf.set_value(jnp.asarray(value, leaf.dtype))
            nnx.update(dit, nnx.from_flat_state([(path, leaf)]))

    fill(nnx.Param)
    add_lora(dit, LoRAConfig(rank=48, alpha=16.0), rngs=nnx.Rngs(1))
    fill(LoRAParam)
    return dit


def errors() -> None:
    """Prints how far results are off, relative, by what is rounded."""
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    target, context, t = draw(3, 64, 64), draw(3, 64, 1024), jnp.array([0.1, 0.5, 0.9])
    guidance = jnp.ones(3)

    def velocity(dit: DiT) -> jax.Array:
        graph, state = nnx.split(dit)
        return jax.jit(
            lambda state: nnx.merge(graph, state)(target, context, t, guidance, target_grid=(8, 8))
        )(state)

    def modulation(dit: DiT) -> jax.Array:
        made = dit.make_modulation(dit.embed_timestep(t, guidance))
        return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(made)])

    half, full = random_dit(jnp.bfloat16), random_dit(jnp.float32)
    exact, shifts = velocity(full), modulation(full)
    print("| modulation of a bfloat16 model, operands of | off by |\n|---|---|")
    for name, bits in (
        ("bfloat16 (TPU's default)", 7),
        ("TF32 (GPU's default)", 10),
        ("float32", None),
    ):
        with rounded_operands(bits):
            print(f"| {name} | {off(modulation(half), shifts):.1e} |", flush=True)
    print("\n| velocity of a bfloat16 model against a float32 one | off by |\n|---|---|")
    with rounded_scales(), rounded_operands(7):
        print(f"| modulation and scales rounded | {off(velocity(half), exact):.2e} |", flush=True)
    with rounded_operands(7):
        print(f"| modulation rounded | {off(velocity(half), exact):.2e} |", flush=True)
    with rounded_scales():
        print(f"| scales rounded | {off(velocity(half), exact):.2e} |", flush=True)
    print(f"| neither | {off(velocity(half), exact):.2e} |", flush=True)

    demo = Path(squeeze_jax.__file__).parent / "demo"
    graph, state = nnx.split(load_autoencoder(demo / "autoencoder"))
    pictures = [to_float(load_image(path)) for path in sorted((demo / "references").glob("*.png"))]
    images = jnp.asarray(np.stack(pictures))
    latents = None
    print("\n| the miniature's autoencoder, operands of | latents off by | grey levels off |")
    print("|---|---|---|")
    for name, bits in (
        ("float32", None),
        ("bfloat16", 7),
        ("TF32", 10),
        ("three bfloat16 passes", 15),
    ):
        with rounded_operands(bits):
            found = jax.jit(lambda state, x: nnx.merge(graph, state).encode(x))(state, images)
            latents = found if latents is None else latents
            drawn = jax.jit(lambda state, x: nnx.merge(graph, state).decode(x))(state, latents)
        exact = drawn if bits is None else exact
        levels = 127.5 * np.abs(np.asarray(drawn) - np.asarray(exact))
        grey = f"{levels.mean():.3f}, at most {levels.max():.1f}"
        print(f"| {name} | {off(found, latents):.1e} | {grey} |", flush=True)


def count_passes() -> None:
    """Prints the products of a full step, and those that take six passes."""
    full = load_preset("configs/flux_stage2.py")

    def modulation(t: jax.Array) -> Any:
        model = DiT(full.model.dit, rngs=nnx.Rngs(0))
        return model.make_modulation(model.embed_timestep(t, t))

    def encode(images: jax.Array) -> jax.Array:
        return Autoencoder(AutoencoderConfig(), rngs=nnx.Rngs(0)).encode(images)

    whole = step_flops(full, full.training.stages[0], 1)
    vectors = 2 * PASSES * matmul_flops(modulation, jax.ShapeDtypeStruct((ROWS,), jnp.float32))
    pictures = PASSES * matmul_flops(encode, jax.ShapeDtypeStruct((2, 512, 512, 3), jnp.float32))
    print(f"a step of one example: {whole / 1e12:.1f} TFLOP")
    print(
        f"modulation, forward and backward, in {PASSES} passes of {ROWS} rows: {vectors / 1e12:.2f}"
    )
    print(
        f"a target and a reference through the encoder, in {PASSES} passes: {pictures / 1e12:.2f}\n"
    )


def cost() -> None:
    """Prints the FLOPs of six passes, and what the compiler makes of the step before and after."""
    count_passes()
    mesh, chip = topology_mesh("v5p:2x2x1", {"data": 1, "fsdp": 4, "tensor": 1})
    full = load_preset("configs/flux_stage2.py")
    dit = dataclasses.replace(full.model.dit, **SHALLOW)
    config = dataclasses.replace(
        full,
        model=dataclasses.replace(full.model, dit=dit),
        parallel=dataclasses.replace(full.parallel, remat="save_attention"),
    )
    stage = config.training.stages[0]
    default = patch(
        "squeeze_jax.layers.modulation.float32_linear", partial(Linear, dtype=jnp.float32)
    )
    print(
        "| one block of each kind | compiler's ms | GB moved | temporaries, MB |\n|---|---|---|---|"
    )
    for name, changes in (
        ("default precision, rounded scales", (default, rounded_scales())),
        ("float32 scales", (default,)),
        ("float32 products and scales", ()),
    ):
        with ExitStack() as stack:
            for change in changes:
                stack.enter_context(change)
            made = compile_train_step(config, mesh, stage)
        figures = 1e3 * made.expected(chip), made.traffic / 1e9, made.temporaries / 1e6
        print("| {} | {:.2f} | {:.2f} | {:.0f} |".format(name, *figures), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("errors", "cost"))
    {"errors": errors, "cost": cost}[parser.parse_args().what]()


if __name__ == "__main__":
    main()
