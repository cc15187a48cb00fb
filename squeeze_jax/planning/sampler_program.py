"""The staged sampler, compiled for a TPU topology that nobody has to own: memory and time.

What `Pipeline.load` keeps is known without a compiler: `kept_weights` counts it to the byte.
"""

import math
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from squeeze_jax.array_types import PyTree
from squeeze_jax.batch import Context, HiddenStates, References
from squeeze_jax.checkpoints.build import random_encoders
from squeeze_jax.checkpoints.inference import sampling_shapes
from squeeze_jax.config import Config
from squeeze_jax.models.backbone import Modulation
from squeeze_jax.planning.chips import Chip
from squeeze_jax.planning.estimate import (
    KERNEL_SHARE,
    Estimate,
    Kernel,
    StackName,
    block_program,
    sequence,
)
from squeeze_jax.planning.flops import matmul_flops
from squeeze_jax.planning.network import network_seconds
from squeeze_jax.planning.report import Report, described, reached
from squeeze_jax.planning.train_program import Compiled, abstract_batch, compiled, placed
from squeeze_jax.sampling.denoiser import Prepared
from squeeze_jax.sampling.sampler import denoise, initial_state, prepare
from squeeze_jax.sampling.schedule import MAX_STEPS, STAGES, Schedule
from squeeze_jax.sampling.settings import Settings, resolve
from squeeze_jax.sampling.solver_config import DEFAULT_SOLVER
from squeeze_jax.sharding import batch_sharding, compiler_options, make_mesh, use_mesh

Evaluation = tuple[bool, bool]
"""Whether a velocity sees the MLLM's tokens, and whether it sees the references'."""


class KeptWeights(NamedTuple):
    """Bytes of weights that a loaded pipeline keeps on each device of its mesh."""

    system: int
    """Transformer and aggregator."""
    autoencoder: int
    mllm: int
    """0 where PyTorch runs it (`model.mllm_source` transformers), whose memory is its own."""


def kept_weights(config: Config, mesh: Mesh, *, merge_lora: bool = True) -> KeptWeights:
    """Counts what `Pipeline.load` keeps on each device; every device keeps as much."""
    encoders = nnx.eval_shape(lambda: random_encoders(config, nnx.Rngs(0)))
    mllm = nnx.state(encoders.mllm) if config.model.mllm_source == "internvl" else nnx.State({})
    system = sampling_shapes(config, merge_lora=merge_lora)[1]
    parts = (system, nnx.state(encoders.autoencoder), mllm)
    return KeptWeights(*(bytes_on_each(placed(state, mesh)) for state in parts))


RESERVED = 1 / 8
"""Of a device's memory, left for what programs need beside weights (our decision; at 512 x 512 the
compiler finds about 2 GiB on v5p)."""


def mllm_fits(config: Config, mesh: Mesh | None, *, merge_lora: bool = True) -> bool:
    """Whether this machine's devices can keep the MLLM beside the rest; True where none says."""
    mesh = make_mesh(devices=jax.local_devices()[:1]) if mesh is None else mesh
    limit = (mesh.devices.flat[0].memory_stats() or {}).get("bytes_limit")
    kept = sum(kept_weights(config, mesh, merge_lora=merge_lora))
    return limit is None or kept <= (1 - RESERVED) * limit


def bytes_on_each(shapes: nnx.State) -> int:
    """Bytes of placed shapes on one device: the table cuts evenly or not at all."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(shapes)
    )


def schedule_of(config: Config, references: int) -> Schedule:
    """The config's own steps and stage borders, at its own size."""
    shown = references > 0 and any(stage.references for stage in config.training.stages)
    return resolve(Settings(), config).make_schedule(config, shown)


def evaluations(config: Config, references: int) -> list[tuple[Evaluation, int]]:
    """How often an image's velocity is evaluated with which conditions, stage by stage; without
    any: CFG's other branch."""
    borders = schedule_of(config, references).borders.tolist()
    steps = [
        (kind, end - start)
        for kind, start, end in zip(STAGES, [0, *borders], borders)
        if end > start
    ]
    guided = config.sampling.cfg_scale != 1.0
    return [*steps, *([((False, False), config.sampling.steps)] if guided else [])]


def compile_sampler(
    config: Config, mesh: Mesh, images: int, references: int = 1, *, merge_lora: bool = True
) -> Compiled:
    """The sampler that `sample` runs for the config's size, every image with a prompt and
    references of its own."""
    graph, state = sampling_shapes(config, merge_lora=merge_lora)
    schedule = schedule_of(config, references)
    split = images % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0
    where = batch_sharding(mesh) if split else NamedSharding(mesh, PartitionSpec())
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        abstract_batch(config, images, references),
    )
    everywhere = NamedSharding(mesh, PartitionSpec())
    numbers = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
        (schedule, jnp.zeros(3)),
    )
    shown = (
        batch.references if any(kind[1] for kind, _ in evaluations(config, references)) else None
    )
    guided = (config.sampling.cfg_scale != 1.0,) * 3

    @partial(jax.jit, compiler_options=compiler_options(mesh))
    def sampler(
        leaves: PyTree,
        noise: jax.Array,
        states: HiddenStates,
        shown: References | None,
        schedule: Schedule,
        scales: jax.Array,
    ) -> jax.Array:
        system = nnx.merge(graph, *leaves)
        with use_mesh(mesh):
            prepared = prepare(system, states, shown, schedule, config.diffusion.guidance)
            span = jnp.array([0, MAX_STEPS])
            state = initial_state(noise, DEFAULT_SOLVER, config.model.dit.width)
            return denoise(
                system, state, config.target_grid, prepared, schedule, scales, span, guided=guided
            ).x

    trips = [steps for kind, steps in evaluations(config, references) if kind != (False, False)]
    if shown is not None:  # a stage without steps is a loop of the program all the same
        borders = [0, *schedule.borders.tolist()]
        trips = [end - start for start, end in pairwise(borders)]
    return compiled(
        sampler,
        mesh,
        (placed(state, mesh),),
        batch.target,
        batch.hidden_states,
        shown,
        *numbers,
        trips=trips,
    )


def image_flops(config: Config, references: int = 1, *, merge_lora: bool = True) -> int:
    """FLOPs of one image: context, references and modulation once, then every evaluation of the
    velocity. Adapters that are merged cost none."""
    graph, state = sampling_shapes(config, merge_lora=merge_lora)
    batch, schedule = abstract_batch(config, 1, references), schedule_of(config, references)
    kinds = evaluations(config, references)
    shown = batch.references if any(vae for (_, vae), _ in kinds) else None
    schedule = schedule._replace(times=schedule.times[: config.sampling.steps + 1])

    def once(state: nnx.State, states: HiddenStates, references: References | None) -> Prepared:
        return prepare(
            nnx.merge(graph, state), states, references, schedule, config.diffusion.guidance
        )

    prepared = jax.eval_shape(once, state, batch.hidden_states, shown)
    nothing = Context(
        *(jax.ShapeDtypeStruct((x.shape[0], 0, *x.shape[2:]), x.dtype) for x in prepared.context)
    )

    def velocity(kind: Evaluation) -> int:
        def run(
            state: nnx.State,
            target: jax.Array,
            context: Context,
            references: References | None,
            modulation: Modulation,
        ) -> PyTree:
            system, t = nnx.merge(graph, state), jnp.ones(1)
            return system.velocity(
                target, config.target_grid, t, context, references, modulation=modulation.at(0)
            )

        mllm, vae = kind
        context = prepared.context if mllm else nothing
        return matmul_flops(
            run,
            state,
            batch.target,
            context,
            prepared.references if vae else None,
            prepared.modulation,
        )

    return matmul_flops(once, state, batch.hidden_states, shown) + sum(
        steps * velocity(kind) for kind, steps in kinds
    )


def batch_estimate(
    config: Config,
    mesh: Mesh,
    chip: Chip,
    whole: Compiled,
    images: int,
    references: int = 1,
    *,
    merge_lora: bool = True,
) -> Estimate:
    """Of a batch of images, compiled as `whole`: blocks' times are linear in their tokens, measured
    at two lengths."""
    dit = config.model.dit
    cut = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = images // cut if images % cut == 0 else images
    context, image = sequence(config, references)
    target = config.target_grid[0] * config.target_grid[1]
    kept = image if dit.reference_attention == "joint" else target
    seconds = moved = kernels = 0.0
    blocks = dit.num_double_blocks + dit.num_single_blocks
    lengths = []
    for (mllm, vae), steps in evaluations(config, references):
        joint = target + mllm * context + vae * (kept - target)
        lengths.append((joint, steps))
        seen = joint + vae * (image - kept)  # keys that are only looked at
        kernels += steps * Kernel(joint, dit.width, blocks, seen).flops(False, False)
    stacks: tuple[tuple[StackName, int], ...] = (
        ("double", dit.num_double_blocks),
        ("single", dit.num_single_blocks),
    )
    for name, depth in stacks:
        program = partial(
            block_program, config, mesh, name, rows, backward=False, merge_lora=merge_lora
        )
        short, long = program(0, target), program(context, kept)
        for tokens, steps in lengths:
            share = (tokens - target) / (context + kept - target)
            seconds += (
                depth
                * steps
                * (short.expected(chip) + share * (long.expected(chip) - short.expected(chip)))
            )
            moved += depth * steps * (short.traffic + share * (long.traffic - short.traffic))
    links, network, exposed = network_seconds(whole.collectives, mesh, chip)
    return Estimate(
        whole.expected(chip) + seconds,
        rows * kernels / mesh.shape["tensor"] / (KERNEL_SHARE * chip.flops),
        links,
        network,
        exposed,
        whole.traffic + moved,
    )


def sample_report(
    config: Config,
    mesh: Mesh,
    chip: Chip,
    references: int = 1,
    images: int = 0,
    *,
    merge_lora: bool = True,
) -> tuple[Report, Compiled]:
    """The plan of sampling `images` at once (0: one for every place that holds examples).

    It fits where the program and the autoencoder do, as `sample` has it: the MLLM is freed before
    the transformer is loaded. `fits_with_mllm` is for who keeps it, as the app does.
    """
    images = images or mesh.shape["data"] * mesh.shape["fsdp"]
    flops = images * image_flops(config, references, merge_lora=merge_lora)
    whole = compile_sampler(config, mesh, images, references, merge_lora=merge_lora)
    estimate = batch_estimate(config, mesh, chip, whole, images, references, merge_lora=merge_lora)
    kept = kept_weights(config, mesh, merge_lora=merge_lora)
    report = described(config, mesh, chip, whole, references)
    report |= {
        "what": "sample",
        "merge_lora": merge_lora,
        "weights_per_chip": kept._asdict(),
        "fits": whole.total + kept.autoencoder <= chip.memory,
        "fits_with_mllm": whole.total + kept.autoencoder + kept.mllm <= chip.memory,
        "examples_per_step": images,
        "sampling_steps": config.sampling.steps,
        "model_flops_per_step": flops,
        "model_flops_per_image": flops // images,
        **reached(flops, estimate, mesh, chip),
        "examples_per_second": images / estimate.total,
    }
    return report, whole
