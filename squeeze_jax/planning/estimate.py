"""How long a step will take: what the TPU's compiler expects of the real program, extended to its depth, and by hand what
the compiler does not know.

Measured by the compiler (`Compiled.optimal`, its own estimate of every instruction): the real program, in which a scan's
body counts once, plus (depth − 1) times one block compiled by itself, forward and backward under the same policy and on
the same mesh. On v5p the compiler reckons with 394 TFLOP/s and 2,350 GB/s (85 % of what is published). Copies that it runs
beside computation, which its own sum counts as if they were waited for, are taken out (`Compiled.expected`).

Modelled by hand: attention kernels (FLOPs of all blocks at `KERNEL_SHARE` of the published peak, on top of their traffic,
which the compiler has), collectives (`network.network_seconds`: bytes over published rates; those that the compiler put
beside products are hidden, the others are waited for), and refiner blocks after the first (at the rate of a double block).

Compared with outside figures: MaxDiffusion's forward at 1024 x 1024 on v5p is 237 ms by the same compiler.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from squeeze_jax.array_types import Array
from squeeze_jax.checkpoints.build import build_system
from squeeze_jax.checkpoints.inference import convert_for_sampling
from squeeze_jax.config import Config, StageConfig
from squeeze_jax.layers.lora import LoRAParam
from squeeze_jax.layers.rope import rotation
from squeeze_jax.layers.splash import padded
from squeeze_jax.layers.stack import rematerialised
from squeeze_jax.planning.chips import Chip
from squeeze_jax.planning.network import network_seconds
from squeeze_jax.planning.train_program import Compiled, abstract_batch, compiled, placed, step_flops
from squeeze_jax.sharding import batch_sharding, compiler_options, use_mesh

KERNEL_SHARE = 0.6
"""Of a chip's published peak, what attention kernels reach (our decision; the compiler reckons with 86 % where a kernel
tells it its FLOPs)."""


@dataclass(frozen=True)
class Estimate:
    """Seconds of a step or of an image, on every chip."""

    compute: float
    """Of the compiler: products and memory traffic."""
    kernels: float
    links: float
    network: float
    exposed: float
    """Of links and network, what is waited for."""
    moved: float
    """Bytes between a chip and its HBM."""

    @property
    def total(self) -> float:
        return self.compute + self.kernels + max(self.exposed, self.links + self.network - self.compute - self.kernels)


@dataclass(frozen=True)
class Kernel:
    """Calls of the attention kernel in a step."""

    tokens: int
    width: int
    """Channels of all heads."""
    calls: int
    keys: int | None = None
    """Tokens that are looked at; None: the same."""

    def flops(self, backward: bool, again: bool) -> float:
        """FLOPs that an example's calls execute: 2 products forward, 5 backward; `again` runs the forward twice."""
        products = 2 * (1 + (backward and again)) + 5 * backward
        keys = self.tokens if self.keys is None else self.keys
        return self.calls * products * 2.0 * padded(self.tokens) * padded(keys) * self.width


def sequence(config: Config, references: int) -> tuple[int, int]:
    """Tokens of the context, and of target and references together."""
    batch = abstract_batch(config, 1, references)
    context = batch.hidden_states.text.shape[2] + batch.hidden_states.image.shape[2]
    return context, batch.target.shape[1] + batch.references.tokens.shape[1]


def step_estimate(
    config: Config, mesh: Mesh, chip: Chip, stage: StageConfig, whole: Compiled, references: int = 1
) -> Estimate:
    """Of a train step, compiled as `whole`."""
    dit = config.model.dit
    context, image = sequence(config, references if stage.references else 0)
    rows = config.data.batch_per_chip
    blocks = [block_program(config, mesh, kind, rows, context, image) for kind in ("double", "single")]
    depths = (dit.double_blocks, dit.single_blocks)
    compute = whole.expected(chip) + sum((depth - 1) * block.expected(chip) for depth, block in zip(depths, blocks))
    moved = whole.traffic + sum((depth - 1) * block.traffic for depth, block in zip(depths, blocks))
    uncounted = _refiners(config, stage, rows, references) + _encoders(config, stage, rows, references)
    compute += uncounted / (0.68 * chip.flops) / mesh.shape["tensor"]
    pieces = config.optimizer.accumulate
    kernels = [Kernel(context + image, dit.width, sum(depths))]
    if context >= 128:
        kernels.append(Kernel(context, config.aggregator.width, config.aggregator.refiner_blocks))
    executed = rows * sum(kernel.flops(True, config.parallel.remat == "block") for kernel in kernels)
    links, network, exposed = network_seconds(whole.collectives, mesh, chip)
    return Estimate(
        pieces * compute,
        pieces * executed / mesh.shape["tensor"] / (KERNEL_SHARE * chip.flops),
        links,
        network,
        exposed,
        pieces * moved,
    )


def _encoders(config: Config, stage: StageConfig, rows: int, references: int) -> int:
    """FLOPs of the frozen encoders where they run in the program, whose scans the compiler counts once."""
    if not config.data.online:
        return 0
    without = replace(config, data=replace(config.data, online=False))
    return step_flops(config, stage, rows, references) - step_flops(without, stage, rows, references)


def _refiners(config: Config, stage: StageConfig, rows: int, references: int) -> int:
    """FLOPs of the aggregator's refiner blocks after the first: one scan, whose body the compiler counts once."""
    count = config.aggregator.refiner_blocks
    if count < 2:
        return 0
    shallow = replace(config.model, dit=replace(config.model.dit, double_blocks=1, single_blocks=1))
    config = replace(config, model=shallow)
    one = replace(config, aggregator=replace(config.aggregator, refiner_blocks=1))
    return step_flops(config, stage, rows, references) - step_flops(one, stage, rows, references)


def block_program(
    config: Config,
    mesh: Mesh,
    kind: str,
    rows: int,
    context: int,
    image: int,
    backward: bool = True,
    *,
    merge_lora: bool = True,
) -> Compiled:
    """One block of the transformer by itself, `rows` examples a chip: forward, and backward under the config's policy.

    Without `backward`, as in sampling, shifts, scales and gates are given: one set for all
    examples; and weights are those that sampling keeps (`merge_lora`: `convert_for_sampling`).
    """
    one = replace(config.model, dit=replace(config.model.dit, double_blocks=1, single_blocks=1))
    config = replace(config, model=one)
    name = f"{kind}_blocks"

    def make() -> nnx.Module:
        system = build_system(config, with_base=False)
        if not backward:
            system = convert_for_sampling(system, config, merge_lora=merge_lora)
        return getattr(system.dit, name)

    blocks = nnx.eval_shape(make)
    trained_kind = nnx.Param if config.lora is None else LoRAParam
    graph, trained, frozen = nnx.split(blocks, trained_kind, ...)
    trained, frozen = (placed(state, mesh, f"dit.{name}.") for state in (trained, frozen))

    def block_of(*leaves: Any) -> Any:
        return nnx.merge(graph, *jax.tree.map(lambda leaf: leaf[0], leaves))

    many, width = rows * mesh.shape["data"] * mesh.shape["fsdp"], config.model.dit.width
    dtype = jnp.dtype(config.model.dtype)
    by_rows = batch_sharding(mesh)

    def shape(*sizes: int, dtype: Any = dtype) -> Any:
        return jax.ShapeDtypeStruct((many, *sizes), dtype, sharding=by_rows)

    vec, everywhere = jax.ShapeDtypeStruct((1, width), jnp.float32), NamedSharding(mesh, PartitionSpec())
    shapes = jax.eval_shape(lambda vec, *leaves: block_of(*leaves).modulation(vec), vec, trained, frozen)
    given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), shapes)
    lengths = (context, image) if kind == "double" else (context + image,)
    streams = tuple(shape(length, width) for length in lengths)
    rest = (
        shape(width, dtype=jnp.float32) if backward else given,
        shape(context + image, dtype=jnp.bool_),
        shape(context + image, 3, dtype=jnp.int32),
    )

    def forward(trained: Any, streams: Any, frozen: Any, at: Any, mask: Array, positions: Array) -> Any:
        by = rotation(positions, config.model.dit.rope_axes)

        def run(trained: Any, streams: Any) -> Any:
            block = block_of(trained, frozen)
            return block(*streams, block.modulation(at) if backward else at, by, mask)[0]

        return rematerialised(run, config.parallel.remat if backward else "none", prevent_cse=True)(trained, streams)

    def both(trained: Any, streams: Any, change: Any, *rest: Any) -> Any:
        with use_mesh(mesh):
            out, pull = jax.vjp(lambda trained, streams: forward(trained, streams, *rest), trained, streams)
            return out, *pull(change)

    def once(trained: Any, streams: Any, *rest: Any) -> Any:
        with use_mesh(mesh):
            return forward(trained, streams, *rest)

    outside = streams if kind == "double" else streams[0]
    if not backward:
        return compiled(jax.jit(once, compiler_options=compiler_options(mesh)), mesh, trained, streams, frozen, *rest)
    where = jax.tree.map(lambda x: x.sharding, (outside, trained, streams))
    program = jax.jit(both, out_shardings=where, compiler_options=compiler_options(mesh))
    return compiled(program, mesh, trained, streams, outside, frozen, *rest)
