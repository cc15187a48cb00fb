"""What a source of examples is, for extraction, on-line training, sample grids and `data describe`.

A source is a module of `sources/` with a function

    open_rows(path: Path, options: Options) -> Opened

It reads what tells rows apart (labels, captions, scores, names of pictures), never the pictures
themselves unless `options.check_images` asks for it and they are files of their own.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

from squeeze_jax.data.record_writer import Example
from squeeze_jax.errors import InputError, printable

MOST_LISTED = 20
"""Bad rows that a message lists."""


@runtime_checkable
class Examples(Protocol):
    """Examples by number.

    Prompts and numbers of references can be asked without decoding a picture. `rows[i]` raises
    `RowError` where example i alone cannot be used. Optional: `parts` (see `parts_of`),
    `most_references`, `other_captions` (see `captions_of`).
    """

    @property
    def source(self) -> str:
        """What makes these examples these examples: a digest, or a generator's seed."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...

    def prompt(self, index: int, /) -> str:
        """The prompt of an example, the first one of several."""
        ...

    def references(self, index: int, /) -> int:
        """How many an example has."""
        ...

    def name(self, index: int, /) -> str:
        """What a message calls an example."""
        ...

    @property
    def prompts_are_valid(self) -> bool:
        """Whether every prompt is known to fit the MLLM, so that none has to be checked."""
        ...


@runtime_checkable
class SourceRows(Examples, Protocol):
    """Examples of a source, which can be cut in two."""

    def between(self, first: int, last: int, source: str) -> "SourceRows":
        """Those from `first` up to, not including, `last`."""
        ...

    def row_end(self, index: int) -> int:
        """The first number from `index` on at which another row of the source begins."""
        ...


def parts_of(rows: Examples) -> Sequence[int] | None:
    """The examples of each part, in order; None where any example can be read alone.

    A part (an archive, a row group) is read from its beginning to its end by one process.
    """
    return getattr(rows, "parts", None)


def captions_of(rows: Examples, index: int) -> list[str]:
    """All captions of an example, `prompt` first."""
    others: Callable[[int], Sequence[str]] | None = getattr(rows, "other_captions", None)
    return [rows.prompt(index), *(others(index) if others else ())]


def most_captions(rows: Examples) -> int:
    """The largest number of captions of an example."""
    if not hasattr(rows, "other_captions"):
        return 1
    return max(len(captions_of(rows, index)) for index in range(len(rows)))


def most_references(rows: Examples) -> int:
    """The largest number of references of an example."""
    known: int | None = getattr(rows, "most_references", None)
    return known or max(rows.references(index) for index in range(len(rows)))


class Options(NamedTuple):
    """What is asked of a source, beside where it lies."""

    min_score: float | None = None
    """`data.min_score`."""
    limit: int | None = None
    """Examples to take, after filters."""
    check_images: bool = False
    """Decodes every picture that is a file of its own."""
    skip_bad: bool = False
    """Counts rows that cannot be used, instead of refusing them."""
    image_root: str | None = None
    """`data.image_root`."""


class Left(NamedTuple):
    """An example that is left out."""

    reason: str
    """A few words, the same for all that are left out for it: they are counted by it."""
    problem: str = ""
    """Where the row cannot be used: a sentence that names it. Empty: a filter leaves it out."""


@dataclass
class Report:
    """What a source found in its rows."""

    rows: int = 0
    """That were looked at; a pair is one row and two examples."""
    examples: int = 0
    """In all of these rows."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Examples that are left out, by reason."""
    bad: int = 0
    """Those of them that cannot be used, and are no filter's."""
    problems: list[str] = field(default_factory=list)
    """Sentences about the first `MOST_LISTED` bad rows."""
    found: int = 0
    """Sentences in all."""
    warnings: list[str] = field(default_factory=list)
    """What is allowed but probably not meant."""
    _last: str = ""

    @property
    def kept(self) -> int:
        """Examples that were not dropped."""
        return self.examples - self.dropped.total()

    def leave_out(self, left: Left) -> None:
        """Counts one example that is left out."""
        self.dropped[left.reason] += 1
        if left.problem:
            self.bad += 1
            if left.problem != self._last:  # both directions of a pair have the same
                self.found += 1
                if self.found <= MOST_LISTED:
                    self.problems.append(printable(left.problem))
            self._last = left.problem

    def refuse_bad(self, name: str) -> None:
        """Raises InputError that lists the bad examples, if there are any."""
        if self.bad:
            head = f"{name}: {self.bad:,} of {self.examples:,} examples cannot be used; correct"
            raise InputError(
                "\n  ".join([f"{head} them, or leave them out with --skip-bad:", *self.listed()])
            )

    def listed(self) -> list[str]:
        """The problems that are known, and how many more there are."""
        more = self.found - len(self.problems)
        return [*self.problems, *([f"and {more:,} more"] if more else [])]

    def summary(self) -> str:
        """`1,200 of 2,000 examples; left out: 700 score below 3.5, 100 score unknown`."""
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.most_common())
        return f"{self.kept:,} of {self.examples:,} examples" + (
            f"; left out: {reasons}" if reasons else ""
        )


class Opened(NamedTuple):
    """A source's examples, those that pass, and what it found."""

    rows: SourceRows
    report: Report
    held_out_first: bool
    """Whether validation takes the first rows, which are read soonest, or the last."""


def refuse_scores(options: Options, kind: str) -> None:
    """Raises InputError where a filter by score is asked of a source that has none."""
    if options.min_score is not None:
        raise InputError(
            f"min_score {options.min_score:g}: {kind} has no scores; it is for uno1m and "
            "subjects200k"
        )


def threshold(options: Options, default: float) -> float:
    """The score to reach; 0: every row is taken, also one without a score."""
    return default if options.min_score is None else options.min_score


def known_score(value: object, most: float) -> float | None:
    """A score from 0 to `most`; None for anything else: it is unknown, never high."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= most:
        return float(value)
    return None


def score_problem(scores: Iterable[float | None], least: float) -> Left | None:
    """Why an example with these scores is left out by the filter, if it is."""
    if least <= 0:
        return None
    found = list(scores)
    if any(score is None for score in found):
        return Left("score unknown")
    if any(score < least for score in found if score is not None):
        return Left(f"score below {least:g}")
    return None
