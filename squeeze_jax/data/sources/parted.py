"""Examples of a source in parts: archives or row groups, each read in order from its beginning.

Only counts are kept of all parts, and the labels of one part at a time, so memory does not grow
with the set. Parts are what processes share out: nobody reads an archive of which another makes
records.
"""

from collections.abc import Hashable, Iterator, Sequence
from hashlib import sha256
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from squeeze_jax.data.record_writer import Example, RowError
from squeeze_jax.data.sources.contract import Left, Opened, Options, Report

Key = Hashable
"""How a part finds one of its pictures."""


class Entry(NamedTuple):
    """An example of a part, without its pictures."""

    name: str
    """What messages call it."""
    row: int
    """Of the part: the two directions of a pair share one and are never kept apart."""
    prompt: str
    references: tuple[Key, ...]
    target: Key


@runtime_checkable
class Pictures(Protocol):
    """The pictures of one part while it is open."""

    def read(self, key: Key, name: str) -> Image.Image:
        """A picture; each key is asked once, in the order of the entries.

        Raises RowError, which begins with `name`, where this picture alone cannot be had, and
        InputError where the part is damaged.
        """
        ...

    def finish(self) -> None:
        """After the part's last picture: raises InputError where what is left of it is damaged."""
        ...

    def close(self) -> None:
        """Closes its files."""
        ...


@runtime_checkable
class Part(Protocol):
    """An archive, or a row group."""

    def entries(self) -> Iterator[Entry | Left]:
        """Its examples in order, the same each time. Reads no pictures.

        Raises InputError where the part cannot be read.
        """
        ...

    def open(self, wanted: Sequence[Key]) -> Pictures:
        """Its pictures, those that are `wanted`, in that order."""
        ...


class PartedExamples:
    """The examples `first` up to `last` of the parts, by number."""

    prompts_are_valid = False

    def __init__(
        self,
        parts: Sequence[Part],
        counts: Sequence[int],
        source: str,
        most_references: int,
        first: int = 0,
        last: int | None = None,
    ) -> None:
        """counts: the examples of each part that are taken, its first ones."""
        self.source, self.most_references = source, most_references
        self._parts, self._counts = parts, counts
        self._ends = np.cumsum([0, *counts])
        self._first, self._last = first, int(self._ends[-1]) if last is None else last
        self._labels: tuple[int, list[Entry]] = (-1, [])
        self._open: _OpenPart | None = None

    def __len__(self) -> int:
        return self._last - self._first

    @property
    def parts(self) -> Sequence[int]:
        """The examples of each part that has any."""
        inside = np.diff(np.clip(self._ends, self._first, self._last)).tolist()
        return [count for count in inside if count]

    def between(self, first: int, last: int, source: str) -> "PartedExamples":
        return PartedExamples(
            self._parts,
            self._counts,
            source,
            self.most_references,
            self._first + first,
            self._first + last,
        )

    def row_end(self, index: int) -> int:
        while 0 < index < len(self):
            (part, place), (before, other) = self._place(index), self._place(index - 1)
            same = self._entries(part)[place].row == self._entries(before)[other].row
            if part != before or not same:
                break
            index += 1
        return index

    def prompt(self, index: int) -> str:
        """The row's."""
        return self._entry(index).prompt

    def references(self, index: int) -> int:
        """How many an example has."""
        return len(self._entry(index).references)

    def name(self, index: int) -> str:
        """What a message calls it: file and row."""
        return self._entry(index).name

    def __getitem__(self, index: int) -> Example:
        part, place = self._place(index)
        if self._open is None or not self._open.can_read(part, place):
            self.close()
            # Pictures of other examples, such as those that validate, need not wait.
            end = min(self._counts[part], self._last - int(self._ends[part]))
            self._open = _OpenPart(self._parts[part], part, self._entries(part), place, end)
        return self._open.read(place)

    def close(self) -> None:
        """Closes the part that is open."""
        opened, self._open = self._open, None
        if opened is not None:
            opened.pictures.close()

    def __del__(self) -> None:
        if hasattr(self, "_open"):
            self.close()

    def _place(self, index: int) -> tuple[int, int]:
        """The part that an example is of, and its place there."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = self._first + index
        part = int(np.searchsorted(self._ends, number, side="right")) - 1
        return part, number - int(self._ends[part])

    def _entries(self, part: int) -> list[Entry]:
        if self._labels[0] != part:
            found = [one for one in self._parts[part].entries() if isinstance(one, Entry)]
            self._labels = (part, found)
        return self._labels[1]

    def _entry(self, index: int) -> Entry:
        part, place = self._place(index)
        return self._entries(part)[place]


class _OpenPart:
    """A part from one of its examples on, up to `end`."""

    def __init__(
        self, part: Part, number: int, entries: Sequence[Entry], start: int, end: int
    ) -> None:
        self.number, self.entries, self.next = number, entries, start
        wanted = [key for one in entries[start:end] for key in (*one.references, one.target)]
        self.pictures = part.open(list(dict.fromkeys(wanted)))
        self.decoded: dict[Key, Image.Image] = {}
        self.failed: dict[Key, RowError] = {}

    def can_read(self, number: int, place: int) -> bool:
        """Whether an example has not been passed yet."""
        return number == self.number and place >= self.next

    def read(self, place: int) -> Example:
        entry = self.entries[place]
        self.next = place + 1
        keys = (*entry.references, entry.target)
        # The other direction of a pair has the same pictures, which are decoded once.
        self.decoded = {key: image for key, image in self.decoded.items() if key in keys}
        for key in keys:
            if key in self.failed:
                raise self.failed[key]
            if key not in self.decoded:
                try:
                    self.decoded[key] = self.pictures.read(key, entry.name)
                except RowError as error:
                    self.failed[key] = error
                    raise
        if self.next == len(self.entries):
            self.pictures.finish()
        references = [self.decoded[key] for key in entry.references]
        return Example(entry.prompt, references, self.decoded[entry.target])


def open_parts(kind: str, parts: Sequence[Part], options: Options, directions: int = 1) -> Opened:
    """Reads the labels of all parts once: which examples pass, how many each part has.

    directions: entries, kept or left out, that each row of the source makes.
    """
    report, counts, digest, most = Report(), [0] * len(parts), sha256(), 0
    left = options.limit
    for number, part in enumerate(parts):
        if left == 0:
            break
        for one in part.entries():
            if left == 0:
                break
            report.examples += 1
            if isinstance(one, Left):
                report.leave_out(one)
                continue
            counts[number] += 1
            left = None if left is None else left - 1
            most = max(most, len(one.references))
            digest.update(repr(one).encode(errors="surrogatepass"))
    report.rows = -(-report.examples // directions)
    if options.skip_bad and report.bad:
        lines = [f"{report.bad:,} of {report.examples:,} examples", *report.listed()]
        report.warnings += [f"skipped {line}" for line in lines]
    rows = PartedExamples(parts, counts, f"{kind} {digest.hexdigest()}", most)
    return Opened(rows, report, held_out_first=True)
