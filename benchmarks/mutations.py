"""How many small faults the tests notice: operators, comparisons and constants changed one at a time.

    python benchmarks/mutations.py --count 200 --jobs 2 --out mutations.jsonl

Every mutant runs the tests of its room, the file's own first, until one fails. A line of the report
is written when a mutant is judged, so that a run that was stopped goes on. Minutes a mutant; the
aim is 90 % of at least 200 caught, and a reason for every survivor.
"""

import argparse
import ast
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
ROOMS: dict[str, tuple[str, ...]] = {
    "diffusion/*.py": ("tests/diffusion", "tests/training/test_method_constants.py"),
    "layers/*.py": ("tests/layers", "tests/models"),
    "models/*.py": ("tests/models", "tests/layers"),
    "training/step.py": ("tests/training/test_step.py", "tests/training/test_method_constants.py"),
    "sampling/*.py": ("tests/sampling", "tests/interop/test_exported_settings.py"),
    "data/*.py": ("tests/data", "tests/training/test_online.py"),
    "interop/lora*.py": ("tests/interop/test_lora_files.py", "tests/interop/test_flux2_lora.py"),
    "planning/*.py": ("tests/planning",),
}
"""Files below squeeze_jax → the tests that should notice."""
SWAPS: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
SECONDS = 900
"""After which a mutant counts as caught: the tests hang."""


class Mutant(NamedTuple):
    """One fault."""

    file: str
    line: int
    change: str
    source: str
    """The whole mutated file."""


def nodes(tree: ast.Module) -> Iterator[ast.AST]:
    """Nodes that compute something: no annotations, messages, docstrings or checks of arguments."""
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.Raise, ast.JoinedStr, ast.Assert, ast.Import, ast.ImportFrom)):
            continue
        yield node
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list"):
                continue
            todo += [child for child in (value if isinstance(value, list) else [value])
                     if isinstance(child, ast.AST)]  # fmt: skip


def mutate(node: ast.AST) -> str | None:
    """Changes a node in place; says how, or None where there is nothing to change."""
    if isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in SWAPS:
        old, node.op = type(node.op).__name__, SWAPS[type(node.op)]()
        return f"{old} → {type(node.op).__name__}"
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        old, node.ops[0] = type(node.ops[0]).__name__, SWAPS[type(node.ops[0])]()
        return f"{old} → {type(node.ops[0]).__name__}"
    if isinstance(node, ast.IfExp):
        node.body, node.orelse = node.orelse, node.body
        return "branches swapped"
    if isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        old = node.value
        node.value = not old if isinstance(old, bool) else old + 1 if isinstance(old, int) else old * 1.5 or 1.0
        return f"{old} → {node.value}"
    return None


def mutants(path: Path) -> Iterator[Mutant]:
    """Every mutant of a file."""
    text = path.read_text()
    count = sum(1 for _ in nodes(ast.parse(text)))
    for index in range(count):
        tree = ast.parse(text)
        node = list(nodes(tree))[index]
        line = getattr(node, "lineno", 0)
        if (change := mutate(node)) is not None:
            yield Mutant(str(path.relative_to(ROOT)), line, change, ast.unparse(tree))


def chosen(count: int, seed: int) -> list[tuple[Mutant, tuple[str, ...]]]:
    """Equally many mutants of every room, with its tests; a file's own test goes first."""
    rng, found = random.Random(seed), []
    for pattern, tests in ROOMS.items():
        files = sorted((ROOT / "squeeze_jax").glob(pattern))
        every = [mutant for file in files for mutant in mutants(file)]
        for mutant in rng.sample(every, min(len(every), -(-count // len(ROOMS)))):
            own = sorted(ROOT.glob(f"tests/*/test_{Path(mutant.file).stem}.py"))
            found.append((mutant, (*(str(path.relative_to(ROOT)) for path in own), *tests)))
    return found


def judge(mutant: Mutant, tests: tuple[str, ...]) -> dict[str, object]:
    """Runs the tests on a copy of the repository with the fault in it."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        ignored = shutil.ignore_patterns(".git", ".venv*", "__pycache__", "docs")
        shutil.copytree(ROOT, copy, ignore=ignored)
        (copy / mutant.file).write_text(mutant.source)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
        environment = os.environ | {"PYTHONPATH": str(copy), "JAX_PLATFORMS": "cpu"}
        try:
            ran = subprocess.run(
                command, cwd=copy, env=environment, capture_output=True, text=True,
                check=False, timeout=SECONDS,
            )  # fmt: skip
            caught, by = ran.returncode != 0, ran.stdout.strip().splitlines()[-3:]
        except subprocess.TimeoutExpired:
            caught, by = True, ["time limit"]
    about = {"file": mutant.file, "line": mutant.line, "change": mutant.change}
    return about | {"caught": caught, "by": by if caught else []}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("mutations.jsonl"))
    given = parser.parse_args()
    lines = given.out.read_text().splitlines() if given.out.exists() else []
    judged = [json.loads(line) for line in lines]
    known = {(one["file"], one["line"], one["change"]) for one in judged}
    left = [(m, tests) for m, tests in chosen(given.count, given.seed) if m[:3] not in known]
    with given.out.open("a") as out, ThreadPoolExecutor(given.jobs) as pool:
        for result in pool.map(lambda one: judge(*one), left):
            judged.append(result)
            out.write(json.dumps(result) + "\n")
            out.flush()
            print("caught  " if result["caught"] else "SURVIVED", result["file"], result["line"], result["change"])
    caught = sum(bool(one["caught"]) for one in judged)
    print(f"{caught} of {len(judged)} mutants caught ({100 * caught / max(len(judged), 1):.0f} %)")


if __name__ == "__main__":
    main()
