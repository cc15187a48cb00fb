"""The staged sampler beside a naive one and PyTorch's, all in one run: seconds an image, FLOPs, agreement.

    python benchmarks/sampling.py [--references 1 2 4] [--rounds 3]     (needs the `parity` extra for diffusers' row)

The transformer of `flux_small.py` (2 + 4 blocks, width 256), 1,024 target tokens, 1,024 a reference, 320 of the MLLM, 25
steps, the paper's τ and guidance 2.5, one image, float32:

    naive     all tokens in every step, masked; context, modulation and everything else made anew in each
    joint     `sampling.sampler` with references in joint attention
    cached    the same where references see each other alone (other weights would be trained for it)
    diffusers FluxTransformer2DModel on the token counts of `joint`

Medians of interleaved rounds, so that all meet the same machine.
"""

import argparse
import os
import statistics
import time
from dataclasses import replace
from itertools import pairwise

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from naive_sampler import sample_naively

from squeeze_jax.batch import Context, HiddenStates, References
from squeeze_jax.diffusion.latents import grid_positions, reference_positions
from squeeze_jax.interop.flux import config_to_json, diffusers_entries
from squeeze_jax.interop.mapping import export_entries
from squeeze_jax.models.aggregator import Aggregator, AggregatorConfig
from squeeze_jax.models.dit import DiT, DiTConfig
from squeeze_jax.models.system import System
from squeeze_jax.planning.flops import matmul_flops
from squeeze_jax.sampling.sampler import make_sampler
from squeeze_jax.sampling.schedule import STAGES, make_schedule, noise_for

CONFIG = DiTConfig(
    context_width=256, pooled_width=64, heads=4, head_width=64,
    num_double_blocks=2, num_single_blocks=4, rope_axes=(16, 24, 24)
)
READS = AggregatorConfig(
    layers=tuple(range(5)), width=128, out_width=256, heads=4, mlp_width=256, refiner_blocks=2
)
GRID, TEXT, IMAGE, STEPS, TAU, SCALE = (32, 32), 64, 256, 25, (0.95, 0.85), 2.5
TARGET, CONTEXT = GRID[0] * GRID[1], TEXT + IMAGE


def random_system(attention: str) -> System:
    """Every leaf random, so that nothing multiplies by zero or one."""
    config = replace(CONFIG, reference_attention=attention)
    system = System(Aggregator(READS, rngs=nnx.Rngs(0)), DiT(config, unroll=4, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    flat = nnx.to_flat_state(nnx.state(system, nnx.Param))
    for path, leaf in flat:
        matrix = path[-1] == "kernel"
        noise = rng.standard_normal(leaf.shape) * (0.7 * leaf.shape[-2] ** -0.5 if matrix else 0.1)
        leaf.set_value(jnp.asarray((path[-1] == "scale" and path[0] == "dit") + noise, leaf.dtype))
    nnx.update(system, nnx.from_flat_state(flat))
    return system


def conditions(references: int) -> tuple[HiddenStates, References]:
    """Random hidden states of one prompt, and as many references of the target's size."""
    rng = np.random.default_rng(1)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    def positions(first, count):
        return np.arange(first, first + count, dtype=np.int32)[None]

    layers, width = len(READS.layers), READS.width
    states = HiddenStates(
        normal(1, layers, TEXT, width), np.ones((1, TEXT), bool), positions(IMAGE, TEXT),
        normal(1, layers, IMAGE, width), np.ones((1, IMAGE), bool), positions(0, IMAGE),
    )  # fmt: skip
    places = np.asarray(reference_positions(GRID, [GRID] * references))[None]
    count = references * TARGET
    return states, References(normal(1, count, CONFIG.in_channels), np.ones((1, count), bool), places)


def stages(schedule) -> list[tuple[tuple[bool, bool], int]]:
    """Conditions of each stage, and its steps."""
    return [(kind, int(b - a)) for kind, (a, b) in zip(STAGES, pairwise([0, *schedule.borders]))]


def counted(system: System, states: HiddenStates, references: References, schedule, way: str) -> int:
    """FLOPs of matrix products of an image, traced."""
    graph, state = nnx.split(system)

    def velocity(state, x, mllm: bool, vae: bool, modulation):
        system = nnx.merge(graph, state)
        nothing = Context(jnp.zeros((1, 0, CONFIG.context_width)), jnp.zeros((1, 0), bool))
        context = system.aggregate(states) if mllm else nothing
        shown = system.prepare_references(references) if vae else None
        return system.velocity(x, GRID, jnp.ones(1), context, shown, modulation=modulation)

    def once(state, mllm=True, vae=True):
        system = nnx.merge(graph, state)
        return system.aggregate(states) if mllm else (), system.prepare_references(references) if vae else ()

    x = jnp.zeros((1, TARGET, CONFIG.in_channels))
    times = jnp.asarray(schedule.times[: STEPS + 1])
    modulation = jax.eval_shape(lambda state: nnx.merge(graph, state).make_modulation(times), state)

    def cost(mllm: bool, vae: bool) -> int:
        run = lambda state, x, m: velocity(state, x, mllm, vae, m.at(0))  # noqa: E731
        return matmul_flops(run, state, x, modulation) - matmul_flops(lambda s: once(s, mllm, vae), state)

    if way == "naive":
        anew = lambda state, x: velocity(state, x, True, True, None)  # noqa: E731
        return 2 * STEPS * matmul_flops(anew, state, x)
    before = matmul_flops(once, state) + matmul_flops(lambda s: nnx.merge(graph, s).make_modulation(times), state)
    return before + STEPS * cost(False, False) + sum(steps * cost(*kind) for kind, steps in stages(schedule))


def by_tokens(references: int, schedule, way: str) -> float:
    """The same by the arithmetic of docs/sampling.md: 24·T·C² + 4·T·S·C a block, T queries, S keys; nothing else."""
    width, blocks = CONFIG.width, CONFIG.num_double_blocks + CONFIG.num_single_blocks

    def block(queries: int, keys: int) -> float:
        return blocks * (24.0 * queries * width**2 + 4.0 * queries * keys * width)

    shown = references * TARGET
    if way == "naive":
        tokens = TARGET + CONTEXT + shown
        return 2 * STEPS * block(tokens, tokens)
    total = STEPS * block(TARGET, TARGET) + (block(shown, shown) if way == "cached" else 0.0)
    for (mllm, vae), steps in stages(schedule):
        own = TARGET + mllm * CONTEXT
        keys = own + vae * shown
        total += steps * block(own if way == "cached" else keys, keys)
    return total


def torch_sampler(system: System, noise: np.ndarray, references: References, schedule, context: np.ndarray):
    """diffusers' transformer with our weights, taking the steps of `joint`; None where it is not installed."""
    try:
        import diffusers
        import torch
    except ImportError:
        return None
    torch.set_num_threads(os.cpu_count() or 1)
    twin = diffusers.FluxTransformer2DModel(**{k: v for k, v in config_to_json(CONFIG).items() if k[0] != "_"})
    weights = {k: torch.tensor(np.asarray(v)) for k, v in export_entries(system.dit, diffusers_entries(CONFIG)).items()}
    twin.load_state_dict(weights)
    places = np.concatenate([grid_positions(*GRID), references.positions[0]])
    ids = torch.from_numpy(np.pad(places, ((0, 0), (1, 0))).astype(np.float32))
    start, shown, mllm_tokens = (torch.from_numpy(np.array(x)) for x in (noise, references.tokens, context))
    times = schedule.times

    def velocity(x, t: float, mllm: bool, vae: bool):
        tokens = torch.cat([x, shown], dim=1) if vae else x
        said = mllm_tokens if mllm else mllm_tokens[:, :0]
        return twin(
            hidden_states=tokens, encoder_hidden_states=said, pooled_projections=torch.zeros(1, CONFIG.pooled_width),
            timestep=torch.full((1,), t), guidance=torch.ones(1), img_ids=ids[: tokens.shape[1]],
            txt_ids=torch.zeros(said.shape[1], 3),
        ).sample[:, :TARGET]  # fmt: skip

    def run() -> np.ndarray:
        x, i = start, 0
        with torch.no_grad():
            for kind, steps in stages(schedule):
                for _ in range(steps):
                    bare = velocity(x, float(times[i]), False, False)
                    v = bare + SCALE * (velocity(x, float(times[i]), *kind) - bare)
                    x, i = x + float(times[i + 1] - times[i]) * v, i + 1
        return x.numpy()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--references", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    noise, scales = noise_for([0], TARGET, CONFIG.in_channels), np.full(3, SCALE, np.float32)
    schedule = make_schedule(STEPS, TARGET, *TAU, references=True)
    print(f"steps a stage: {[steps for _, steps in stages(schedule)]}")
    print("| references | way | s an image | naive / way | TFLOP | by tokens | differs from its naive twin |")
    print("|---" * 7 + "|")
    for references in given.references:
        states, shown = conditions(references)
        ways, results, flops = {}, {}, {}
        for attention in ("joint", "cached"):
            system = random_system(attention)
            graph, leaves = nnx.split(system)
            sampler = make_sampler(graph, target_grid=GRID, guided=(True,) * 3, guidance=1.0)

            def ours(sampler=sampler, leaves=leaves, states=states, shown=shown):
                return sampler((leaves,), noise, states, shown, schedule, scales)

            @jax.jit
            def anew(leaves, states, shown, graph=graph):
                return sample_naively(nnx.merge(graph, leaves), noise, GRID, states, shown, schedule, scales)

            def naive(anew=anew, leaves=leaves, states=states, shown=shown):
                return anew(leaves, *jax.tree.map(jnp.asarray, (states, shown)))

            ways[attention], flops[attention] = ours, counted(system, states, shown, schedule, attention)
            results[f"naive {attention}"] = np.asarray(naive())
            if attention == "joint":
                ways["naive"], flops["naive"] = naive, counted(system, states, shown, schedule, "naive")
                context = np.asarray(jax.jit(lambda s, x, g=graph: nnx.merge(g, s).aggregate(x))(leaves, states).tokens)
                theirs = torch_sampler(system, np.asarray(noise), shown, schedule, context)
                if theirs is not None:
                    ways["diffusers"], flops["diffusers"] = theirs, flops["joint"]
        seconds = {way: [] for way in ways}
        for way, run in ways.items():
            results[way] = np.asarray(run())  # compiles, too
        for _ in range(given.rounds):
            for way, run in ways.items():
                start = time.perf_counter()
                np.asarray(run())
                seconds[way].append(time.perf_counter() - start)
        median = {way: statistics.median(times) for way, times in seconds.items()}
        for way in ("naive", "joint", "cached", "diffusers"):
            if way in ways:
                twin = results["naive cached" if way == "cached" else "naive joint"]
                error = np.linalg.norm(results[way] - twin) / np.linalg.norm(twin)
                tokens = by_tokens(references, schedule, "joint" if way == "diffusers" else way)
                print(
                    f"| {references} | {way} | {median[way]:.2f} | {median['naive'] / median[way]:.2f} | "
                    f"{flops[way] / 1e12:.2f} | {tokens / 1e12:.2f} | {error:.1e} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
