"""How a section of the configuration checks itself when it is built."""

from collections.abc import Iterable, Iterator

from squeeze_jax.errors import InputError


class Checked:
    """A section that refuses impossible values, all of them in one InputError."""

    def __post_init__(self) -> None:
        if problems := list(self._problems()):
            raise InputError("impossible configuration: " + "; ".join(problems))

    def _problems(self) -> Iterable[str]:
        """Yields a sentence for every impossible value, with the full path of its field."""
        raise NotImplementedError


def above_zero(section: str, values: object, *names: str) -> Iterator[str]:
    """Yields a sentence for each of the fields that is not larger than 0."""
    for name in names:
        if (value := getattr(values, name)) <= 0:
            yield f"{section}.{name} is {value}; it must be larger than 0"


def between(
    low: float | int, high: float | int, section: str, values: object, *names: str
) -> Iterator[str]:
    """Yields a sentence for each of the fields that is below `low` or above `high`."""
    for name in names:
        if not low <= (value := getattr(values, name)) <= high:
            yield f"{section}.{name} is {value}; it must be between {low:g} and {high:g}"
