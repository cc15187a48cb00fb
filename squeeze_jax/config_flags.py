"""Flags for optional sections of the configuration: left out, or begun where a preset has none."""

import dataclasses
from typing import Any, get_args, get_type_hints


def set_optional(section: Any, arguments: list[str], prefix: str = "") -> tuple[Any, list[str]]:
    """Returns the section, and the arguments that are left.

    An optional section below it (`lora`, `data.critters`) is left out by `--lora None`, and begins
    with its defaults where it is None and a flag names one of its fields.
    """
    hints, changed = get_type_hints(type(section)), {}
    for field in dataclasses.fields(section):
        value, path = getattr(section, field.name), f"{prefix}{field.name}"
        kinds = [kind for kind in get_args(hints[field.name]) if dataclasses.is_dataclass(kind)]
        if kinds and type(None) in get_args(hints[field.name]):
            left = _without(arguments, path)
            if len(left) < len(arguments):
                value, arguments = None, left
            elif value is None and any(_names(one, f"{path}.") for one in arguments):
                value = kinds[0]()  # pyright: ignore[reportCallIssue]
        if dataclasses.is_dataclass(value):
            value, arguments = set_optional(value, arguments, f"{path}.")
        if value is not getattr(section, field.name):
            changed[field.name] = value
    return (dataclasses.replace(section, **changed) if changed else section), arguments


def _names(argument: str, path: str) -> bool:
    """Whether an argument is the flag of `path`, or of a field below a path that ends with a dot."""
    flag = argument.partition("=")[0].removeprefix("--").replace("-", "_")
    return argument.startswith("--") and (
        flag.startswith(path) if path.endswith(".") else flag == path
    )


def _without(arguments: list[str], path: str) -> list[str]:
    """The arguments without `--path None` and `--path=None`."""
    left, rest = [], iter(enumerate(arguments))
    for index, argument in rest:
        value = argument.partition("=")[2] or "".join(arguments[index + 1 : index + 2])
        if not _names(argument, path) or value.lower() != "none":
            left.append(argument)
        elif "=" not in argument:
            next(rest)  # its value
    return left
