"""`inspect`: how a checkpoint's aggregator uses the MLLM's layers."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from etils import epath

from squeeze_jax.commands.run import guarded, setup


@dataclass(frozen=True)
class Inspect:
    """Draws the aggregator's learned layer weights and its attention over layers, for text and
    image tokens apart, as PNG, and writes the numbers as JSON."""

    checkpoint: Annotated[Path | None, tyro.conf.Positional] = None
    """Work, weights or exported folder; none: the shipped miniature."""
    out: Path = Path("inspection")
    """Folder for layers.png and layers.json."""
    features: epath.Path | None = None
    """Records whose held-out examples attention is averaged over; none: three shipped pictures,
    read by the checkpoint's MLLM."""


def main(arguments: list[str] | None = None) -> int:
    given = tyro.cli(
        Inspect, args=sys.argv[1:] if arguments is None else arguments, prog="squeeze_jax inspect"
    )
    return guarded(lambda: run(given))


def run(given: Inspect) -> None:
    setup()
    from squeeze_jax.evaluation.layer_use import inspect_checkpoint, write_inspection
    from squeeze_jax.evaluation.report import require_matplotlib
    from squeeze_jax.interop.load import checkpoint_folder
    from squeeze_jax.interop.tensors import check_writable

    require_matplotlib()
    check_writable(given.out / "layers.json", "--out")
    found = inspect_checkpoint(checkpoint_folder(given.checkpoint), given.features)
    for name, use in found.use.items():
        order = sorted(range(len(found.layers)), key=lambda i: -use.shares[i])[:3]
        listed = ", ".join(f"{found.layers[i]} ({100 * use.shares[i]:.0f} %)" for i in order)
        print(f"{name} tokens: most of the pooled vector comes from layers {listed}")
    if found.vision_weight is not None:
        print(f"image tokens: the vision tower's share is {100 * found.vision_weight:.1f} %")
    elif not found.use:
        print(
            f"{found.kind} takes hidden state {found.layers[-1]} alone; there is nothing to weigh"
        )
    print(f"written: {', '.join(map(str, write_inspection(given.out, found)))}")
