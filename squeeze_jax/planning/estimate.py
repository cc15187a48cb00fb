"""How long a step will take: the TPU compiler's own estimate of the program, and a model of what it
leaves out.

The compiler estimates every instruction (`Compiled.optimal`). It counts a scan's body once, so we
add (depth − 1) times the estimate of one block, compiled by itself, forward and backward, under the
same policy and on the same mesh. On v5p the compiler assumes 394 TFLOP/s and 2,350 GB/s (85 % of
what is published). It counts asynchronous copies as if the chip waited for them;
`Compiled.expected` takes them out.

We model three things: attention kernels (the FLOPs of all blocks at `KERNEL_SHARE` of the published
peak; the compiler has their HBM traffic), collectives (`network.network_seconds`: bytes over
published rates, hidden where the compiler made them asynchronous), and the aggregator's refiner
blocks after the first.

Compared with outside figures: MaxDiffusion's forward at 1024 x 1024 on v5p is 237 ms by the same
compiler.
"""

from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from squeeze_jax.array_types import PyTree
from squeeze_jax.checkpoints.build import build_system, is_trained
from squeeze_jax.checkpoints.inference import convert_for_sampling
from squeeze_jax.config import Config, StageConfig
from squeeze_jax.layers.splash import padded
from squeeze_jax.models.backbone import Backbone, BlockInputs, Streams
from squeeze_jax.planning.chips import Chip
from squeeze_jax.planning.network import network_seconds
from squeeze_jax.planning.train_program import (
    Compiled,
    abstract_batch,
    compiled,
    placed,
    step_flops,
)
from squeeze_jax.sharding import batch_sharding, compiler_options, use_mesh

KERNEL_SHARE = 0.6
"""Share of a chip's published peak that attention kernels reach (our decision; the compiler
assumes 86 % where a kernel states its FLOPs)."""


StackName = Literal["double", "single"]
"""The kinds of a backbone's blocks."""


@dataclass(frozen=True)
class Estimate:
    """Seconds of a step or of an image, on every chip."""

    compute: float
    """Products and HBM traffic, by the compiler."""
    kernels: float
    links: float
    network: float
    exposed: float
    """The part of `links` and `network` during which the chip waits."""
    moved: float
    """Bytes between a chip and its HBM."""

    @property
    def total(self) -> float:
        """Seconds of a step."""
        return (
            self.compute
            + self.kernels
            + max(self.exposed, self.links + self.network - self.compute - self.kernels)
        )


@dataclass(frozen=True)
class Kernel:
    """Calls of the attention kernel in a step."""

    tokens: int
    width: int
    """Channels of all heads."""
    calls: int
    keys: int | None = None
    """Number of keys; None: as many as tokens."""

    def flops(self, backward: bool, again: bool) -> float:
        """FLOPs that an example's calls execute: 2 products forward, 5 backward; `again` runs
        the forward twice."""
        products = 2 * (1 + (backward and again)) + 5 * backward
        keys = self.tokens if self.keys is None else self.keys
        return self.calls * products * 2.0 * padded(self.tokens) * padded(keys) * self.width


def sequence(config: Config, references: int) -> tuple[int, int]:
    """Returns the number of context tokens, and of target and reference tokens together."""
    batch = abstract_batch(config, 1, references)
    context = batch.hidden_states.text.shape[2] + batch.hidden_states.image.shape[2]
    return context, batch.target.shape[1] + batch.references.tokens.shape[1]


def step_estimate(
    config: Config, mesh: Mesh, chip: Chip, stage: StageConfig, whole: Compiled, references: int = 1
) -> Estimate:
    """Estimates a train step that was compiled as `whole`."""
    dit = config.model.dit
    context, image = sequence(config, references if stage.references else 0)
    rows = config.data.batch_per_chip
    kinds: tuple[StackName, ...] = ("double", "single")
    blocks = [block_program(config, mesh, kind, rows, context, image) for kind in kinds]
    depths = (dit.num_double_blocks, dit.num_single_blocks)
    compute = whole.expected(chip) + sum(
        (depth - 1) * block.expected(chip) for depth, block in zip(depths, blocks)
    )
    moved = whole.traffic + sum((depth - 1) * block.traffic for depth, block in zip(depths, blocks))
    uncounted = _refiners(config, stage, rows, references) + _encoders(
        config, stage, rows, references
    )
    compute += uncounted / (0.68 * chip.flops) / mesh.shape["tensor"]
    pieces = config.optimizer.accumulate
    kernels = [Kernel(context + image, dit.width, sum(depths))]
    if context >= 128:
        kernels.append(Kernel(context, config.aggregator.width, config.aggregator.refiner_blocks))
    executed = rows * sum(
        kernel.flops(True, config.parallel.remat == "block") for kernel in kernels
    )
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
    """FLOPs of the frozen encoders with `data.online`: their scans too are counted once by the
    compiler."""
    if not config.data.online:
        return 0
    without = replace(config, data=replace(config.data, online=False))
    return step_flops(config, stage, rows, references) - step_flops(
        without, stage, rows, references
    )


def _refiners(config: Config, stage: StageConfig, rows: int, references: int) -> int:
    """FLOPs of the aggregator's refiner blocks after the first: a scan, whose body the compiler
    counts once."""
    count = config.aggregator.refiner_blocks
    if count < 2:
        return 0
    one_each = replace(config.model.dit, num_double_blocks=1, num_single_blocks=1)
    shallow = replace(config.model, dit=one_each)
    config = replace(config, model=shallow)
    one = replace(config, aggregator=replace(config.aggregator, refiner_blocks=1))
    return step_flops(config, stage, rows, references) - step_flops(one, stage, rows, references)


def block_program(
    config: Config,
    mesh: Mesh,
    kind: StackName,
    rows: int,
    context: int,
    image: int,
    backward: bool = True,
    *,
    merge_lora: bool = True,
) -> Compiled:
    """Compiles one block of the transformer by itself, with `rows` examples a chip.

    The program runs it forward, and backward under the config's policy. Without `backward`, as in
    sampling, shifts, scales and gates are given: one set for all examples; and weights are those
    that sampling keeps (`merge_lora`: `convert_for_sampling`).
    """
    # A transformer of one block of each kind, of which one is run. A single block reads one joint
    # sequence: it is given as an image without context, so that nothing is joined or cut around it.
    dit_config = replace(config.model.dit, num_double_blocks=1, num_single_blocks=1)
    parallel = config.parallel if backward else replace(config.parallel, remat="none")
    model = replace(config.model, dit=dit_config)
    config = replace(config, model=model, parallel=parallel)

    def make() -> Backbone:
        system = build_system(config, with_base=False)
        if not backward:
            system = convert_for_sampling(system, config, merge_lora=merge_lora)
        return system.dit

    dit = nnx.eval_shape(make)
    stack, first = f"{kind}_blocks", 0 if kind == "double" else 1
    if kind == "single":
        context, image = 0, context + image
    trains = is_trained(config)
    graph, trained, frozen = nnx.split(
        dit, lambda path, value: path[0] == stack and trains(("dit", *path), value), ...
    )

    # Hidden states and inputs of the block, as shapes; what has a row for each example is cut.
    many, dtype = rows * mesh.shape["data"] * mesh.shape["fsdp"], jnp.dtype(config.model.dtype)

    def embed(trained: nnx.State, frozen: nnx.State) -> tuple[Streams, BlockInputs]:
        dit, times = nnx.merge(graph, trained, frozen), jnp.zeros(many if backward else 1)
        temb = dit.embed_timestep(times, jnp.ones_like(times) if dit_config.guidance else None)
        target = jnp.zeros((many, image, dit_config.in_channels), dtype)
        tokens = jnp.zeros((many, context, dit_config.context_width), dtype)
        return dit.embed_inputs(
            target,
            (1, image),
            temb if backward else dit.make_modulation(temb).at(0),
            tokens,
            jnp.ones((many, context), bool),
        )

    def place(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        whole = NamedSharding(mesh, PartitionSpec())
        where = batch_sharding(mesh) if x.shape[:1] == (many,) else whole
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    streams, inputs = jax.tree.map(place, jax.eval_shape(embed, trained, frozen))
    trained, frozen = (placed(state, mesh, "dit.") for state in (trained, frozen))

    def forward(trained: PyTree, streams: Streams, frozen: PyTree, inputs: BlockInputs) -> Streams:
        with use_mesh(mesh):
            dit = nnx.merge(graph, trained, frozen)
            return dit.apply_blocks(streams, inputs, first, first + 1)

    def both(trained: PyTree, streams: PyTree, change: PyTree, *rest: PyTree) -> PyTree:
        run = lambda trained, streams: forward(trained, streams, *rest)  # noqa: E731
        out, pull = jax.vjp(run, trained, streams)
        return out, *pull(change)

    options = compiler_options(mesh)
    if not backward:
        program = jax.jit(forward, compiler_options=options)
        return compiled(program, mesh, trained, streams, frozen, inputs)
    where = jax.tree.map(lambda x: x.sharding, (streams, trained, streams))
    program = jax.jit(both, out_shardings=where, compiler_options=options)
    return compiled(program, mesh, trained, streams, streams, frozen, inputs)
