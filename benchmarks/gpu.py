"""The full system on one NVIDIA GPU, random weights and made-up examples: the train step, and
sampling beside PyTorch's.

    python benchmarks/gpu.py attention              (kernels against float32, and their speed)
    python benchmarks/gpu.py train [--tries 1:save_products 2:save_products …]
        [--sides ours checkpointed plain compiled]
    python benchmarks/gpu.py sample [--sizes 512 1024]
        [--sides ours unmerged apart diffusers compiled]

`train` is stage 2 as `train.py configs/flux_stage2.py` runs it (12B frozen in bfloat16, LoRA of
rank 512 and aggregator in float32 with AdamW, 512 x 512, one reference), for a batch and remat
policy a try. Utilisation is model FLOPs (nothing counted twice for being rematerialised) over
989 TFLOP/s. The other sides are PyTorch's (`gpu_torch.py`): diffusers' transformer with PEFT's LoRA
and no aggregator, whose FLOPs are counted as ours all the same.

`sample` takes 25 steps with the paper's τ and guidance 2.5, one image with one reference of
512 x 512, in bfloat16:

    ours       `sampling.sampler`, the aggregator's forward included, weights as `Pipeline.load`
               keeps them: the LoRA merged
    unmerged   the same with the LoRA beside its kernels (`merge_lora=False`)
    apart      ours with every block's weights as arrays of their own (`Pipeline.unrolled`)
    diffusers  FluxTransformer2DModel on the same token counts, as it is, without a LoRA
    compiled   the same with its repeated blocks compiled by torch.compile

Each side runs in a process of its own, so that memory is its own.
"""

import argparse
import dataclasses
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

STEPS, TAU, SCALE, REFERENCE, TEXT, IMAGE = 25, (0.95, 0.85), 2.5, 32, 128, 256
PEAK = 989e12


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("attention", "train", "sample"))
    parser.add_argument("--tries", nargs="*", default=["1:save_products", "4:save_products"])
    parser.add_argument("--sizes", type=int, nargs="*", default=[512, 1024])
    parser.add_argument("--sides", nargs="*", help="default: all of `train`, or of `sample`")
    parser.add_argument("--rank", type=int, default=512, help="of PyTorch's LoRA; ours has 512")
    parser.add_argument(
        "--depth",
        type=int,
        nargs=2,
        default=[19, 38],
        help="double and single blocks; FLUX.1 has 19 38",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--profile",
        type=Path,
        help="writes a trace of one step, or one image of ours, into this folder",
    )
    parser.add_argument("--here", help=argparse.SUPPRESS)  # this process is a side's own
    given = parser.parse_args()
    if given.what == "attention":
        attention()
    elif given.what == "train" and given.here == "ours":
        train(given.tries, given.depth, given.rounds, given.profile)
    elif given.what == "train" and given.here:
        from gpu_torch import train_theirs

        batches = list(dict.fromkeys(int(each.split(":")[0]) for each in given.tries))
        train_theirs(given.here, batches, given.depth, given.rank, given.rounds)
    elif given.what == "train":
        for side in given.sides or ["ours", "checkpointed", "plain", "compiled"]:
            subprocess.run([sys.executable, *sys.argv, "--here", side], check=False)
    elif given.here in ("ours", "unmerged", "apart"):
        sample_ours(given.here, given.sizes, given.depth, given.rounds, given.profile)
    elif given.here:
        sample_theirs(given.sizes, given.depth, given.rounds, compiled=given.here == "compiled")
    else:
        print("| side | size | s an image | model TFLOP an image | TFLOP/s | peak GiB |")
        print("|---" * 6 + "|", flush=True)
        for side in given.sides or ["ours", "unmerged", "apart", "diffusers", "compiled"]:
            subprocess.run([sys.executable, *sys.argv, "--here", side], check=False)


def timed(run, rounds: int) -> float:
    """Median seconds of `run`, which waits for its result; it was run before."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def config_of(depth):
    """Stage 2 without a folder of weights: random values lie where the published base's would."""
    from squeeze_jax.config import load_preset

    config = load_preset(Path(__file__).parents[1] / "configs" / "flux_stage2.py")
    dit = dataclasses.replace(
        config.model.dit, num_double_blocks=depth[0], num_single_blocks=depth[1]
    )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dit=dit, dit_weights=None))


def random_leaves(shapes, seed: int = 0):
    """Random arrays of these shapes: kernels of 1/sqrt(fan in), others 0.1, norms around 1."""
    import jax
    import jax.numpy as jnp

    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)

    def make():
        for i, (path, leaf) in enumerate(leaves):
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                yield jnp.ones(leaf.shape, leaf.dtype)
                continue
            name = jax.tree_util.keystr(path)
            matrix = any(part in name for part in ("kernel", "down", "up"))
            size = leaf.shape[-2] ** -0.5 if matrix else 0.1
            noise = size * jax.random.normal(
                jax.random.fold_in(jax.random.key(seed), i), leaf.shape, leaf.dtype
            )
            yield noise + ("scale" in name and not matrix)

    return jax.jit(lambda: jax.tree.unflatten(tree, list(make())))()


def train(tries: list[str], depth, rounds: int, profile: Path | None) -> None:
    import jax

    from squeeze_jax.planning.train_program import (
        abstract_input,
        abstract_system,
        count,
        step_flops,
    )
    from squeeze_jax.sharding import make_mesh
    from squeeze_jax.training.optimizer import make_optimizer
    from squeeze_jax.training.state import make_state, state_shardings
    from squeeze_jax.training.step import make_train_step

    config, device = config_of(depth), jax.devices()[0]
    stage, optimizer, mesh = (
        config.training.stages[-1],
        make_optimizer(config),
        make_mesh(devices=[device]),
    )
    shapes, split = abstract_system(config)
    frozen = random_leaves(split.frozen)
    state = make_state(random_leaves(shapes.params, 1), optimizer, config, mesh)
    where = state_shardings(state, mesh)
    print(
        f"{device.device_kind}; {count(frozen):,} frozen, {count(state.params):,} trained values",
        flush=True,
    )
    print(
        "| batch | remat | compiled in, s | s a step | model TFLOP | MFU, % "
        "| GiB, compiled program | loss |"
    )
    print("|---" * 8 + "|", flush=True)
    for each in tries:
        rows, remat = int(each.split(":")[0]), each.split(":")[1]
        tried = dataclasses.replace(
            config, parallel=dataclasses.replace(config.parallel, remat=remat)
        )
        batch = random_leaves(abstract_input(tried, rows, 1), 2)
        step = make_train_step(abstract_system(tried)[1], optimizer, tried, stage, where)
        start = time.perf_counter()
        program = step.lower(state, frozen, batch).compile()
        compiling, memory = time.perf_counter() - start, program.memory_analysis()
        total = (
            memory.argument_size_in_bytes + memory.temp_size_in_bytes
            + memory.output_size_in_bytes - memory.alias_size_in_bytes
        )  # fmt: skip
        if total > (device.memory_stats() or {}).get("bytes_limit", total):
            print(
                f"| {rows} | {remat} | {compiling:.0f} | does not fit | | "
                f"| {total / 2**30:.1f} | |",
                flush=True,
            )
            continue
        state, metrics = program(state, frozen, batch)
        loss, seconds = float(metrics.loss), []
        for _ in range(rounds):
            start = time.perf_counter()
            state, metrics = program(state, frozen, batch)
            loss = float(metrics.loss)
            seconds.append(time.perf_counter() - start)
        each_step, flops = statistics.median(seconds), step_flops(tried, stage, rows)
        if profile is not None:
            with jax.profiler.trace(profile / f"train-{rows}-{remat}"):
                state, metrics = program(state, frozen, batch)
                loss = float(metrics.loss)
        print(
            f"| {rows} | {remat} | {compiling:.0f} | {each_step:.3f} | {flops / 1e12:.0f} | "
            f"{100 * flops / each_step / PEAK:.1f} | {total / 2**30:.1f} | {loss:.4f} |",
            flush=True,
        )
    print(
        "peak of the process: "
        f"{(device.memory_stats() or {}).get('peak_bytes_in_use', 0) / 2**30:.1f} GiB"
    )


def stages_of(side: int):
    """The schedule, and (conditions, steps) of each stage."""
    from squeeze_jax.sampling.schedule import STAGES, make_schedule

    schedule = make_schedule(STEPS, side * side, *TAU, references=True)
    return schedule, [
        (kind, int(b - a)) for kind, (a, b) in zip(STAGES, pairwise([0, *schedule.borders]))
    ]


def sample_ours(which: str, sizes: list[int], depth, rounds: int, profile: Path | None) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from squeeze_jax.checkpoints.inference import sampling_shapes
    from squeeze_jax.diffusion.latents import reference_positions
    from squeeze_jax.layers.stack import unstack
    from squeeze_jax.models.dit import BLOCK_STACKS
    from squeeze_jax.planning.sampler_program import image_flops
    from squeeze_jax.planning.train_program import abstract_batch
    from squeeze_jax.sampling.sampler import make_sampler
    from squeeze_jax.sampling.schedule import noise_for

    config, merge_lora = config_of(depth), which != "unmerged"
    graph, shapes = sampling_shapes(config, merge_lora=merge_lora)
    leaves, device = random_leaves(shapes), jax.devices()[0]
    if which == "apart":
        leaves = unstack(leaves, BLOCK_STACKS, donate=True)
    for size in sizes:
        side = size // 16
        data = dataclasses.replace(
            config.data, height=size, width=size, reference_long_side=16 * REFERENCE
        )
        sized = dataclasses.replace(config, data=data)
        made = random_leaves(abstract_batch(sized, 1, 1), 2)
        places = jnp.asarray(reference_positions((side, side), [(REFERENCE, REFERENCE)]))[None]
        references = made.references._replace(positions=places)
        schedule, _ = stages_of(side)
        sampler = make_sampler(graph, target_grid=(side, side), guided=(True,) * 3, guidance=1.0)
        noise, scales = noise_for([0], side * side, 64), np.full(3, SCALE, np.float32)

        inputs = (noise, made.hidden_states, references, schedule, scales)

        def run(sampler=sampler, inputs=inputs):
            return np.asarray(sampler((leaves,), *inputs))

        start = time.perf_counter()
        assert np.isfinite(run()).all()
        compiling = time.perf_counter() - start
        if profile is not None:
            with jax.profiler.trace(profile / f"{which}-{size}"):
                run()
        name = f"{which}, jax {jax.__version__} (first run {compiling:.0f} s)"
        flops = image_flops(sized, merge_lora=merge_lora)
        report(name, size, timed(run, rounds), flops, device.memory_stats())


def sample_theirs(sizes: list[int], depth, rounds: int, *, compiled: bool) -> None:
    import diffusers
    import torch

    from squeeze_jax.interop.flux import config_to_json
    from squeeze_jax.planning.sampler_program import image_flops

    config = config_of(depth)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fields = {k: v for k, v in config_to_json(config.model.dit).items() if k[0] != "_"}
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        twin = diffusers.FluxTransformer2DModel(**fields).eval()
    if compiled:
        torch._dynamo.config.cache_size_limit = 64
        twin.compile_repeated_blocks(fullgraph=True, dynamic=False)

    def normal(*shape: int):
        return torch.randn(*shape, device=device)

    for size in sizes:
        side = size // 16
        data = dataclasses.replace(
            config.data, height=size, width=size, reference_long_side=16 * REFERENCE
        )
        schedule, stages = stages_of(side)
        target = side * side
        start_at, shown = normal(1, target, 64), normal(1, REFERENCE**2, 64)
        said = normal(1, TEXT + IMAGE, config.model.dit.context_width)
        grids = ((side, 0), (REFERENCE, side))  # side, and where it begins
        rows = [
            torch.cartesian_prod(torch.arange(n), torch.arange(n)) + offset for n, offset in grids
        ]
        ids = torch.nn.functional.pad(torch.cat(rows), (1, 0)).to(device, torch.float32)
        pooled, one = torch.zeros(1, 768, device=device), torch.ones(1, device=device)
        times = torch.from_numpy(schedule.times).to(device, torch.bfloat16)

        def velocity(x, t, mllm: bool, vae: bool):
            tokens = torch.cat([x, shown], dim=1) if vae else x  # noqa: B023
            context = said if mllm else said[:, :0]  # noqa: B023
            return twin(
                hidden_states=tokens, encoder_hidden_states=context,
                pooled_projections=pooled, timestep=t[None],  # noqa: B023
                guidance=one, img_ids=ids[: tokens.shape[1]],  # noqa: B023
                txt_ids=torch.zeros(context.shape[1], 3, device=device),
            ).sample[:, : x.shape[1]]  # fmt: skip

        @torch.no_grad()
        def run():
            x, i = start_at, 0  # noqa: B023
            for kind, steps in stages:  # noqa: B023
                for _ in range(steps):
                    bare = velocity(x, times[i], False, False)  # noqa: B023
                    v = bare + SCALE * (velocity(x, times[i], *kind) - bare)  # noqa: B023
                    x, i = x + (times[i + 1] - times[i]) * v, i + 1  # noqa: B023
            return x.cpu()

        start = time.perf_counter()
        run()
        first = time.perf_counter() - start
        name = f"diffusers {diffusers.__version__}, torch {torch.__version__}"
        name += ", compiled" if compiled else ""
        sized = dataclasses.replace(config, data=data)
        memory = {"peak_bytes_in_use": torch.cuda.max_memory_allocated()}
        report(
            f"{name} (first run {first:.0f} s)",
            size,
            timed(run, rounds),
            image_flops(sized),
            memory,
        )


def report(side: str, size: int, seconds: float, flops: int, memory) -> None:
    peak = (memory or {}).get("peak_bytes_in_use", 0) / 2**30
    print(
        f"| {side} | {size} | {seconds:.2f} | {flops / 1e12:.0f} "
        f"| {flops / seconds / 1e12:.0f} | {peak:.1f} |",
        flush=True,
    )


def attention() -> None:
    """Our attention on this device against plain products in float32, and how long it takes."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from squeeze_jax.layers.attention import attention, plain_attention

    print("| tokens | mask | error | of gradients | forward, ms | TFLOP/s | and backward, ms |")
    print("|---" * 7 + "|")
    for tokens in (768, 2432, 8576):
        rng = np.random.default_rng(0)
        q, k, v, weight = (
            jnp.asarray(rng.standard_normal((1, tokens, 24, 128)), jnp.bfloat16) for _ in range(4)
        )
        most = jnp.asarray(rng.random((1, tokens)) < 0.7)
        for name, mask in (("none", None), ("all", jnp.ones((1, tokens), bool)), ("70 %", most)):

            def loss(q, k, v, function=attention, mask=mask, weight=weight):
                return jnp.sum(function(q, k, v, mask=mask).astype(jnp.float32) * weight)

            def whole(q, k, v, mask=mask):
                return plain_attention(q, k, v, mask)

            forward = jax.jit(lambda q, k, v, mask=mask: attention(q, k, v, mask=mask))
            both = jax.jit(jax.grad(loss, (0, 1, 2)))
            errors = ["", ""]
            if tokens < 4096:
                wide = tuple(x.astype(jnp.float32) for x in (q, k, v))
                with jax.default_matmul_precision("highest"):
                    truth = jax.jit(whole)(*wide)
                    slopes = jax.jit(
                        jax.grad(
                            lambda *x: loss(*x, function=lambda *y, mask: whole(*y)), (0, 1, 2)
                        )
                    )(*wide)
                distance = lambda a, b: float(  # noqa: E731
                    jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b)
                )
                errors[0] = f"{distance(forward(q, k, v), truth):.1e}"
                errors[1] = ", ".join(
                    f"{distance(a, b):.1e}" for a, b in zip(both(q, k, v), slopes)
                )
            times = []
            for run in (forward, both):
                run(q, k, v)
                many = lambda run=run, x=(q, k, v): jax.block_until_ready(  # noqa: E731
                    [run(*x) for _ in range(20)]
                )
                times.append(timed(many, 5) / 20)
            rate = 4 * tokens**2 * 24 * 128 / times[0] / 1e12
            print(
                f"| {tokens} | {name} | {errors[0]} | {errors[1]} | {1000 * times[0]:.3f} "
                f"| {rate:.0f} | {1000 * times[1]:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
