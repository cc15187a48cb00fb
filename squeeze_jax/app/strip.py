"""Which stage each step of a run is in: as names, and as a strip of coloured cells."""

import html
from collections.abc import Sequence
from itertools import groupby

from squeeze_jax.config import Config
from squeeze_jax.sampling.settings import Resolved

BLUE, ORANGE = "#4c7fb8", "#f0933a"
PAINT = {
    "MLLM": BLUE,
    "MLLM + VAE": f"linear-gradient({BLUE} 50%, {ORANGE} 50%)",
    "VAE": ORANGE,
}
"""CSS background of a stage; the middle one wears both colours."""
MEANING = {"MLLM": "MLLM alone (t ≥ τ1)", "MLLM + VAE": "both", "VAE": "VAE alone (t < τ2)"}

STYLE = """
.strip { display: flex; gap: 2px; }
.strip span { flex: 1; height: 22px; border-radius: 3px; opacity: .25; transition: opacity .2s; }
.strip span.done { opacity: 1; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin-top: 8px; font-size: 13px; }
.legend i {
  display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 6px;
  vertical-align: -1px;
}
"""


def stages_of_steps(config: Config, settings: Resolved, references: bool) -> list[str]:
    """The stage of every step; `references`: whether their tokens take part."""
    return settings.make_schedule(config, references).stage_names(settings.steps)


def counts(stages: Sequence[str]) -> list[tuple[str, int]]:
    """(stage, its number of steps), in order."""
    return [(name, len(list(steps))) for name, steps in groupby(stages)]


def strip(stages: Sequence[str], done: int, warnings: Sequence[str] = ()) -> str:
    """HTML: one cell a step in the stage's colour, the first `done` filled; a legend; the warnings.

    `STYLE` is its CSS.
    """
    cells = "".join(
        f'<span class="{"done" if i < done else "ahead"}" style="background: {PAINT[name]}" '
        f'title="step {i + 1}: {name}"></span>'
        for i, name in enumerate(stages)
    )
    meaning = MEANING if len(set(stages)) > 1 else {stages[0]: f"{stages[0]} throughout"}
    legend = "".join(
        f'<span><i style="background: {PAINT[name]}"></i>{number} × {meaning[name]}</span>'
        for name, number in counts(stages)
    )
    lines = "".join(f'<div class="notice wrong">{html.escape(line)}</div>' for line in warnings)
    return f'<div class="strip">{cells}</div><div class="legend">{legend}</div>{lines}'
