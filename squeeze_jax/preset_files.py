"""Where presets lie: as files anywhere, or by name among those that come with the package."""

import ast
from pathlib import Path

from squeeze_jax.errors import InputError

_PACKAGE = Path(__file__).parent
SHIPPED = next(
    (f for f in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if (f / "demo.py").is_file()),
    _PACKAGE / "configs",
)
"""`configs/` of a clone; an installed package has a copy within."""


def find_preset(preset: str | Path) -> Path:
    """Returns the file of a preset: a path, or a name such as `demo` or `ablations/lap`.

    A path below `configs/` that is not there is looked for among the shipped ones, so that commands
    of the documentation work outside a clone. Raises InputError that lists what there is.
    """
    path = Path(preset)
    if path.is_file():
        return path
    shipped = _shipped(path)
    if shipped is not None and shipped.with_suffix(".py").is_file():
        return shipped.with_suffix(".py")
    nearby = sorted(p.as_posix() for p in path.parent.glob("*.py")) if path.suffix else []
    there = nearby or [name for name in list_presets() if "/" not in name]
    raise InputError(f"no preset {preset}; there are {', '.join(there)}")


def find_presets(folder: str | Path) -> list[Path]:
    """Returns the files of a folder of presets, which may be a shipped one (`ablations`) likewise;
    of one preset, that alone."""
    path = Path(folder)
    for place in (path, _shipped(path)):
        if place is not None and place.is_dir():
            return sorted(place.glob("*.py"))
    return [find_preset(path)]


def _shipped(path: Path) -> Path | None:
    """Where a path below `configs/`, or the name of a preset, would lie among the shipped ones."""
    parts = path.parts[1:] if path.parts[:1] == ("configs",) else path.parts
    return None if path.is_absolute() or ".." in parts else SHIPPED.joinpath(*parts)


def list_presets() -> dict[str, str]:
    """Returns the name of every shipped preset → the first sentence about it."""
    found = {}
    for file in sorted(SHIPPED.rglob("*.py"), key=lambda file: (len(file.parts), file)):
        about = ast.get_docstring(ast.parse(file.read_text())) or ""
        name = file.relative_to(SHIPPED).with_suffix("").as_posix()
        found[name] = " ".join(about.split("\n\n")[0].split())
    return found
