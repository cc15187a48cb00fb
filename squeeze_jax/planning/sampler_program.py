"""The staged sampler, compiled for a TPU topology that nobody has to own, and how long a batch of images will take."""

from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from squeeze_jax.batch import Context, HiddenStates, References
from squeeze_jax.checkpoints.build import build_system
from squeeze_jax.config import Config
from squeeze_jax.models.backbone import Modulation
from squeeze_jax.planning.chips import Chip
from squeeze_jax.planning.estimate import KERNEL_SHARE, Estimate, Kernel, block_program, sequence
from squeeze_jax.planning.flops import matmul_flops
from squeeze_jax.planning.network import network_seconds
from squeeze_jax.planning.report import Report, described, reached
from squeeze_jax.planning.train_program import Compiled, abstract_batch, compiled, placed
from squeeze_jax.sampling.denoiser import Prepared
from squeeze_jax.sampling.sampler import denoise, initial_state, prepare
from squeeze_jax.sampling.schedule import MAX_STEPS, STAGES, Schedule
from squeeze_jax.sampling.settings import Settings, resolve
from squeeze_jax.sampling.solver_config import DEFAULT_SOLVER
from squeeze_jax.sharding import batch_sharding, compiler_options, use_mesh

Evaluation = tuple[bool, bool]
"""Whether a velocity sees the MLLM's tokens, and whether it sees the references'."""


def schedule_of(config: Config, references: int) -> Schedule:
    """The config's own steps and stage borders, at its own size."""
    shown = references > 0 and any(stage.references for stage in config.training.stages)
    return resolve(Settings(), config).make_schedule(config, shown)


def evaluations(config: Config, references: int) -> list[tuple[Evaluation, int]]:
    """How often an image's velocity is evaluated with which conditions, stage by stage; without any: CFG's other branch."""
    borders = schedule_of(config, references).borders.tolist()
    steps = [(kind, end - start) for kind, start, end in zip(STAGES, [0, *borders], borders) if end > start]
    guided = config.sampling.cfg_scale != 1.0
    return [*steps, *([((False, False), config.sampling.steps)] if guided else [])]


def compile_sampler(config: Config, mesh: Mesh, images: int, references: int = 1) -> Compiled:
    """The sampler that `sample` runs for the config's size, every image with a prompt and references of its own."""
    system = nnx.eval_shape(lambda: build_system(config, with_base=False))
    graph, state = nnx.split(system)
    schedule = schedule_of(config, references)
    split = images % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0
    where = batch_sharding(mesh) if split else NamedSharding(mesh, PartitionSpec())
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), abstract_batch(config, images, references)
    )
    everywhere = NamedSharding(mesh, PartitionSpec())
    numbers = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), (schedule, jnp.zeros(3)))
    shown = batch.references if any(kind[1] for kind, _ in evaluations(config, references)) else None
    guided = (config.sampling.cfg_scale != 1.0,) * 3

    @partial(jax.jit, compiler_options=compiler_options(mesh))
    def sampler(leaves: Any, noise: Any, states: Any, shown: Any, schedule: Schedule, scales: Any) -> jax.Array:
        system = nnx.merge(graph, *leaves)
        with use_mesh(mesh):
            prepared = prepare(system, states, shown, schedule, config.diffusion.guidance)
            span = jnp.array([0, MAX_STEPS])
            state = initial_state(noise, DEFAULT_SOLVER, config.model.dit.width)
            return denoise(system, state, config.target_grid, prepared, schedule, scales, span, guided=guided).x

    trips = [steps for kind, steps in evaluations(config, references) if kind != (False, False)]
    if shown is not None:  # a stage without steps is a loop of the program all the same
        borders = [0, *schedule.borders.tolist()]
        trips = [end - start for start, end in pairwise(borders)]
    return compiled(sampler, mesh, (placed(state, mesh),), batch.target, batch.hidden_states, shown, *numbers, trips=trips)


def image_flops(config: Config, references: int = 1) -> int:
    """FLOPs of one image: context, references and modulation once, then every evaluation of the velocity."""
    graph, state = nnx.split(nnx.eval_shape(lambda: build_system(config, with_base=False)))
    batch, schedule = abstract_batch(config, 1, references), schedule_of(config, references)
    kinds = evaluations(config, references)
    shown = batch.references if any(vae for (_, vae), _ in kinds) else None
    schedule = schedule._replace(times=schedule.times[: config.sampling.steps + 1])

    def once(state: nnx.State, states: HiddenStates, references: References | None) -> Prepared:
        return prepare(nnx.merge(graph, state), states, references, schedule, config.diffusion.guidance)

    prepared = jax.eval_shape(once, state, batch.hidden_states, shown)
    nothing = Context(*(jax.ShapeDtypeStruct((x.shape[0], 0, *x.shape[2:]), x.dtype) for x in prepared.context))

    def velocity(kind: Evaluation) -> int:
        def run(state: nnx.State, target: jax.Array, context: Context, references: Any, modulation: Modulation) -> Any:
            system, t = nnx.merge(graph, state), jnp.ones(1)
            return system.velocity(target, config.target_grid, t, context, references, modulation=modulation.at(0))

        mllm, vae = kind
        context = prepared.context if mllm else nothing
        return matmul_flops(run, state, batch.target, context, prepared.references if vae else None, prepared.modulation)

    return matmul_flops(once, state, batch.hidden_states, shown) + sum(steps * velocity(kind) for kind, steps in kinds)


def batch_estimate(config: Config, mesh: Mesh, chip: Chip, whole: Compiled, images: int, references: int = 1) -> Estimate:
    """Of a batch of images, compiled as `whole`: blocks' times are linear in their tokens, measured at two lengths."""
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
    for name, depth in (("double", dit.num_double_blocks), ("single", dit.num_single_blocks)):
        short = block_program(config, mesh, name, rows, 0, target, backward=False)
        long = block_program(config, mesh, name, rows, context, kept, backward=False)
        for tokens, steps in lengths:
            share = (tokens - target) / (context + kept - target)
            seconds += depth * steps * (short.expected(chip) + share * (long.expected(chip) - short.expected(chip)))
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


def sample_report(config: Config, mesh: Mesh, chip: Chip, references: int = 1, images: int = 0) -> tuple[Report, Compiled]:
    """The plan of sampling `images` at once (0: one for every place that holds examples)."""
    images = images or mesh.shape["data"] * mesh.shape["fsdp"]
    flops = images * image_flops(config, references)
    whole = compile_sampler(config, mesh, images, references)
    estimate = batch_estimate(config, mesh, chip, whole, images, references)
    report = described(config, mesh, chip, whole, references)
    report |= {
        "what": "sample",
        "examples_per_step": images,
        "sampling_steps": config.sampling.steps,
        "model_flops_per_step": flops,
        "model_flops_per_image": flops // images,
        **reached(flops, estimate, mesh, chip),
        "examples_per_second": images / estimate.total,
    }
    return report, whole
