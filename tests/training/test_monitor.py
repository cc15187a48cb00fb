"""What a run shows of itself, against a clock that the test turns."""

import errno
import json
import time

import numpy as np
import pytest

from squeeze_jax.errors import OutputError
from squeeze_jax.training import monitor as module
from squeeze_jax.training import profiling
from squeeze_jax.training.metrics import MetricsWriter
from squeeze_jax.training.monitor import Monitor
from squeeze_jax.training.profiling import Profiler
from squeeze_jax.training.step import TIME_BORDERS, Metrics


class Clock:
    """Stands in for `time`."""

    def __init__(self):
        self.now = 1000.0

        self.wrong = 0.0
        """How far the clock on the wall is off."""

    def perf_counter(self):
        return self.now

    def time(self):
        return self.now + self.wrong


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def metrics(loss=1.0, sums=(0, 0, 0, 0), counts=(0, 0, 0, 0)):
    values = dict.fromkeys(Metrics._fields, np.float32(0.5)) | {"loss": np.float32(loss)}
    values |= {
        "loss_by_time": np.array(sums, np.float32),
        "count_by_time": np.array(counts, np.float32),
    }
    return Metrics(**values)


def test_speed_leaves_pauses_and_compilation_out_and_goodput_does_not(clock, tmp_path):
    said = []
    monitor = Monitor(8, tmp_path, 0.0, said.append)
    monitor.peak = 1000.0
    clock.now += 50  # the first step, compiled
    monitor.restart_clock()
    for flops in (400.0, 800.0):
        for _ in range(2):
            clock.now += 2
            monitor.record(metrics(), flops)
        with monitor.paused():
            clock.now += 20  # another shape's first step, compiled
            monitor.record_untimed(metrics())
    with monitor.paused():
        clock.now += 52
        assert monitor.productive_seconds == 8
    row = monitor.make_row(5)
    assert row["step_seconds"] == 2
    assert row["examples_per_second"] == 4
    assert row["model_flops_per_second"] == 300
    assert row["mfu"] == pytest.approx(0.3)
    assert row["goodput"] == pytest.approx(8 / 150)
    assert row["input_wait"] == 0
    assert not said
    assert "MFU 30 %" in monitor.format_row(row, 1.0)


def test_a_steps_metrics_are_read_when_the_next_is_under_way(monkeypatch, clock, tmp_path):
    read = []
    monkeypatch.setattr(module.jax, "device_get", lambda given: (read.append(given), given)[1])
    monitor, steps = Monitor(8, tmp_path, 0.0, print), [metrics(float(i)) for i in range(3)]
    for i, step in enumerate(steps):
        monitor.record(step)
        assert [given is one for given, one in zip(read, steps, strict=False)] == [True] * i
    assert monitor.make_row(3)["loss"] == 2.0
    assert len(read) == 3


def test_goodput_counts_from_the_first_start_over_restarts(clock, tmp_path):
    Monitor(8, tmp_path, 0.0, print)
    clock.now += 100
    again = Monitor(8, tmp_path, 30.0, print)  # thirty seconds are in the checkpoint
    clock.now += 20
    again.record(metrics())
    assert again.make_row(1)["goodput"] == pytest.approx(50 / 120)
    (tmp_path / module.STARTED).write_text("{")  # cut short: begins anew, never fails
    assert json.loads(
        (Monitor(8, tmp_path, 0.0, print), tmp_path / module.STARTED)[1].read_text()
    ) == {"time": clock.now}


def test_a_clock_set_back_makes_no_run_shorter_than_its_steps(clock, tmp_path):
    Monitor(8, tmp_path, 0.0, print)
    monitor = Monitor(8, tmp_path, 30.0, print)
    clock.wrong = -86_400.0
    clock.now += 20
    monitor.record(metrics())
    row = monitor.make_row(1)
    assert row["goodput"] == 1.0
    assert row["step_seconds"] == 20


def test_a_refused_write_of_metrics_ends_the_run_and_stops_no_thread(tmp_path):
    """TensorBoard's thread would end, and the queue before it fill up after ten values."""
    pytest.importorskip("tensorboardX")
    writer = MetricsWriter(tmp_path, 0, tensorboard=True)
    worker, whole = writer._board.file_writer.event_writer._worker, writer._events._file

    class Full:
        def write_event(self, event):
            raise OSError(errno.ENOSPC, "No space left on device")

        def flush(self):
            whole.flush()

        def close(self):
            whole.close()

    writer._events._file = Full()

    def write_until_refused():
        for step in range(1000):
            writer.write(step, loss=1.0)
            time.sleep(0.01)

    with pytest.raises(OutputError, match=r"metrics cannot be written \(No space left"):
        write_until_refused()
    assert worker.is_alive()
    writer.close()
    assert not worker.is_alive()


def test_waiting_for_input_is_measured_and_warned_of_once(clock, tmp_path):
    said = []
    monitor = Monitor(8, tmp_path, 0.0, said.append)
    for _ in range(2):
        for _ in range(3):
            with monitor.waiting_for_input():
                clock.now += 1
            clock.now += 1
            monitor.record(metrics())
        assert monitor.make_row(3)["input_wait"] == pytest.approx(0.5)
    assert len(said) == 1
    assert said[0].startswith("warning: 50 % of the time")
    assert "data.workers" in said[0]


def test_loss_is_told_apart_by_noise_level_and_non_finite_ones_are_left_out(clock, tmp_path):
    monitor = Monitor(8, tmp_path, 0.0, print)
    monitor.record(metrics(2.0, (4, 0, 0, 3), (2, 0, 0, 1)))
    monitor.record(metrics(1.0, (0, 0, 0, 1), (0, 0, 0, 1)))
    monitor.record(metrics(np.nan, (np.nan, 0, 0, 0), (1, 0, 0, 0)))
    clock.now += 1
    row = monitor.make_row(3)
    assert row["loss_smoothed"] == pytest.approx(0.98 * 2 + 0.02)
    assert {name: value for name, value in row.items() if name.startswith("loss_t")} == {
        "loss_t_0_0.25": 2.0,
        "loss_t_0.75_1": 2.0,
    }
    assert len(TIME_BORDERS) == 5
    assert not [name for name in monitor.make_row(4) if name.startswith("loss_t")]


def test_a_trace_covers_what_a_life_sees_of_its_steps(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(profiling.jax.profiler, "start_trace", lambda folder: calls.append("start"))
    monkeypatch.setattr(profiling.jax.profiler, "stop_trace", lambda: calls.append("stop"))
    for begun, ended, wanted in [
        (0, 9, ["start 4", "stop 7"]),
        (5, 9, ["start 5", "stop 7"]),  # resumed between them
        (0, 5, ["start 4", "stop 5"]),  # stopped between them
        (7, 9, []),  # resumed when the last is done
        (0, 3, []),
    ]:
        profiler, seen = Profiler((5, 7), tmp_path), []
        for done in range(begun, ended + 1):
            profiler.update(done)
            seen += [f"{call} {done}" for call in calls]
            calls.clear()
        profiler.close()
        seen += [f"{call} {ended}" for call in calls]
        calls.clear()
        assert seen == wanted, (begun, ended)
    Profiler(None, tmp_path).update(5)
    assert not calls
