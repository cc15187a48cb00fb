"""Draws the figures of docs/method.md: `python docs/draw_figures.py` (matplotlib)."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from squeeze_jax.config import load_preset

DOCS = Path(__file__).parent
FROZEN, TRAINED, DATA, IMAGE = "#dfe6ee", "#f7c98b", "#ffffff", "#b9dcc3"


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, colour: str,
        size: float = 9.5) -> None:  # fmt: skip
    """A rounded box around its middle."""
    axes.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - height / 2), width, height,
            boxstyle="round,pad=0.02,rounding_size=0.08",
            facecolor=colour, edgecolor="0.25", linewidth=1,
        )
    )  # fmt: skip
    axes.text(x, y, text, ha="center", va="center", fontsize=size)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], text: str = "",
          bend: float = 0.0, where: tuple[float, float] = (0, 0.14)) -> None:  # fmt: skip
    """An arrow with a word beside its middle."""
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=12, color="0.25", linewidth=1.1,
            connectionstyle=f"arc3,rad={bend}", shrinkA=0, shrinkB=0,
        )
    )  # fmt: skip
    middle = (start[0] + end[0]) / 2 + where[0], (start[1] + end[1]) / 2 + where[1]
    axes.text(*middle, text, ha="center", va="center", fontsize=8, color="0.25")


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A page measured in its own units, one an inch."""
    figure = Figure(figsize=(width, height), dpi=140)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def draw_system() -> Figure:
    """From references and prompt to the velocity."""
    figure, axes = canvas(10.3, 4.6)
    box(axes, 0.95, 3.6, 1.5, 0.6, "prompt", DATA)
    box(axes, 0.95, 2.3, 1.5, 0.6, "references", DATA)
    box(axes, 0.95, 0.8, 1.5, 0.6, "noise, time t", DATA)
    box(axes, 3.2, 3.25, 1.7, 1.2, "MLLM\nInternVL3-8B\n29 hidden states", FROZEN)
    box(axes, 3.2, 1.55, 1.7, 0.8, "autoencoder", FROZEN)
    box(
        axes,
        5.6,
        3.25,
        1.9,
        1.2,
        "aggregator (DLA)\npools the layers,\ntext and image apart",
        TRAINED,
    )
    box(axes, 8.0, 2.05, 1.8, 3.1, "transformer\nFLUX", FROZEN)
    box(axes, 8.0, 0.92, 1.5, 0.55, "LoRA", TRAINED)
    arrow(axes, (1.72, 3.6), (2.33, 3.45))
    arrow(axes, (1.72, 2.45), (2.33, 2.95))
    arrow(axes, (1.72, 2.15), (2.33, 1.7))
    arrow(axes, (4.07, 3.25), (4.63, 3.25))
    arrow(axes, (6.57, 3.25), (7.08, 3.25), "context", where=(0, 0.16))
    arrow(axes, (4.07, 1.55), (7.08, 1.55), "clean latents, as further image tokens")
    arrow(axes, (1.72, 0.8), (7.08, 0.8), "the target's noised latent, as image tokens")
    arrow(axes, (8.92, 2.05), (9.5, 2.05), "")
    axes.text(9.55, 2.05, "ε − x₀", fontsize=11, va="center")
    for x, colour, text in ((3.2, FROZEN, "frozen"), (5.0, TRAINED, "trained")):
        box(axes, x, 4.3, 0.3, 0.2, "", colour)
        axes.text(x + 0.28, 4.3, text, fontsize=9, va="center")
    return figure


def draw_aggregator() -> Figure:
    """One token's layers through a LAP, and both kinds of tokens joined."""
    figure, axes = canvas(10, 3.9)
    for row, (name, colour, y) in enumerate((("text", FROZEN, 2.8), ("image", IMAGE, 1.0))):
        for layer in range(5):
            box(axes, 0.75 + 0.34 * layer, y, 0.24, 0.8, "", colour)
        axes.text(1.43, y + 0.62, f"{name} token: layers 0 … 28", ha="center", fontsize=9)
        arrow(axes, (2.35, y), (2.8, y))
        box(axes, 3.75, y, 1.8, 0.95, "attention\nacross layers,\nSwiGLU", TRAINED)
        arrow(axes, (4.68, y), (5.1, y))
        box(axes, 5.75, y, 1.2, 0.7, "Σ wₘ hₘ", TRAINED, 10.5)
        arrow(axes, (6.38, y), (6.88, 1.9 + 0.25 * (1 - 2 * row)))
        axes.text(4.55, y + 0.66, f"LAP of {name} tokens", ha="center", fontsize=9, color="0.25")
    box(axes, 7.75, 1.9, 1.65, 1.2, "joined in order;\n2 refiner blocks\nover tokens", TRAINED)
    arrow(axes, (8.6, 1.9), (9.0, 1.9))
    axes.text(9.05, 1.9, "context\n[L, 4096]", fontsize=9, va="center")
    return figure


def draw_stages() -> Figure:
    """Time over the steps of sampling, and which conditions each step sees."""
    config = load_preset(DOCS.parent / "configs" / "flux_stage2.py")
    sampling = config.sampling
    rows, columns = config.target_grid
    shift = np.exp(config.schedule_shift(rows * columns, sampling.steps))
    s = 1 - np.arange(sampling.steps + 1) / sampling.steps
    with np.errstate(divide="ignore"):
        times = shift / (shift + 1 / s - 1)
    figure = Figure(figsize=(8, 3.6), dpi=140, layout="constrained")
    axes = figure.add_subplot()
    tau1, tau2 = sampling.tau1, sampling.tau2
    bands = ((1.02, tau1, TRAINED, "MLLM alone"), (tau1, tau2, "#e9e2f5", "both"),
             (tau2, 0, IMAGE, "references alone"))  # fmt: skip
    for high, low, colour, text in bands:
        axes.axhspan(low, high, color=colour, alpha=0.75, linewidth=0)
        count = int(np.sum((times[:-1] >= low) & (times[:-1] < high)))
        height = max((high + low) / 2, 0.65)  # above the curve
        axes.text(sampling.steps * 0.99, height, f"{text}: {count} steps", ha="right",
                  va="center", fontsize=9)  # fmt: skip
    axes.plot(times, "o-", color="0.2", markersize=4, linewidth=1)
    for name, value in (("τ1", sampling.tau1), ("τ2", sampling.tau2)):
        axes.axhline(value, color="0.4", linewidth=0.8, linestyle="--")
        axes.text(0.2, value - 0.012, f"{name} = {value}", va="top", fontsize=8, color="0.3")
    axes.set(xlabel=f"step, of {sampling.steps} at {config.data.height}×{config.data.width}",
             ylabel="t (1 is noise)",
             ylim=(0, 1.02), xlim=(-0.3, sampling.steps + 0.3))  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    for name, draw in (
        ("system", draw_system),
        ("aggregator", draw_aggregator),
        ("stages", draw_stages),
    ):
        draw().savefig(DOCS / f"method_{name}.png")
        print(DOCS / f"method_{name}.png")


if __name__ == "__main__":
    main()
