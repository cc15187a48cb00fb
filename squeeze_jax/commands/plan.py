"""`plan`: what a pod run will need and take, before anyone pays for it."""

import os
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from squeeze_jax.commands.run import guarded

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # beside another process that holds the library
}
"""What the TPU compiler has to find before JAX is imported, on a machine without TPUs."""


@dataclass(frozen=True)
class Plan:
    """Compiles a preset's real train step for a TPU topology and prints memory, FLOPs, traffic and the time to expect.

    Any field of the preset can be overridden, as with train.py (`--data.batch-per-chip 2`).
    """

    preset: Annotated[Path, tyro.conf.Positional]
    """File of configs/; paths of checkpoints in it are not looked at."""
    topology: str
    """Chip and shape of a slice, such as v5p:2x2x4."""
    slices: int = 1
    """Slices of that shape, joined by the network."""
    mesh: str | None = None
    """data=1,fsdp=16,tensor=1; none: the preset's, with all chips on fsdp."""
    what: Literal["train"] = "train"
    references: int = 1
    """Square references of each example."""
    chip_hour: float | None = None
    """Price of a chip for an hour, to add the cost."""
    json: Path | None = None
    """Where to write all of it, in bytes."""
    hlo: Path | None = None
    """Where to write the compiled program's text."""


def main(arguments: list[str] | None = None) -> int:
    os.environ.update({name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()})
    arguments = sys.argv[1:] if arguments is None else arguments
    given, overrides = tyro.cli(Plan, args=arguments, prog="squeeze_jax plan", return_unknown_args=True)
    return guarded(lambda: run(given, overrides))


def run(given: Plan, overrides: list[str]) -> None:
    from squeeze_jax.config import load_preset, override
    from squeeze_jax.errors import InputError
    from squeeze_jax.interop.tensors import write_json
    from squeeze_jax.planning import program
    from squeeze_jax.sharding import AXES

    config = override(load_preset(given.preset), overrides, f"squeeze_jax plan {given.preset}")
    parallel, stage = config.parallel, config.training.stages[-1]
    sizes = {"data": parallel.data, "fsdp": parallel.fsdp, "tensor": parallel.tensor}
    if given.mesh is not None:
        try:
            sizes = dict.fromkeys(AXES, 1) | {k: int(v) for k, v in (part.split("=") for part in given.mesh.split(","))}
        except ValueError:
            raise InputError(f"--mesh {given.mesh!r} is not understood; write data=1,fsdp=8,tensor=1") from None
        if unknown := set(sizes) - set(AXES):
            raise InputError(f"--mesh has no axis {', '.join(sorted(unknown))}; there are {', '.join(AXES)}")
    mesh, chip = program.topology_mesh(given.topology, sizes, given.slices, config.model.dit.heads)
    rows = config.data.batch_per_chip * mesh.shape["data"] * mesh.shape["fsdp"] * config.optimizer.accumulate
    shape = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    print(f"{config.name} on {given.slices} x {given.topology}: {mesh.size} chips, {shape}; {rows} examples a step")
    state, split = program.abstract_system(config)
    trained, frozen = program.count(state.trained), program.count(split.frozen)
    print(f"parameters        {trained:,} trained, {frozen:,} frozen")
    flops = program.step_flops(config, stage, rows, given.references)
    print(f"model FLOPs       {flops / 1e12:,.1f} T a step ({flops / rows / 1e12:.1f} T an example)", flush=True)

    compiled = program.compile_train_step(config, mesh, stage, given.references)
    gib = 2**30
    fits = compiled.total <= chip.memory
    print(
        f"HBM a chip        {compiled.total / gib:.2f} GiB of {chip.memory / gib:.0f}: "
        f"arguments {compiled.arguments / gib:.2f}, "
        f"temporaries {compiled.temporaries / gib:.2f}, output {compiled.output / gib:.2f} "
        f"({compiled.aliased / gib:.2f} of it in place){'' if fits else '   DOES NOT FIT'}"
    )
    traffic: dict[tuple[str, tuple[str, ...]], int] = defaultdict(int)
    for one in compiled.collectives:
        traffic[one.kind, one.axes] += one.sent * one.times
    for (kind, axes), sent in sorted(traffic.items(), key=lambda item: -item[1]):
        if sent >= 1e6:
            print(f"  {kind:20}{'+'.join(axes) or '-':14}{sent / 1e9:10.3f} GB a chip")
    largest = max((one.largest for one in compiled.collectives), default=0)
    print(f"largest of them   {largest / 1e6:.0f} MB on a chip")
    network = sum(sent for (_, axes), sent in traffic.items() if given.slices > 1 and "data" in axes)
    links = sum(traffic.values()) - network
    times = {
        "compute": flops / mesh.size / chip.flops / REACHED,
        "links": links / chip.link_rate,
        "network": network / chip.network_rate,
    }
    seconds = max(times.values())
    print("roofline          " + ", ".join(f"{name} {1e3 * value:.0f} ms" for name, value in times.items()))
    utilisation = flops / mesh.size / chip.flops / seconds
    steps = sum(stage.steps for stage in config.training.stages)
    hours = steps * seconds * mesh.size / 3600
    print(
        f"to expect         {seconds:.3f} s a step, {rows / seconds:.1f} examples/s, {100 * utilisation:.0f} % of peak; "
        f"{steps:,} steps: {hours:,.0f} chip-hours" + (f", {hours * given.chip_hour:,.0f}" if given.chip_hour else "")
    )
    print(f"compiled in       {compiled.seconds:.0f} s")
    if given.hlo is not None:
        given.hlo.write_text(compiled.text)
    if given.json is not None:
        report: dict[str, Any] = {
            "preset": config.name,
            "topology": given.topology,
            "slices": given.slices,
            "mesh": dict(mesh.shape),
            "examples_per_step": rows,
            "parameters": {"trained": trained, "frozen": frozen},
            "fits": fits,
            "hbm_capacity": chip.memory,
            "hbm_per_chip": {
                "arguments": compiled.arguments,
                "temporaries": compiled.temporaries,
                "output": compiled.output,
                "aliased": compiled.aliased,
                "total": compiled.total,
            },
            "model_flops_per_step": flops,
            "collectives": [
                {"kind": kind, "axes": list(axes), "bytes_per_chip": sent} for (kind, axes), sent in traffic.items()
            ],
            "largest_collective": largest,
            "roofline_seconds": times,
            "predicted_step_seconds": seconds,
            "predicted_mfu": utilisation,
            "chip_hours": hours,
            "compile_seconds": compiled.seconds,
        }
        write_json(given.json, report)
        print(f"report: {given.json}")


REACHED = 0.68
"""Share of the peak that large products reach: the TPU compiler's own estimate of a 1024x1024 forward on v5p takes 237 ms
for 74.5 TFLOP. A first estimate; rematerialisation and memory-bound parts are not in it."""
