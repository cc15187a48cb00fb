"""Reads the collectives of a compiled program from its HLO text: bytes sent by each chip, kind,
mesh axes.

XLA counts a loop's body once; we count a collective as often as the loops around it run. Between
slices a TPU program has no collectives but `send` instructions to the host's runtime, whose
attributes name the collective; only the axis `data` crosses slices.
"""

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
)
WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2,
          "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}  # fmt: skip


class Collective(NamedTuple):
    """One instruction of the program."""

    kind: str
    axes: tuple[str, ...]
    """Mesh axes along which the chips of a group differ."""
    sent: int
    """Bytes that each chip sends each time."""
    times: int
    """How often it runs."""
    largest: int
    """Bytes of its largest operand or result on a chip."""
    hidden: bool = False
    """Whether the compiler made it asynchronous, so that chips compute meanwhile."""


_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_CALLED = re.compile(
    r"(?:body|condition|calls|to_apply)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}"
)
_LOOP = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_KNOWN = re.compile(
    r'"known_trip_count":\{"n":"(\d+)"\}'
)  # the CPU's compiler says it, the TPU's does not
_BOUND = re.compile(r"compare\(.*%([\w.\-]+)\), direction=LT")
_INSTRUCTION = re.compile(rf"^\s+(?:ROOT )?%?[\w.\-]+ = (.+?) ({'|'.join(KINDS)})(-start)?\(")
_BETWEEN_SLICES = re.compile(
    r"^\s+(?:ROOT )?%?[\w.\-]+ = \((\w+)\[([\d,]*)\].* send\(.*xla_megascale_runtime"
)
_TRANSFER = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")


def collectives(
    text: str, mesh_shape: dict[str, int], unknown: Sequence[int] = ()
) -> list[Collective]:
    """Returns every collective in a compiled program's text.

    Devices are numbered as in the mesh's array, last axis fastest. `unknown`: how often those loops
    of the entry computation run that have no constant end, in their order.
    """
    lines_of: dict[str, list[str]] = {}
    entry, name = "", ""
    for line in text.splitlines():
        if start := _COMPUTATION.match(line):
            name = start[1]
            lines_of[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif name:
            lines_of[name].append(line)
    times: dict[str, int] = defaultdict(int)
    given = iter(unknown)

    def visit(name: str, count: int) -> None:
        times[name] += count
        for line in lines_of[name]:
            trips = 1
            if loop := _LOOP.search(line):
                trips = (
                    int(known[1]) if (known := _KNOWN.search(line)) else _trips(lines_of[loop[1]])
                )
                trips = (next(given, 1) if name == entry else 1) if trips is None else trips
            for one, several in _CALLED.findall(line):
                for inner in [one, *re.split(r"[, %]+", several)]:
                    if inner in lines_of:
                        visit(inner, count * trips)

    visit(entry, 1)
    found: dict[str, Collective] = {}
    for name, count in times.items():
        # An asynchronous collective appears in several fusions with one channel; it counts once.
        beside = name.startswith("async_collective_fusion") or any(
            "AsyncCollective" in line for line in lines_of[name]
        )
        for number, line in enumerate(lines_of[name]):
            if (collective := _parse(line, count, mesh_shape)) is not None:
                channel = _CHANNEL.search(line)
                key = channel[1] if beside and channel else f"{name} {number}"
                found[key] = collective._replace(hidden=True) if beside else collective
    return list(found.values())


def _trips(condition: list[str]) -> int | None:
    """Iterations of a loop that counts from 0 up to a constant; None for another kind of loop."""
    for line in condition:
        if found := _BOUND.search(line):
            bound = re.compile(rf"%{re.escape(found[1])} = s32\[\]\S* constant\((\d+)\)")
            return next(
                (int(constant[1]) for other in condition if (constant := bound.search(other))), None
            )
    return None


def _parse(line: str, times: int, mesh_shape: dict[str, int]) -> Collective | None:
    if (found := _BETWEEN_SLICES.match(line)) is not None:
        return _between_slices(found, line, times)
    found = _INSTRUCTION.match(line)
    if found is None:
        return None
    kind, sizes = found[2], [bytes_of(*shape) for shape in _SHAPE.findall(found[1])]
    group, axes = _group(line, mesh_shape)
    whole = max(sizes)
    share = (group - 1) / group if group > 1 else 0.0
    match kind:
        case "all-gather" | "all-to-all" | "ragged-all-to-all":
            sent = whole * share
        case "all-reduce":
            sent = 2 * sum(sizes) * share
        case "reduce-scatter":
            sent = min(sizes) * (group - 1)
            whole = min(sizes) * group
        case _:
            sent = whole
    hidden = found[3] is not None
    return Collective(kind, axes, round(sent), times, whole, hidden)


def _between_slices(found: re.Match[str], line: str, times: int) -> Collective:
    """The part of a collective that goes through the hosts, asynchronously."""
    size = bytes_of(found[1], found[2])
    kind = _TRANSFER.search(line)
    target = re.search(r'_xla_megascale_target="\{([\d,:]+)\}', line)
    slices = sum(_extent(part) for part in target[1].split(",")) if target else 2
    name = kind[1].lower().replace("_", "-") if kind else "collective-permute"
    share = (
        (slices - 1) / slices * (2 if name == "all-reduce" else 1)
        if name in ("all-reduce", "reduce-scatter")
        else 1
    )
    return Collective(name, ("data",), round(size * share), times, size, hidden=True)


def _extent(part: str) -> int:
    """Number of members of a range such as `3` or `0:3`."""
    first, _, last = part.partition(":")
    return int(last or first) - int(first) + 1


def bytes_of(kind: str, dimensions: str) -> int:
    """Bytes of an array of XLA's type `kind` (bf16) and `dimensions` (64,128)."""
    return WIDTHS.get(kind, 4) * math.prod(int(size) for size in dimensions.split(",") if size)


def _group(line: str, mesh_shape: dict[str, int]) -> tuple[int, tuple[str, ...]]:
    """Size of a group of chips, and the mesh axes along which its members differ."""
    devices = np.arange(math.prod(mesh_shape.values())).reshape(tuple(mesh_shape.values()))
    if found := re.search(r"replica_groups=\[([\d,]+)\](<=\S+)", line):
        order = _numbered(found[2])
        members = order.reshape(_numbers(found[1]))[0].ravel().tolist()
    elif found := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\S+)\))? \{([^}]*)\}", line
    ):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        order = _numbered("<=" + found[2]) if found[2] else np.arange(math.prod(sizes.values()))
        members = _first_group(order.reshape(tuple(sizes.values())), list(sizes), found[3])
    elif found := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        members = [int(number) for number in found[1].split(",")]
    elif found := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", line):
        members = [int(found[1]), int(found[2])]
    else:
        members = devices.ravel().tolist()
    places = np.array([np.argwhere(devices == member)[0] for member in members])
    axes = tuple(
        axis for axis, column in zip(mesh_shape, places.T) if len(set(column.tolist())) > 1
    )
    return len(members), axes


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def _numbered(text: str) -> np.ndarray:
    """Device numbers that XLA writes as `<=[4,16]T(1,0)` or `<=([4,16]T(1,0))`, flat where there
    is no T."""
    found = re.match(r"<=\(?\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    assert found is not None, text
    order = np.arange(math.prod(_numbers(found[1]))).reshape(_numbers(found[1]))
    return order.transpose(_numbers(found[2])) if found[2] else order


def _first_group(order: np.ndarray, names: list[str], along: str) -> list[int]:
    """Members of the first group in `mesh[…] {'a', 'b':(2)4}`: whole axes, or a (before)size
    part of an axis."""
    part = {name: (int(before), int(size)) if size else None for name, before, size in
            re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", along)}  # fmt: skip
    for axis, name in reversed(list(enumerate(names))):
        if name not in part:
            order = order.take([0], axis=axis)
        elif (cut := part[name]) is not None:
            after = order.shape[axis] // (cut[0] * cut[1])
            order = order.take(np.arange(cut[1]) * after, axis=axis)
    return order.ravel().tolist()
