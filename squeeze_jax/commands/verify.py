"""`verify`: is a published checkpoint whole, and do we compute what its original computes?"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from squeeze_jax.commands.run import guarded, setup


@dataclass(frozen=True)
class Verify:
    """Checks a checkpoint's names and shapes, then its numbers against PyTorch where it is
    installed, block by block."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of a FLUX.1 or FLUX.2 transformer, its autoencoder or InternVL3; or a single-file transformer
    or autoencoder."""
    kind: Literal["flux", "flux2", "autoencoder", "internvl"] | None = None
    """What it is; none: found out from config.json or the names."""
    variant: str | None = None
    """Which variant of the folder's files (`fp16` for `….fp16.safetensors`); none: the standard
    names, or the only variant that there is."""
    json: Path = Path("verify.json")
    """Report to write."""


def main(arguments: list[str] | None = None) -> int:
    given = tyro.cli(
        Verify, args=sys.argv[1:] if arguments is None else arguments, prog="squeeze_jax verify"
    )
    return guarded(lambda: run(given))


def run(given: Verify) -> None:
    setup()
    from squeeze_jax.errors import InputError
    from squeeze_jax.interop.tensors import check_writable, write_json
    from squeeze_jax.interop.verify import TOLERANCE, Row, verify

    def show(row: Row) -> None:
        judged = " ".join(f"{value: .4e}" for value in row.digest)
        if row.error is not None:
            judged = f"{row.error:.1e}  {'pass' if row.passed else 'FAIL'}"
        print(f"  {row.part:40}{judged}", flush=True)

    check_writable(given.json, "--json")
    report = verify(given.folder, given.kind, variant=given.variant, progress=show)
    write_json(given.json, report.to_json())
    print(
        f"{report.folder}: {report.kind} in the layout of {report.layout}, {report.parameters:,} values"
    )
    if report.problems:
        shown = "\n  ".join(report.problems[:40])
        more = (
            f"\n  … and {len(report.problems) - 40} more in {given.json}"
            if len(report.problems) > 40
            else ""
        )
        raise InputError(
            f"{report.folder} does not fit ({len(report.problems)} differences):\n  {shown}{more}"
        )
    if not report.passed:
        raise InputError(
            f"{report.folder}: some parts differ by more than {TOLERANCE:g} or are not finite; see {given.json}"
        )
    if report.rows[0].error is None:
        print(
            "names, shapes and types fit; there was no twin in PyTorch, so compare the digests with another machine's"
        )
    else:
        print("passed")
    print(f"report: {given.json}")
