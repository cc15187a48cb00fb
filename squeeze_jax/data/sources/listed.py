"""Rows of a checked list, in memory; each picture is a file of its own."""

from collections.abc import Sequence

from squeeze_jax.data.images import load_image
from squeeze_jax.data.manifest import Manifest, Row
from squeeze_jax.data.record_writer import Example
from squeeze_jax.data.sources.contract import MOST_LISTED, Opened, Report
from squeeze_jax.errors import InputError


class ManifestRows:
    """Rows of a checked manifest; pictures are read when they are asked for.

    Raises InputError for a row without a target.
    """

    prompts_are_valid = False

    def __init__(self, rows: Sequence[Row], source: str) -> None:
        for row in rows:
            if row.target is None:
                raise InputError(
                    f'row {row.number}: "image_tgt_path" is missing; training needs the picture '
                    "to learn"
                )
        self.rows, self.source = rows, source

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        row = self.rows[index]
        assert row.target is not None
        references = [load_image(path) for path in row.references]
        return Example(row.prompt, references, load_image(row.target), row.other_captions)

    def prompt(self, index: int) -> str:
        """The row's."""
        return self.rows[index].prompt

    def other_captions(self, index: int) -> Sequence[str]:
        """Behind the first, `prompt`."""
        return self.rows[index].other_captions

    def references(self, index: int) -> int:
        """How many an example has."""
        return len(self.rows[index].references)

    def name(self, index: int) -> str:
        """What a message calls it: its place in the file, from 1."""
        return f"row {self.rows[index].number}"

    def between(self, first: int, last: int, source: str) -> "ManifestRows":
        return ManifestRows(self.rows[first:last], source)

    def row_end(self, index: int) -> int:
        return index


def opened(kind: str, manifest: Manifest) -> Opened:
    """What a source of listed rows returns."""
    count = manifest.looked_at
    report = Report(rows=count, examples=count, warnings=manifest.warnings)
    bad = count - len(manifest.rows)
    if bad:
        report.bad = report.dropped["cannot be used"] = bad
        skipped = [line for line in manifest.warnings if line.startswith("skipped row ")]
        report.found = len(skipped)
        report.problems = [line.removeprefix("skipped ") for line in skipped[:MOST_LISTED]]
    rows = ManifestRows(manifest.rows, f"{kind} {manifest.digest}")
    return Opened(rows, report, held_out_first=False)
