"""Benchmarks fit the package: what they name is there, and takes what they give.

They are run by hand, seldom, so a changed function would break them unseen.
"""

import ast
import importlib
import inspect
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py")) + sorted((ROOT / "examples").glob("*.py"))


def imported(nodes: Iterable[ast.AST]) -> dict[str, Any]:
    """What these statements take from the package, by the name that it has there; AttributeError
    or ModuleNotFoundError where it is gone."""
    found = {}
    for node in nodes:
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith(
            "squeeze_jax"
        ):
            continue
        module = importlib.import_module(node.module)
        for one in node.names:
            if not hasattr(module, one.name):  # a module of a package, or nothing
                importlib.import_module(f"{node.module}.{one.name}")
            found[one.asname or one.name] = getattr(module, one.name)
    return found


def misfits(tree: ast.Module) -> list[str]:
    """Calls of the package's functions and classes whose arguments do not fit their signature.
    Left out: calls with a star, since how many arguments stand behind it is unknown."""
    found, everywhere = [], imported(tree.body)
    for statement in tree.body:
        names = everywhere | imported(ast.walk(statement))  # a function may import for itself
        for node in ast.walk(statement):
            if not isinstance(node, ast.Call) or not callable(called := resolve(node.func, names)):
                continue
            given = {one.arg: one for one in node.keywords if one.arg}
            if any(isinstance(one, ast.Starred) for one in node.args):
                continue
            signature = inspect.signature(called)
            bind = signature.bind if len(given) == len(node.keywords) else signature.bind_partial
            try:
                bind(*node.args, **given)
            except TypeError as error:
                found.append(f"line {node.lineno}, {ast.unparse(node.func)}: {error}")
    return found


def resolve(node: ast.expr, names: dict[str, Any]) -> Any:
    """The object of an imported name, or of an attribute of one (a class method, say)."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute) and (owner := resolve(node.value, names)) is not None:
        return getattr(owner, node.attr)
    return None


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_calls_what_is_there(path):
    assert not misfits(ast.parse(path.read_text()))
    for place in re.findall(r'"(squeeze_jax(?:\.\w+)+)"', path.read_text()):  # of patches
        module, name = place.rsplit(".", 1)
        assert hasattr(importlib.import_module(module), name), place


def test_a_call_that_does_not_fit_is_found():
    for call, word in (("make_mesh(heads=2, rows=2)", "rows"), ("use_mesh()", "mesh")):
        script = (
            f"def main():\n    from squeeze_jax.sharding import make_mesh, use_mesh\n    {call}"
        )
        assert word in misfits(ast.parse(script))[0]
    with pytest.raises(ModuleNotFoundError):
        misfits(ast.parse("from squeeze_jax.sharding import no_such_name"))
