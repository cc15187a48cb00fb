"""`plan`: what a pod run will need and take, before anyone pays for it."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from squeeze_jax.commands.run import check_finite, guarded

if TYPE_CHECKING:
    from collections.abc import Iterator

    from squeeze_jax.config import Config
    from squeeze_jax.planning.report import Report
    from squeeze_jax.planning.train_program import Compiled

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
    """Compiles a preset's real train step for a TPU topology and prints memory, FLOPs, traffic and
    the time to expect.

    Any field of the preset can be overridden, as with train.py (`--data.batch-per-chip 2`).
    """

    preset: Annotated[Path, tyro.conf.Positional]
    """File of configs/, or the name of one; paths of checkpoints in it are not looked at."""
    topology: str
    """Chip and shape of a slice, such as v5p:2x2x4."""
    slices: int = 1
    """Slices of that shape, joined by the network."""
    mesh: str | None = None
    """data=1,fsdp=16,tensor=1; none: the preset's, with all chips on fsdp."""
    search: bool = False
    """Try every mesh, policy of remat and batch per chip by hand, then compile the best few."""
    best: int = 3
    """How many `--search` compiles and prints."""
    what: Literal["train", "sample"] = "train"
    """The train step of the preset's last stage, or the staged sampler with its steps, τ and
    guidance."""
    images: int = 0
    """Images sampled at once; 0: one for every place of the data and fsdp axes."""
    references: int = 1
    """Square references of each example."""
    merge_lora: bool = True
    """With `--what sample`: adapters merged, as `sample` loads them."""
    chip_hour: float | None = None
    """Price of a chip for an hour, to add the cost."""
    json: Path | None = None
    """Where to write all of it, in bytes."""
    hlo: Path | None = None
    """Where to write the compiled program's text."""


def main(arguments: list[str] | None = None) -> int:
    os.environ.update({name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()})
    arguments = sys.argv[1:] if arguments is None else arguments
    given, overrides = tyro.cli(
        Plan, args=arguments, prog="squeeze_jax plan", return_unknown_args=True
    )
    return guarded(lambda: run(given, overrides))


def run(given: Plan, overrides: list[str]) -> None:
    from squeeze_jax.config import load_preset, override
    from squeeze_jax.interop.tensors import write_json
    from squeeze_jax.planning.report import lines, priced

    check(given)
    config = override(load_preset(given.preset), overrides, f"squeeze_jax plan {given.preset}")
    sizes = asked(given.mesh, config)
    print(f"{config.name}, {given.what}, on {given.slices} x {given.topology}", flush=True)
    place, written = {"topology": given.topology, "slices": given.slices, "preset": config.name}, []
    for report, compiled in (
        searched(given, config) if given.search else planned(given, config, sizes)
    ):
        report = report if given.chip_hour is None else priced(report, given.chip_hour)
        print("\n".join(lines(report)), flush=True)
        written.append(place | report)
        if given.hlo is not None and compiled is not None:
            given.hlo.write_text(compiled.text)
    if given.json is not None:
        write_json(given.json, {**place, "best": written} if given.search else written[0])
        print(f"report: {given.json}")


def check(given: Plan) -> None:
    """Raises InputError for flags that do not go together."""
    from squeeze_jax.errors import InputError

    if given.search and given.what != "train":
        raise InputError(
            "--search looks for ways to train; leave it out with --what sample, and give --mesh"
        )
    if given.search and given.mesh is not None:
        raise InputError("--search tries every mesh; leave --mesh out, or --search")
    check_finite(given)
    if given.chip_hour is not None and given.chip_hour <= 0:
        raise InputError(f"--chip-hour {given.chip_hour:g} must be above 0")


def planned(
    given: Plan, config: "Config", sizes: dict[str, int]
) -> "Iterator[tuple[Report, Compiled | None]]":
    """The one plan that is asked for."""
    from squeeze_jax.planning.report import refused, train_report
    from squeeze_jax.planning.sampler_program import sample_report
    from squeeze_jax.planning.train_program import TooLargeError, topology_mesh

    mesh, chip = topology_mesh(given.topology, sizes, given.slices, config.model.dit.heads)
    try:
        if given.what == "train":
            yield train_report(config, mesh, chip, given.references)
        else:
            yield sample_report(
                config, mesh, chip, given.references, given.images, merge_lora=given.merge_lora
            )
    except TooLargeError as error:
        yield refused(config, mesh, chip, error), None


def asked(mesh: str | None, config: "Config") -> dict[str, int]:
    """Sizes of the mesh's axes from `--mesh`, or the preset's."""
    from squeeze_jax.errors import InputError
    from squeeze_jax.sharding import AXES

    if mesh is None:
        return {axis: getattr(config.parallel, axis) for axis in AXES}
    try:
        sizes = dict.fromkeys(AXES, 1) | {
            k: int(v) for k, v in (part.split("=") for part in mesh.split(","))
        }
    except ValueError:
        raise InputError(
            f"--mesh {mesh!r} is not understood; write data=1,fsdp=8,tensor=1"
        ) from None
    if unknown := set(sizes) - set(AXES):
        raise InputError(
            f"--mesh has no axis {', '.join(sorted(unknown))}; there are {', '.join(AXES)}"
        )
    return sizes


def searched(given: Plan, config: "Config") -> "Iterator[tuple[Report, Compiled | None]]":
    """Reports of the best ways to train that the compiler agrees fit."""
    from squeeze_jax.planning.report import refused, train_report
    from squeeze_jax.planning.search import candidates
    from squeeze_jax.planning.train_program import TooLargeError, topology_mesh
    from squeeze_jax.sharding import AXES, format_mesh, nearest_meshes

    heads, stage = config.model.dit.heads, config.training.stages[-1]
    alone: dict[str, int] = {axis: -1 if axis == "data" else 1 for axis in AXES}
    first, chip = topology_mesh(given.topology, alone, given.slices)
    every = nearest_meshes(
        first.size, (1, first.size, 1), slices=given.slices, heads=heads, most=None
    )
    shapes: list[dict[str, int]] = [dict(zip(AXES, shape)) for shape in every]
    found = candidates(
        config,
        [topology_mesh(given.topology, sizes, given.slices)[0] for sizes in shapes],
        chip,
        stage,
        given.references,
    )
    print(f"{len(found)} ways fit by hand; the best, by examples a second:")
    for one in found[: 2 * given.best]:
        shape = format_mesh(list(one.mesh.shape.values()))
        print(
            f"  {shape:26}{one.remat:16}{one.batch:3} a chip {one.memory / 2**30:6.1f} GiB "
            f"{one.rate:9.1f}",
            flush=True,
        )
    left = given.best
    for one in found:
        if left:
            try:
                report, compiled = train_report(
                    one.config(config), one.mesh, chip, given.references
                )
            except TooLargeError as error:
                report, compiled = refused(one.config(config), one.mesh, chip, error), None
            left -= report["fits"]
            yield report, compiled
