"""What is public says what it is: what the package exports, and all that no underscore hides.

The rules, checked on the source:

- a public class, function or method has a docstring, its own or that of the method that it
  implements (of a base class or a protocol);
- a function with an array in its signature whose shape no type gives names the shape in brackets
  (or says that it is a scalar);
- a function that raises says "Raises";
- a number in a dataclass or named tuple is explained: below it, below the last of the fields that
  follow it, or in the class's docstring by its name;
- a number that a module names in capitals is explained;
- a formula, and a real number of a module, names its source.
"""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PUBLIC = ("squeeze_jax", "squeeze_jax.interop", "squeeze_jax.functional")
WITHOUT = {"commands", "miniature", "torch_files"}
"""Flags, drawings, and what PyTorch's users read."""
FILES = [
    path for path in sorted((ROOT / "squeeze_jax").rglob("*.py")) if WITHOUT.isdisjoint(path.parts)
]
SIZED = re.compile(r"(Float|Int|UInt|Bool|Shaped|Num)\d*")
FORMULA = re.compile(r"[·√∫Σ⊙]|e\^|\bexp\(|\blog\(| = .*[/^]")
SOURCE = re.compile(
    r"decision|paper|arXiv|docs/|diffusers|transformers|PyTorch|PEFT|kohya|Pillow|Flax|optax|XLA"
    r"|dot-product attention|TPU|FLUX|InternVL|Euler|Adams|TaylorSeer|DreamBench|DINO|CLIP|RoPE"
    r"|AdaLN|Wilson"
)


def members():
    for name in PUBLIC:
        module = importlib.import_module(name)
        for public in module.__all__:
            found = getattr(module, public)
            yield f"{name}.{public}", found
            if inspect.isclass(found):
                for method, value in vars(found).items():
                    function = inspect.unwrap(getattr(value, "__func__", value))
                    if not method.startswith("_") and inspect.isfunction(function):
                        yield f"{name}.{public}.{method}", function


@pytest.mark.parametrize(("name", "member"), [pytest.param(*one, id=one[0]) for one in members()])
def test_a_public_name_has_a_docstring_of_its_own(name, member):
    text = inspect.getdoc(member) or ""
    assert text.strip() and not text.startswith(f"{name.rpartition('.')[2]}("), name


# The rules


def is_string(node: ast.AST | None) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def is_public(node: ast.AST) -> bool:
    return not getattr(node, "name", "_").startswith("_")


def classes(tree: ast.AST) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


def implements(cls: ast.ClassDef, method: str, known: dict[str, ast.ClassDef]) -> bool:
    """Whether a base class, or any protocol, explains this method."""
    bases = [known[name] for name in map(base_name, cls.bases) if name in known]
    protocols = [one for one in known.values() if "Protocol" in map(base_name, one.bases)]
    return any(
        any(getattr(m, "name", "") == method and ast.get_docstring(m) for m in one.body)
        or (one in bases and implements(one, method, known))
        for one in bases + protocols
        if one is not cls
    )


def base_name(node: ast.expr) -> str:
    return ast.unparse(node.value if isinstance(node, ast.Subscript) else node).rpartition(".")[2]


def has_array_without_shape(annotation: ast.AST) -> bool:
    if isinstance(annotation, ast.Subscript) and SIZED.fullmatch(base_name(annotation)):
        return False
    if ast.unparse(annotation) in ("jax.Array", "np.ndarray", "Array"):
        return True
    return any(map(has_array_without_shape, ast.iter_child_nodes(annotation)))


def annotations(function: ast.FunctionDef) -> list[ast.expr]:
    given = function.args
    of_arguments = (a.annotation for a in given.posonlyargs + given.args + given.kwonlyargs)
    return [found for found in (*of_arguments, function.returns) if found is not None]


def raised(node: ast.AST) -> set[str]:
    """Names of the errors that a function raises itself, which its caller may meet."""
    found = set()
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef | ast.Lambda):
            continue
        if isinstance(child, ast.Raise) and isinstance(child.exc, ast.Call):
            found.add(ast.unparse(child.exc.func))
        found |= raised(child)
    return {name for name in found if name.endswith("Error")} - {
        "AssertionError",
        "NotImplementedError",
    }


def function_problems(function, cls: ast.ClassDef | None, known) -> Iterator[str]:
    text = ast.get_docstring(function)
    if text is None:
        if cls is None or not implements(cls, function.name, known):
            yield "no docstring"
        return
    if any(map(has_array_without_shape, annotations(function))) and not re.search(
        r"\[.+\]|scalar", text
    ):
        yield "an array without a shape"
    if (errors := raised(function)) and "aises" not in text:
        yield f"{', '.join(sorted(errors))} not said"
    if FORMULA.search(text) and not SOURCE.search(text):
        yield "a formula without a source"


def field_problems(cls: ast.ClassDef) -> Iterator[str]:
    marks = [ast.unparse(mark) for mark in (*cls.decorator_list, *cls.bases)]
    if not any("dataclass" in mark or "NamedTuple" in mark for mark in marks):
        return
    for place, field in enumerate(cls.body):
        if not isinstance(field, ast.AnnAssign) or ast.unparse(field.target).startswith("_"):
            continue
        rest = [node for node in cls.body[place:] if not isinstance(node, ast.AnnAssign)]
        explained = rest and is_string(rest[0])
        named = re.search(rf"\b{ast.unparse(field.target)}\b", ast.get_docstring(cls) or "")
        if re.search(r"\b(int|float)\b", ast.unparse(field.annotation)) and not (
            explained or named
        ):
            yield f"{ast.unparse(field.target)} not explained"


def constant_problems(body: list[ast.stmt]) -> Iterator[str]:
    for node, after in zip(body, [*body[1:], None]):
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
            continue
        name = node.targets[0].id
        if not name.isupper() or name.startswith("_") or not is_number(node.value):
            continue
        if not is_string(after):
            yield f"{name}: not explained"
        elif re.search(r"\.|e-", ast.unparse(node.value)) and not SOURCE.search(after.value.value):
            yield f"{name}: no source"


def is_number(node: ast.expr) -> bool:
    """A literal, or sums, products and powers of some."""
    if isinstance(node, ast.BinOp):
        return is_number(node.left) and is_number(node.right)
    node = node.operand if isinstance(node, ast.UnaryOp) else node
    return isinstance(node, ast.Constant) and type(node.value) in (int, float)


def problems(tree: ast.Module, known: dict[str, ast.ClassDef]) -> Iterator[str]:
    yield from constant_problems(tree.body)
    for node in filter(is_public, tree.body):
        if isinstance(node, ast.FunctionDef):
            yield from (f"{node.name}: {one}" for one in function_problems(node, None, known))
        elif isinstance(node, ast.ClassDef):
            if ast.get_docstring(node) is None:
                yield f"{node.name}: no docstring"
            yield from (f"{node.name}: {one}" for one in field_problems(node))
            for method in filter(is_public, node.body):
                if isinstance(method, ast.FunctionDef):
                    found = function_problems(method, node, known)
                    yield from (f"{node.name}.{method.name}: {one}" for one in found)


@pytest.fixture(scope="module")
def known():
    """Every class of the package by its name."""
    found = {}
    for path in (ROOT / "squeeze_jax").rglob("*.py"):
        found |= classes(ast.parse(path.read_text()))
    return found


def test_the_modules_are_there():
    assert len(FILES) > 150


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_keep_the_rules(path, known):
    assert not list(problems(ast.parse(path.read_text()), known))


def test_every_rule_finds_its_fault():
    tree = ast.parse('''
LIMIT = 3
SCALE = 0.5
"""Of something."""
SHIFT = 0.5
"""Of something, our decision."""

class Policy(Protocol):
    def begin(self) -> None:
        """Begins."""

class Good:
    """A policy."""
    def begin(self) -> None: ...
    def end(self) -> None: ...

@dataclass
class Sizes:
    """The width of a thing."""
    width: int
    height: int | None
    name: str

class Numbers(NamedTuple):
    low: float
    high: float
    """Of an interval."""

def decode(x: jax.Array) -> Float[Array, "B"]:
    """Pictures."""

def step(x: Float[jax.Array, "B"], y: dict[str, np.ndarray]) -> None:
    """x + 2·y of arrays [B]."""

def read(path):
    """A file."""
    if path:
        raise InputError("no")
    raise NotImplementedError()

def fine(x: jax.Array) -> None:
    """α·x of x [B, C] as PyTorch does it. Raises ValueError for none."""
    raise ValueError("none")
''')
    assert list(problems(tree, classes(tree))) == [
        "LIMIT: not explained",
        "SCALE: no source",
        "Policy: no docstring",
        "Good.end: no docstring",
        "Sizes: height not explained",
        "Numbers: no docstring",
        "decode: an array without a shape",
        "step: a formula without a source",
        "read: InputError not said",
    ]
