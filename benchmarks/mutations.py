"""How many small faults the tests notice: operators, comparisons and constants changed one at a time.

    pip install pytest-cov
    python benchmarks/mutations.py map
    python benchmarks/mutations.py run --count 200 --jobs 2

`map` runs the rooms' tests once and notes which test runs which line, and how long it takes
(mutations_map.json). `run` gives every mutant the tests that run its line, the shortest first,
until one fails; a line of the report (mutations.jsonl) is written when a mutant is judged, so that
a run that was stopped goes on. The aim is 90 % of at least 200 caught, and a reason for every
survivor.
"""

import argparse
import ast
import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

os.environ["JAX_PLATFORMS"] = "cpu"
import pytest

# Imported once, before any fork; none of them starts a backend.
for _library in (
    "jax",
    "flax.nnx",
    "optax",
    "orbax.checkpoint",
    "torch",
    "diffusers",
    "transformers",
):
    importlib.import_module(_library)

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
        node.value = (
            not old
            if isinstance(old, bool)
            else old + 1
            if isinstance(old, int)
            else old * 1.5 or 1.0
        )
        return f"{old} → {node.value}"
    return None


def places(path: Path) -> Iterator[tuple[Path, int]]:
    """Every place of a file that can be changed: the file and the node's number."""
    for index, node in enumerate(list(nodes(ast.parse(path.read_text())))):
        if mutate(node) is not None:
            yield path, index


def make_mutant(path: Path, index: int) -> Mutant:
    """The file with one node changed."""
    tree = ast.parse(path.read_text())
    node = list(nodes(tree))[index]
    change = mutate(node)
    assert change is not None
    return Mutant(
        str(path.relative_to(ROOT)), getattr(node, "lineno", 0), change, ast.unparse(tree)
    )


Map = dict[str, dict[str, list[str]]]
"""File → line → the tests that run it, the shortest first."""


def make_map(out: Path) -> None:
    """Runs the tests of all rooms with coverage and writes who runs what."""
    from coverage import CoverageData

    tests = sorted({test for some in ROOMS.values() for test in some})
    with tempfile.TemporaryDirectory() as folder:
        data, times = Path(folder) / "coverage", Path(folder) / "times.xml"
        command = [
            sys.executable, "-m", "pytest", "-n", "2", "--cov=squeeze_jax", "--cov-context=test",
            "--cov-report=", f"--junitxml={times}", "-o", "junit_family=xunit1", *tests,
        ]  # fmt: skip
        environment = os.environ | {"COVERAGE_FILE": str(data), "PYTHONPATH": str(ROOT)}
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
        cases = ElementTree.parse(times).iter("testcase")
        seconds = {
            f"{one.get('file')}::{one.get('name')}": float(one.get("time", 0)) for one in cases
        }
        read, found = CoverageData(str(data)), {}
        read.read()
        for file in read.measured_files():
            lines = {}
            for line, contexts in read.contexts_by_lineno(file).items():
                names = {context.rpartition("|")[0] for context in contexts}
                names = {name for name in names if name and "\\" not in name}
                lines[line] = sorted(names, key=lambda name: seconds.get(name, SECONDS))
            found[str(Path(file).relative_to(ROOT))] = lines
    out.write_text(json.dumps(found))


def chosen(count: int, seed: int, known: Map) -> list[tuple[Mutant, tuple[str, ...]]]:
    """Equally many mutants of every room, of lines that some test runs or a module when it is
    imported, each with its tests."""
    rng, found = random.Random(seed), []
    for pattern, tests in ROOMS.items():
        files = sorted((ROOT / "squeeze_jax").glob(pattern))
        every = [place for file in files for place in places(file)]
        for place in rng.sample(every, min(len(every), -(-count // len(ROOMS)))):
            mutant = make_mutant(*place)
            # What runs at import has no test of its own: the room's tests have.
            running = known.get(mutant.file, {}).get(str(mutant.line)) or tests
            found.append((mutant, tuple(running)))
    rng.shuffle(found)  # every worker gets of every room
    return found


def run_tests(copy: Path, tests: tuple[str, ...]) -> str | None:
    """Runs tests of a copy in a forked process, libraries already imported; what failed, or None."""
    log = copy / "pytest.log"
    if (child := os.fork()) == 0:
        try:
            os.setsid()  # so that what a test started ends with it
            signal.alarm(SECONDS)
            with log.open("w") as out:
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
            os.chdir(copy)
            os.environ["PYTHONPATH"] = str(copy)
            sys.path[:0] = [str(copy)]
            ignored = "ignore::pytest.PytestAssertRewriteWarning"  # of what is imported already
            flags = ["-x", "-q", "-p", "no:cacheprovider", "-W", ignored]
            os._exit(int(pytest.main([*flags, *tests])))
        except BaseException:
            traceback.print_exc()
            os._exit(99)  # the parent's folders are not this process's to delete
    status = os.waitpid(child, 0)[1]
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if os.WIFSIGNALED(status):
        return (
            "time limit"
            if os.WTERMSIG(status) == signal.SIGALRM
            else f"signal {os.WTERMSIG(status)}"
        )
    text, code = log.read_text(), os.WEXITSTATUS(status)
    failed = [line for line in text.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if code in (0, 5) or (code == 4 and "\nE  " not in text):  # all passed, or none was found
        return None
    return "; ".join(failed) or f"exit code {code}"


def judge(mutant: Mutant, tests: tuple[str, ...], copy: Path) -> str | None:
    """Runs the tests on a copy of the repository with the fault in it; what failed, or None."""
    right = (copy / mutant.file).read_text()
    (copy / mutant.file).write_text(mutant.source)
    try:
        return run_tests(copy, tests)
    finally:
        (copy / mutant.file).write_text(right)


ROUNDS = (slice(0, 3), slice(3, 12), slice(12, 60))
"""Every mutant meets the shortest tests that run its line; who survives them more, and more. So the
count of those caught is known long before the last survivor is."""


def work(todo: list[tuple[Mutant, tuple[str, ...]]], out: Path) -> None:
    """One worker: judges its share in a copy of its own and writes a line for each."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        ignored = shutil.ignore_patterns(".git", ".venv*", "__pycache__", "docs")
        shutil.copytree(ROOT, copy, ignore=ignored)
        if failed := run_tests(copy, ("tests/diffusion",)):
            raise SystemExit(f"tests fail without a fault: {failed}")
        for some in ROUNDS:
            survivors = []
            for mutant, tests in todo:
                by = judge(mutant, tests[some], copy) if tests[some] else None
                if by is None and some is not ROUNDS[-1]:
                    survivors.append((mutant, tests))
                    continue
                place = f"{mutant.file}:{mutant.line} {mutant.change}"
                print("SURVIVED" if by is None else "caught  ", place, flush=True)
                about = {"file": mutant.file, "line": mutant.line, "change": mutant.change}
                about |= {"caught": by is not None, "by": by or ""}
                with out.open("a") as lines:
                    lines.write(json.dumps(about, ensure_ascii=False) + "\n")
            todo = survivors


def read_report(path: Path) -> list[dict[str, object]]:
    """The lines written so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("map", "run"))
    parser.add_argument("--map", type=Path, default=Path("mutations_map.json"))
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("mutations.jsonl"))
    given = parser.parse_args()
    if given.what == "map":
        make_map(given.map)
        return
    known = json.loads(given.map.read_text())
    judged = {(one["file"], one["line"], one["change"]) for one in read_report(given.out)}
    left = [one for one in chosen(given.count, given.seed, known) if one[0][:3] not in judged]
    with tempfile.TemporaryDirectory() as cache:
        os.environ["SQUEEZE_TEST_CACHE"] = cache  # what a mutant leaves alone is compiled once
        children = []
        for index in range(given.jobs):
            if (child := os.fork()) == 0:
                work(left[index :: given.jobs], given.out)
                os._exit(0)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)
    report = read_report(given.out)
    caught = sum(bool(one["caught"]) for one in report)
    print(f"{caught} of {len(report)} mutants caught ({100 * caught / max(len(report), 1):.0f} %)")


if __name__ == "__main__":
    main()
