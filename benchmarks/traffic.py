"""What a block of the transformer moves between a TPU chip and its memory, by part, from the compiled program.

    python benchmarks/traffic.py --topology v6e:2x2 --rows 4 --remat save_products

One double and one single block of a preset, forward and backward, compiled by the TPU's own compiler as `plan` does
(extra `tpu`, no TPU). Bytes are operands and results of every instruction that lie in the chip's memory, whole, and each
once. The compiler's own total is printed beside: it counts what is read twice twice, and gathers by their parts.
"""

import argparse
import dataclasses
import math
import re
from collections import Counter
from pathlib import Path

from squeeze_jax.config import load_preset
from squeeze_jax.planning.collectives import bytes_of
from squeeze_jax.planning.estimate import StackName, block_program, sequence
from squeeze_jax.planning.train_program import topology_mesh

FREE = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "iota", "copy-done", "slice-done"}
INSTRUCTION = re.compile(r"\s*(?:ROOT )?(%[\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
KINDS: tuple[StackName, ...] = ("double", "single")
PHASES = ("forward", "made again", "backward")


def in_memory(kind: str) -> list[int]:
    """Bytes of each array of a type; those in fast memory (space S(1)) count nothing."""
    return [0 if "S(" in layout else bytes_of(name, sizes) for name, sizes, layout in ARRAY.findall(kind)]


def traffic(text: str) -> Counter[tuple[str, str]]:
    """Bytes by (part, phase) of a program's entry computation."""
    computations: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if found := re.match(r"(ENTRY )?(%[\w.\-]+) \(.*\{$", line):
            name = found[2]
            computations[name] = []
            entry = name if found[1] else entry
        elif name:
            computations[name].append(line)

    def multiplies(called: str) -> bool:
        lines = computations.get(called, [])
        return any(
            " convolution(" in line or " dot(" in line or any(map(multiplies, re.findall(r"calls=(%[\w.\-]+)", line)))
            for line in lines
        )

    types: dict[str, str] = {}
    found_bytes: Counter[tuple[str, str]] = Counter()
    for line in computations[entry]:
        if (found := INSTRUCTION.match(line)) is None:
            continue
        name, kind, operation, rest = found.groups()
        types[name] = kind
        if operation in FREE:
            continue
        operands = " ".join(types.get(other, "") for other in re.findall(r"%[\w.\-]+", rest.split("), ")[0]))
        source = re.search(r'op_name="([^"]*)"', line)
        source = source[1] if source else ""
        called = re.search(r"calls=(%[\w.\-]+)", line)
        asynchronous = "s32[2]" in kind  # a fusion that also carries a gather along: three arrays, then semaphores
        if operation in ("copy-start", "slice-start"):
            part, size = "matrices, fetched ahead", in_memory(operands)[0] if operation == "copy-start" else max(
                bytes_of(*each[:2]) for each in ARRAY.findall(kind) if "S(" in each[2]
            )
        elif asynchronous and called and not multiplies(called[1]):
            part, size = "matrices, gathered", min(filter(None, in_memory(kind)), default=0)
        else:
            if asynchronous:
                kind, operands = kind.split(", s32[2]")[0], operands.split("s32[2]")[-1]
                kind = ", ".join(m[0] for m in list(ARRAY.finditer(kind))[:-3])
            size = sum(in_memory(kind)) + sum(in_memory(operands))
            if operation == "custom-call":
                part = "attention's kernels"
            elif "splash" in source or "jit(_pad)" in source:
                part = "around attention's kernels"
            elif (called and multiplies(called[1])) or operation in ("convolution", "dot"):
                part = "products"
            elif operation in ("copy", "slice", "concatenate", "transpose", "pad"):
                part = "copies, slices and concatenations"
            else:
                part = "norms, modulation, GELU, rotation, sums"
        back = "transpose(" in source or "_dkv_" in name
        phase = "made again" if "rematted" in source else "backward" if back else "forward"
        found_bytes[part, phase] += size
    return found_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", type=Path, default=Path("configs/flux_stage2.py"))
    parser.add_argument("--topology", default="v6e:2x2")
    parser.add_argument("--rows", type=int, default=4, help="examples a chip")
    parser.add_argument("--remat", default="save_products")
    given = parser.parse_args()
    config = load_preset(given.preset)
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, batch_per_chip=given.rows),
        parallel=dataclasses.replace(config.parallel, remat=given.remat),
    )
    chips = math.prod(map(int, given.topology.partition(":")[2].split("x")))
    sizes = {"data": 1, "fsdp": chips, "tensor": 1}
    mesh, chip = topology_mesh(given.topology, sizes, heads=config.model.dit.heads)
    context, image = sequence(config, 1)
    for kind in KINDS:
        block = block_program(config, mesh, kind, given.rows, context, image)
        parts = traffic(block.text)
        print(
            f"\n{kind} block, {given.topology}, {given.rows} x {context + image} tokens a chip, {given.remat}: "
            f"{1000 * block.expected(chip):.2f} ms and {block.traffic / 1e9:.1f} GB by the compiler, "
            f"{block.temporaries / 2**30:.2f} GiB of temporaries\n"
        )
        print(f"| GB | {' | '.join(PHASES)} | all |\n|---|{'---|' * (len(PHASES) + 1)}")
        for part in sorted({part for part, _ in parts}, key=lambda p: -sum(parts[p, phase] for phase in PHASES)):
            row = [parts[part, phase] / 1e9 for phase in PHASES]
            print(f"| {part} | {' | '.join(f'{value:.2f}' for value in row)} | {sum(row):.2f} |", flush=True)
        sums = [sum(size for (_, each), size in parts.items() if each == phase) / 1e9 for phase in PHASES]
        print(f"| all | {' | '.join(f'{value:.2f}' for value in sums)} | {sum(sums):.2f} |")


if __name__ == "__main__":
    main()
