"""Configs as JSON: how checkpoints and exported folders note them, and what differs between two."""

import dataclasses
import json
from typing import Any, get_args

from squeeze_jax.array_types import Json
from squeeze_jax.config import Config
from squeeze_jax.config_names import RENAMED
from squeeze_jax.errors import InputError
from squeeze_jax.finite import load_json

MEANT = {"max_text_tokens": 128}
"""What a missing field of `data` meant before there was a choice, where that is not its default."""


def to_json(config: Config) -> str:
    """The resolved config as JSON, fields in order."""
    return json.dumps(dataclasses.asdict(config), indent=1)


def from_json(text: str) -> Config:
    """The inverse of `to_json`. A missing field has its default, or what it `MEANT`; one with an
    old name of `config_names.RENAMED` is read under its new one. Raises InputError for what is no
    config.
    """
    try:
        value = load_json(text)
        if isinstance(value, dict) and isinstance(data := value.get("data", {}), dict):
            value["data"] = MEANT | data
        return _build(Config, value, "config")
    except InputError:
        raise
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"not a config ({error})") from error


def _build(kind: Any, value: Any, where: str) -> Any:
    """A value of the annotated type from JSON, dataclasses and tuples of them included."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise InputError(f"{where} must be an object, it is {value!r}")
        fields = {f.name: f for f in dataclasses.fields(kind)}
        value = _with_new_names(value, where)
        unknown = sorted(set(value) - set(fields))
        if unknown:
            raise InputError(
                f"{where} has unknown fields {', '.join(unknown)}: it was written by another "
                "version"
            )
        return kind(
            **{
                name: _build(fields[name].type, item, f"{where}.{name}")
                for name, item in value.items()
            }
        )  # type: ignore
    arguments = get_args(kind)
    if value is None or not arguments:
        return value
    if getattr(kind, "__origin__", None) is tuple:
        inner = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        return tuple(_build(k, v, where) for k, v in zip(inner, value))
    options = [option for option in arguments if dataclasses.is_dataclass(option)]
    if options and isinstance(value, dict):  # of several, the one whose fields these are
        return _build(
            min(options, key=lambda option: len(_names(option) ^ set(value))), value, where
        )
    return value


def _names(kind: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def _with_new_names(values: Json, where: str) -> Json:
    """The fields of a section under the names that they have today."""
    section = where.removeprefix("config").lstrip(".")
    for old, new in RENAMED.items():
        path, _, name = old.rpartition(".")
        today = new.rpartition(".")[2]
        if path == section and name in values and today not in values:
            values = {today if field == name else field: item for field, item in values.items()}
    return values


def differences(old: Config, new: Config) -> list[str]:
    """`path: old → new` for every field that differs, `training.stages.1.steps` among them; where
    one has no such section or stage its value is None."""

    def flat(prefix: str, value: Any) -> Json:
        if isinstance(value, tuple) and value and all(isinstance(item, dict) for item in value):
            value = {str(index): item for index, item in enumerate(value)}  # stages, one by one
        if not isinstance(value, dict):
            return {prefix: value}
        parts = [flat(f"{prefix}.{name}".lstrip("."), item) for name, item in value.items()]
        return {name: item for part in parts for name, item in part.items()}

    a, b = flat("", dataclasses.asdict(old)), flat("", dataclasses.asdict(new))
    return [
        f"{k}: {a.get(k)} → {b.get(k)}" for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)
    ]
