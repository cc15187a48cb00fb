"""What a run shows of itself: smoothed loss, loss by noise level, speed, utilisation, waiting, goodput, memory."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np

from squeeze_jax.interop.tensors import write_json
from squeeze_jax.processes import is_main
from squeeze_jax.training.step import TIME_BORDERS, Metrics

STARTED = "started.json"
SLOW_INPUT = 0.2
"""Share of the time spent waiting for input from which on a run warns (our decision)."""


class Watch:
    """Takes in every step's metrics and gives, now and then, a row of figures.

    Speed covers the steps since the last row without pauses: validation, sampling, saving, and the first step of every
    stage and shape of batch, which is compiled. Goodput is the share of wall time since the run's first start, restarts
    included, that went into steps which still count.
    """

    def __init__(self, rows: int, workdir: Path, productive_seconds: float, say: Callable[[str], None]) -> None:
        self.rows = rows
        self.peak: float | None = None
        """Peak FLOP/s of all devices; None where unknown."""
        self.loss = float("nan")
        self._productive, self._first_start = productive_seconds, _first_start(workdir)
        self._say, self._warned = say, False
        self._values: dict[str, float] = {}
        self._by_time = np.zeros((2, len(TIME_BORDERS) - 1))
        self.restart()

    def restart(self) -> None:
        """Begins to measure speed anew."""
        self._seconds: float = 0.0
        self._running_since: float | None = time.perf_counter()
        self._count, self._waited, self._flops = 0, 0.0, 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what fetches a batch."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Around what is no training."""
        self._seconds, self._running_since = self._running(), None
        yield
        self._running_since = time.perf_counter()

    def _running(self) -> float:
        """Seconds since the last row, without pauses."""
        return self._seconds + (0.0 if self._running_since is None else time.perf_counter() - self._running_since)

    @property
    def productive_seconds(self) -> float:
        """Seconds of all steps that count, in all of the run's lives."""
        return self._productive + self._running()

    def read(self, metrics: Metrics, flops: float = 0.0, *, timed: bool = True) -> None:
        """Waits for a step and takes its metrics in. flops: its model FLOPs on all devices, 0 where unknown. timed: False
        within a `pause`."""
        got = jax.device_get(metrics)
        self._values = {name: float(value) for name, value in got._asdict().items() if np.ndim(value) == 0}
        loss = self._values["loss"]
        if np.isfinite(loss):
            self.loss = loss if not np.isfinite(self.loss) else 0.98 * self.loss + 0.02 * loss
            self._by_time += np.stack([got.loss_by_time, got.count_by_time])
        if timed:
            self._count, self._flops = self._count + 1, self._flops + flops

    def row(self, step: int) -> dict[str, float]:
        """Figures of the steps since the last row, which ends here; warns where they waited for input."""
        seconds = max(self._running(), 1e-9)
        self._productive += seconds
        row = {**self._values, "loss_smoothed": self.loss}
        for low, high, total, number in zip(TIME_BORDERS, TIME_BORDERS[1:], *self._by_time):
            if number:
                row[f"loss_t_{low:g}_{high:g}"] = float(total / number)
        self._by_time[:] = 0
        row["goodput"] = self._productive / max(time.time() - self._first_start, 1e-9)
        row |= memory_in_use()
        if self._count:
            row |= self._speed(seconds)
        if row.get("input_wait", 0.0) > SLOW_INPUT and self._count > 1 and not self._warned:
            self._warned = True
            self._say(
                f"warning: {100 * row['input_wait']:.0f} % of the time up to step {step} went into waiting for input: "
                "records are read and padded too slowly; raise data.workers, or put the records on a faster disk"
            )
        self.restart()
        return row

    def _speed(self, seconds: float) -> dict[str, float]:
        speed = {
            "step_seconds": seconds / self._count,
            "examples_per_second": self.rows * self._count / seconds,
            "input_wait": self._waited / seconds,
        }
        if self._flops:
            speed["model_flops_per_second"] = self._flops / seconds
            if self.peak is not None:
                speed["mfu"] = speed["model_flops_per_second"] / self.peak
        return speed

    def text(self, row: dict[str, float], validation: float) -> str:
        """A row as the progress bar shows it."""
        seen = f"  validation {validation:.4f}" if np.isfinite(validation) else ""  # none yet
        used = f"  MFU {100 * row['mfu']:.0f} %" if "mfu" in row else ""
        speed = ""
        if "step_seconds" in row:
            speed = f"  {row['step_seconds']:.2f} s/step  {row['examples_per_second']:.0f} examples/s"
        return f"loss {self.loss:.4f}{seen}{speed}{used}"


class Profile:
    """A `jax.profiler` trace of the steps from the first to the last, into `workdir`/profile.

    A life of the run that begins between them traces what is left; one that ends between them keeps what it has.
    """

    def __init__(self, steps: tuple[int, int] | None, workdir: Path) -> None:
        self._steps, self._folder, self._running = steps, workdir / "profile", False

    def at(self, done: int) -> None:
        """Begins or ends the trace, when `done` steps are done."""
        if self._steps is None:
            return
        first, last = self._steps
        if self._running and done >= last:
            self.close()
        elif not self._running and first - 1 <= done < last:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def close(self) -> None:
        """Ends the trace if one runs."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()


def memory_in_use() -> dict[str, float]:
    """Bytes in use on this process's first device, now and at most; nothing where the device does not say (CPUs)."""
    stats = jax.local_devices()[0].memory_stats() or {}
    names = {"memory_bytes": "bytes_in_use", "memory_peak_bytes": "peak_bytes_in_use"}
    return {ours: float(stats[theirs]) for ours, theirs in names.items() if theirs in stats}


def _first_start(workdir: Path) -> float:
    """When the run in this folder was first started, in seconds since 1970; process 0 notes it."""
    path = workdir / STARTED
    try:
        return float(json.loads(path.read_text())["time"])
    except (OSError, ValueError, KeyError, TypeError):
        now = time.time()
        if is_main():
            write_json(path, {"time": now})
        return now
