"""`evaluate`: scores of a checkpoint."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro
from etils import epath

from squeeze_jax.commands.parallel import Parallel
from squeeze_jax.commands.run import guarded, setup


@dataclass(frozen=True)
class Evaluate:
    """Scores a checkpoint on held-out examples, next to chance, pasted references and the
    autoencoder's ceiling."""

    suite: Literal["critters"] = "critters"
    """`critters`: retrieval among redrawn candidates (the miniature's data; no learned judge)."""
    checkpoint: epath.Path | None = None
    """Work folder (also gs://bucket/…) or weights folder; none: the shipped miniature."""
    pairs: int = 512
    """Held-out pairs."""
    out: Path = Path("scores.json")
    """JSON report to write."""
    merge_lora: bool = True
    """Add a LoRA to the base at loading, rounded once: less memory and work."""
    parallel: Parallel = field(default_factory=Parallel)


def main(arguments: list[str] | None = None) -> int:
    given = tyro.cli(
        Evaluate, args=sys.argv[1:] if arguments is None else arguments, prog="squeeze_jax evaluate"
    )
    return guarded(lambda: run(given))


def run(given: Evaluate) -> None:
    setup()
    from squeeze_jax.errors import InputError
    from squeeze_jax.evaluation.grids import CHUNK
    from squeeze_jax.interop.load import DEMO
    from squeeze_jax.interop.tensors import check_writable
    from squeeze_jax.miniature.evaluation import score_critters
    from squeeze_jax.sampling.pipeline import Pipeline
    from squeeze_jax.storage import as_path

    check_writable(given.out, "--out")
    checkpoint = as_path(given.checkpoint or DEMO / "system")
    mesh = given.parallel.mesh(checkpoint, min(given.pairs, CHUNK))
    pipeline = Pipeline.load(given.checkpoint, mesh, merge_lora=given.merge_lora)
    if pipeline.config.data.critters is None:
        raise InputError(
            "this checkpoint was not trained on critters: --suite critters cannot score it"
        )
    most = pipeline.config.data.critters.held_out
    if not 1 <= given.pairs <= most:
        raise InputError(
            f"--pairs {given.pairs} must be from 1 to {most}, the held-out pairs of this "
            "checkpoint's data"
        )
    score_critters(pipeline, given.out, given.pairs, checkpoint=str(given.checkpoint or "demo"))
