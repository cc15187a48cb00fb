"""A plan: everything about a run on a topology, as one dictionary (the JSON that `plan` writes)
and as lines to read."""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from jax.sharding import Mesh

from squeeze_jax.config import Config, StageConfig, global_batch
from squeeze_jax.layers.splash import padded
from squeeze_jax.planning.chips import GIB, Chip
from squeeze_jax.planning.collectives import Collective
from squeeze_jax.planning.estimate import Estimate, sequence, step_estimate
from squeeze_jax.planning.network import crosses_slices
from squeeze_jax.planning.train_program import (
    Compiled,
    TooLargeError,
    abstract_system,
    compile_train_step,
    count,
    step_flops,
)

Report = dict[str, Any]

PAPER_STAGES = (
    StageConfig(steps=25_000, references=False),
    StageConfig(steps=10_000, references=True),
)
"""The paper's two stages."""


def train_report(
    config: Config, mesh: Mesh, chip: Chip, references: int = 1
) -> tuple[Report, Compiled]:
    """Plans a training run's last stage; the time of other stages follows from their FLOPs in
    proportion."""
    stage = config.training.stages[-1]
    rows = global_batch(config, mesh.shape)
    flops = step_flops(config, stage, rows, references)
    whole = compile_train_step(config, mesh, stage, references)
    estimate = step_estimate(config, mesh, chip, stage, whole, references)
    report = described(config, mesh, chip, whole, references if stage.references else 0)

    def chip_hours(stages: Sequence[StageConfig]) -> float:
        times = sum(one.steps * step_flops(config, one, rows, references) / flops for one in stages)
        return times * estimate.total * mesh.size / 3600

    report |= {
        "what": "train",
        "examples_per_step": rows,
        "model_flops_per_step": flops,
        **reached(flops, estimate, mesh, chip),
        "examples_per_second": rows / estimate.total,
        "steps": config.total_steps,
        "chip_hours": chip_hours(config.training.stages),
        "chip_hours_25000_10000_steps": chip_hours(PAPER_STAGES),
    }
    return report, whole


def described(config: Config, mesh: Mesh, chip: Chip, whole: Compiled, references: int) -> Report:
    """The part of a plan that training and sampling share."""
    state, split = abstract_system(config)
    frozen, dit = count(split.frozen), config.model.dit
    blocks = dit.num_double_blocks + dit.num_single_blocks
    largest = max((one.largest for one in whole.collectives), default=0)
    return {
        "preset": config.name,
        "mesh": dict(mesh.shape),
        "chips": mesh.size,
        "batch_per_chip": config.data.batch_per_chip,
        "remat": config.parallel.remat,
        "parameters": {"trained": count(state.params), "frozen": frozen},
        "fits": whole.total <= chip.memory,
        "hbm_capacity": chip.memory,
        "hbm_per_chip": {
            "arguments": whole.arguments,
            "temporaries": whole.temporaries,
            "output": whole.output,
            "aliased": whole.aliased,
            "total": whole.total,
        },
        "collectives": traffic(whole.collectives, mesh),
        "largest_collective": largest,
        "gathers_more_than_a_block": largest
        > 2 * count(state.params if config.lora is None else split.frozen) / blocks,
        "holds_attention_matrix": holds_square(whole.text, sum(sequence(config, references))),
        "compile_seconds": whole.seconds,
    }


def refused(config: Config, mesh: Mesh, chip: Chip, error: TooLargeError) -> Report:
    """The plan of a program that does not fit."""
    return {
        "preset": config.name,
        "mesh": dict(mesh.shape),
        "chips": mesh.size,
        "batch_per_chip": config.data.batch_per_chip,
        "remat": config.parallel.remat,
        "fits": False,
        "hbm_capacity": chip.memory,
        "hbm_per_chip": {"total": error.needed},
    }


def holds_square(text: str, tokens: int) -> bool:
    """Returns whether a compiled program holds an array of tokens x tokens, as attention without
    a kernel does."""
    lengths = {str(tokens), str(padded(tokens))}
    shapes = (shape.split(",") for shape in set(re.findall(r"\[(\d+(?:,\d+)+)\]", text)))
    return any(shape.count(length) > 1 for shape in shapes for length in lengths)


def reached(flops: int, estimate: Estimate, mesh: Mesh, chip: Chip) -> Report:
    """The roofline by published peaks, and the estimate beside it."""
    return {
        "roofline_seconds": {
            "compute": flops / mesh.size / chip.flops,
            "hbm": estimate.moved / chip.memory_rate,
            "ici": estimate.links,
            "dcn": estimate.network,
        },
        "estimated_seconds": {
            "compiler": estimate.compute,
            "attention_kernels": estimate.kernels,
            "waiting_for_collectives": estimate.exposed,
        },
        "predicted_step_seconds": estimate.total,
        "predicted_mfu": flops / mesh.size / chip.flops / estimate.total,
    }


def traffic(found: list[Collective], mesh: Mesh) -> list[Report]:
    """Bytes that a chip sends in a step, by kind and mesh axes, largest first."""
    sent: dict[tuple[str, tuple[str, ...]], int] = defaultdict(int)
    for one in found:
        sent[one.kind, one.axes] += one.sent * one.times
    ordered = sorted(sent.items(), key=lambda item: -item[1])
    return [
        {
            "kind": kind,
            "axes": list(axes),
            "over": "dcn" if crosses_slices(mesh, axes) else "ici",
            "bytes_per_chip": total,
        }
        for (kind, axes), total in ordered
    ]


def priced(report: Report, chip_hour: float) -> Report:
    """The report of training with its cost, in whatever a chip-hour is paid in."""
    cost = {
        f"cost{name[10:]}": hours * chip_hour
        for name, hours in report.items()
        if name.startswith("chip_hours")
    }
    return report | ({"price_of_a_chip_hour": chip_hour} | cost if cost else {})


def lines(report: Report) -> Iterator[str]:
    """The report to read."""
    memory, capacity = report["hbm_per_chip"], report["hbm_capacity"]
    shape = ",".join(f"{axis}={size}" for axis, size in report["mesh"].items())
    if "collectives" not in report:
        yield f"mesh              {shape}: {report['batch_per_chip']} examples a chip, remat {report['remat']}"
        yield f"HBM a chip        {memory['total'] / GIB:.2f} GiB of {capacity / GIB:.0f}   DOES NOT FIT: not compiled"
        return
    per_step = "step" if report["what"] == "train" else "batch"
    parameters, flops, examples = (
        report["parameters"],
        report["model_flops_per_step"],
        report["examples_per_step"],
    )
    yield f"mesh              {shape}: {report['chips']} chips, {examples} examples a {per_step}, remat {report['remat']}"
    yield f"parameters        {parameters['trained']:,} trained, {parameters['frozen']:,} frozen"
    yield f"model FLOPs       {flops / 1e12:,.1f} T a {per_step} ({flops / examples / 1e12:.1f} T an example)"
    yield (
        f"HBM a chip        {memory['total'] / GIB:.2f} GiB of {capacity / GIB:.0f}: "
        f"arguments {memory['arguments'] / GIB:.2f}, temporaries {memory['temporaries'] / GIB:.2f}, "
        f"output {memory['output'] / GIB:.2f} ({memory['aliased'] / GIB:.2f} of it in place)"
        + ("" if report["fits"] else "   DOES NOT FIT")
    )
    if "weights_per_chip" in report:
        weights = ", ".join(f"{k} {v / GIB:.2f}" for k, v in report["weights_per_chip"].items())
        beside = "fits" if report["fits_with_mllm"] else "DOES NOT FIT"
        yield f"weights a chip    {weights} GiB; with the MLLM kept, it {beside}"
    for one in report["collectives"]:
        if one["bytes_per_chip"] >= 1e6:
            where = f"{'+'.join(one['axes']) or '-'} ({one['over']})"
            yield f"  {one['kind']:20}{where:20}{one['bytes_per_chip'] / 1e9:10.3f} GB a chip"
    yield f"largest of them   {report['largest_collective'] / 1e6:.0f} MB on a chip" + (
        "   MORE THAN A BLOCK" if report["gathers_more_than_a_block"] else ""
    )
    if report["holds_attention_matrix"]:
        yield "attention         an array of tokens x tokens exists: the kernel does not suit these sizes"
    for title, key in (("roofline", "roofline_seconds"), ("estimate", "estimated_seconds")):
        parts = ", ".join(
            f"{name.replace('_', ' ')} {1e3 * value:.0f} ms" for name, value in report[key].items()
        )
        yield f"{title:18}{parts}"
    seconds = report["predicted_step_seconds"]
    yield (
        f"to expect         {seconds:.3f} s a {per_step}, {examples / seconds:.2f} examples/s, "
        f"{100 * report['predicted_mfu']:.1f} % of the published peak"
    )
    if report["what"] == "train":
        for steps, name in (
            (f"{report['steps']:,}", ""),
            ("25,000 + 10,000", "_25000_10000_steps"),
        ):
            hours, price = report[f"chip_hours{name}"], report.get("price_of_a_chip_hour")
            yield f"                  {steps} steps: {hours:,.0f} chip-hours" + (
                f", {report[f'cost{name}']:,.0f} at {price:g} an hour" if price else ""
            )
    yield f"compiled in       {report['compile_seconds']:.0f} s"
