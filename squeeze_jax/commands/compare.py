"""`compare`: training runs side by side."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from squeeze_jax.commands.run import guarded


@dataclass(frozen=True)
class Compare:
    """Puts runs side by side: loss curves, scores with intervals, pictures, settings that differ.

    Reads metrics.jsonl, samples, scores.json and evaluation/SUITE below each folder; draws and
    trains nothing.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Work folders of training, two or more."""
    out: Path = Path("comparison")
    """Folder for report.html and scores.json."""


def main(arguments: list[str] | None = None) -> int:
    given = tyro.cli(
        Compare, args=sys.argv[1:] if arguments is None else arguments, prog="squeeze_jax compare"
    )
    return guarded(lambda: run(given))


def run(given: Compare) -> None:
    from squeeze_jax.errors import InputError
    from squeeze_jax.evaluation.report import print_report, require_matplotlib, write_report
    from squeeze_jax.evaluation.runs import compare_report, name_runs, read_run
    from squeeze_jax.interop.tensors import check_writable

    if len(given.runs) < 2:
        raise InputError(f"{len(given.runs)} run given; name at least two folders to compare")
    require_matplotlib()
    check_writable(given.out / "report.html", "--out")
    named = name_runs(given.runs)
    runs = [read_run(folder, name) for name, folder in named.items()]
    report, values = compare_report(runs, " and ".join(named) if len(named) < 4 else "Runs")
    print_report(report)
    write_report(given.out, report, values)
    print(f"report: {given.out / 'report.html'}")
