"""Numbers from outside are finite: a comparison with NaN is never true, so that no range check
would see one."""

import dataclasses
import json
import math
from collections.abc import Iterator
from typing import Any


def not_finite(value: object, path: str = "") -> Iterator[str]:
    """Yields a sentence, with the dotted path, for every NaN and infinity below dataclasses,
    tuples and lists."""
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{path} is {value}; give a finite number"
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from not_finite(getattr(value, field.name), f"{path}.{field.name}".lstrip("."))
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from not_finite(item, f"{path}.{index}")


def load_json(text: str | bytes) -> Any:
    """What `json.loads` gives; ValueError where a number is NaN or infinite, which JSON has not."""
    return json.loads(text, parse_constant=_finite, parse_float=_finite)


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"the number {text} is not finite")
    return value
