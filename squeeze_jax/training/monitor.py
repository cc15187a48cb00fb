"""A run's figures: smoothed loss, loss by noise level, speed, utilisation, goodput, memory."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
import numpy as np

from squeeze_jax.interop.tensors import write_json
from squeeze_jax.processes import is_main
from squeeze_jax.storage import AnyPath
from squeeze_jax.training.step import TIME_BORDERS, Metrics

STARTED = "started.json"
SLOW_INPUT = 0.2
"""Share of the time spent waiting for input from which on a run warns (our decision)."""


class Monitor:
    """Records every step's metrics and makes, now and then, a row of figures of them.

    Speed covers the steps since the last row. Left out is what runs inside `paused`: validation,
    sampling, saving, and the first step of every shape of batch, which is compiled. Goodput is the
    share of wall time since the run's first start, restarts included, that went into steps which
    still count.
    """

    def __init__(
        self, rows: int, workdir: AnyPath, productive_seconds: float, say: Callable[[str], None]
    ) -> None:
        """rows: examples a step. productive_seconds: those of the run's earlier processes."""
        self.rows = rows
        self.peak: float | None = None
        """Peak FLOP/s of all devices; None where unknown."""
        self.loss = float("nan")
        """The smoothed loss."""
        self._pending: tuple[Metrics, float] | None = None
        self._productive, self._first_start = productive_seconds, _first_start(workdir)
        self._productive_before, self._began = productive_seconds, time.perf_counter()
        self._say, self._warned = say, False
        self._values: dict[str, float] = {}
        self._by_time = np.zeros((2, len(TIME_BORDERS) - 1))
        self.restart_clock()

    def restart_clock(self) -> None:
        """Forgets the time and the steps since the last row: speed is measured from here on."""
        self._seconds: float = 0.0
        self._running_since: float | None = time.perf_counter()
        self._count, self._waited, self._flops = 0, 0.0, 0.0

    @contextmanager
    def waiting_for_input(self) -> Iterator[None]:
        """Counts the time inside as waiting for a batch."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the clock: the time inside counts neither towards speed nor as productive."""
        self._seconds, self._running_since = self._running(), None
        yield
        self._running_since = time.perf_counter()

    def _running(self) -> float:
        """Seconds since the last row, without pauses."""
        now = time.perf_counter()
        return self._seconds + (0.0 if self._running_since is None else now - self._running_since)

    @property
    def productive_seconds(self) -> float:
        """Seconds of all steps that count, in all of the run's processes."""
        return self._productive + self._running()

    def record(self, metrics: Metrics, flops: float = 0.0) -> None:
        """Records a step that has been dispatched; flops: its model FLOPs, 0 where unknown.

        What is read here are the metrics of the step before. This one's are read when the next
        step is recorded, so that the device always has work while the host waits.
        """
        self.read_pending()
        self._pending = metrics, flops

    def read_pending(self) -> None:
        """Waits for the last recorded step and reads its metrics, if that has not happened yet."""
        if self._pending is None:
            return
        (metrics, flops), self._pending = self._pending, None
        self._read(metrics)
        self._count, self._flops = self._count + 1, self._flops + flops

    def record_untimed(self, metrics: Metrics) -> None:
        """Waits for a step that ran inside `paused` and reads its metrics."""
        self._read(metrics)

    def _read(self, metrics: Metrics) -> None:
        read = jax.device_get(metrics)
        self._values = {k: float(v) for k, v in read._asdict().items() if np.ndim(v) == 0}
        loss = self._values["loss"]
        if np.isfinite(loss):
            self.loss = loss if not np.isfinite(self.loss) else 0.98 * self.loss + 0.02 * loss
            self._by_time += np.stack([read.loss_by_time, read.count_by_time])

    def make_row(self, step: int) -> dict[str, float]:
        """Makes a row of figures of the steps since the last row, which ends here.

        Warns, once, where they waited for input.
        """
        self.read_pending()
        seconds = max(self._running(), 1e-9)
        self._productive += seconds
        row = {**self._values, "loss_smoothed": self.loss}
        for low, high, total, number in zip(TIME_BORDERS, TIME_BORDERS[1:], *self._by_time):
            if number:
                row[f"loss_t_{low:g}_{high:g}"] = float(total / number)
        self._by_time[:] = 0
        # A clock that was set back does not make a run shorter than its steps.
        here = self._productive_before + time.perf_counter() - self._began
        row["goodput"] = self._productive / max(time.time() - self._first_start, here, 1e-9)
        row |= memory_in_use()
        if self._count:
            row |= self._speed(seconds)
        if row.get("input_wait", 0.0) > SLOW_INPUT and self._count > 1 and not self._warned:
            self._warned = True
            self._say(
                f"warning: {100 * row['input_wait']:.0f} % of the time up to step {step} went into "
                "waiting for input: records are read and padded too slowly; raise data.workers, or "
                "put the records on a faster disk"
            )
        self.restart_clock()
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

    def format_row(self, row: dict[str, float], validation: float) -> str:
        """A row as the progress bar shows it; validation: the last validation loss, or NaN."""
        validated = f"  validation {validation:.4f}" if np.isfinite(validation) else ""
        utilised = f"  MFU {100 * row['mfu']:.0f} %" if "mfu" in row else ""
        speed = ""
        if "step_seconds" in row:
            seconds, examples = row["step_seconds"], row["examples_per_second"]
            speed = f"  {seconds:.2f} s/step  {examples:.0f} examples/s"
        return f"loss {self.loss:.4f}{validated}{speed}{utilised}"


def memory_in_use() -> dict[str, float]:
    """Bytes in use on this process's first device, now and at most; nothing where the device does
    not say (CPUs)."""
    stats = jax.local_devices()[0].memory_stats() or {}
    names = {"memory_bytes": "bytes_in_use", "memory_peak_bytes": "peak_bytes_in_use"}
    return {ours: float(stats[theirs]) for ours, theirs in names.items() if theirs in stats}


def _first_start(workdir: AnyPath) -> float:
    """When the run in this folder was first started, in seconds since 1970; process 0 notes it."""
    path = workdir / STARTED
    try:
        return float(json.loads(path.read_text())["time"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        now = time.time()
        if is_main():
            write_json(path, {"time": now})
        return now
