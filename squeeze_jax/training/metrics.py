"""A run's numbers: lines of metrics.jsonl, TensorBoard, and the progress bar."""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from squeeze_jax.errors import OutputError
from squeeze_jax.processes import is_main
from squeeze_jax.storage import AnyPath, GrowingFiles

FILE = "metrics.jsonl"
UPLOAD_EVERY = 60.0
"""Seconds after which rows in object storage are brought up to date (our decision)."""


class MetricsWriter:
    """Appends rows {"step": …, name: value} to metrics.jsonl, and the same scalars to TensorBoard.

    A resumed run first drops the rows after the step that it continues from, so that every step
    stands once. Of several processes only the first one writes. In object storage both are
    uploaded whole (`GrowingFiles`): by `upload`, at the end, and with a row that comes a minute
    after the last time.
    """

    def __init__(self, workdir: AnyPath, first_step: int, tensorboard: bool) -> None:
        self._file, self._board, self._events, self._files = None, None, None, None
        if not is_main():
            return
        self._files, self._uploaded = GrowingFiles(workdir), time.monotonic()
        self._path = self._files.fetch(FILE)
        if self._path.exists():
            rows = self._path.read_text().splitlines()
            kept = [row for row in rows if _step(row) <= first_step]
            if len(kept) < len(rows):
                self._path.write_text("".join(f"{row}\n" for row in kept))
        self._file = self._path.open("a", buffering=1)
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(
                str(self._files.folder / "tensorboard"), purge_step=first_step
            )
            self._events = _Events(self._board)

    def write(self, step: int, **values: float | int) -> None:
        """One line of figures at a step. Raises OutputError where the disk refuses."""
        try:
            if self._file is not None:
                self._file.write(json.dumps({"step": step, **values}) + "\n")
            for name, value in values.items():
                if self._board is not None:
                    self._board.add_scalar(name, value, step)
            if self._events is not None and self._events.error is not None:
                raise self._events.error
        except OSError as error:
            raise OutputError(
                f"{self._path.parent}: metrics cannot be written ({error.strerror or error}); see "
                "to the disk and start again to go on from the newest checkpoint"
            ) from error
        if self._files is not None and time.monotonic() - self._uploaded > UPLOAD_EVERY:
            self.upload()

    def upload(self) -> None:
        """Brings object storage up to date; on a disk rows are there once they are written. Raises
        OutputError where that fails."""
        if self._files is None:
            return
        if self._board is not None:
            self._board.flush()
        self._files.upload()
        self._uploaded = time.monotonic()

    def last(self, name: str, step: int) -> float:
        """What was written of `name` at `step`; NaN where nothing was, and on all processes but the
        first."""
        if self._file is None:
            return float("nan")
        rows = [json.loads(row) for row in self._path.read_text().splitlines()]
        found = (row[name] for row in reversed(rows) if row["step"] == step and name in row)
        return next(found, float("nan"))

    def close(self) -> None:
        """Writes what is left."""
        if self._file is not None:
            with suppress(OSError):  # what a refused write has left
                self._file.close()
        if self._board is not None:
            self._board.close()
        if self._files is not None:
            self._files.close()


class _Events:
    """TensorBoard's file, which keeps the first failed write. Else it would end the thread that
    writes, the queue before that would fill up, and the run stand still."""

    def __init__(self, board: Any) -> None:
        self.error: OSError | None = None
        writer = board.file_writer.event_writer
        self._file = writer._ev_writer
        writer._ev_writer = writer._worker._record_writer = self

    def write_event(self, event: Any) -> None:
        self._keep(lambda: self._file.write_event(event))

    def flush(self) -> None:
        self._keep(self._file.flush)

    def close(self) -> None:
        self._keep(self._file.close)

    def _keep(self, write: Callable[[], object]) -> None:
        try:
            write()
        except OSError as error:
            self.error = self.error or error


def _step(row: str) -> int:
    try:
        return int(json.loads(row)["step"])
    except (ValueError, KeyError):
        return 1 << 62  # a line cut short by a kill


def progress_bar() -> Progress:
    """What training shows: steps, time left, and a free text of figures; of several processes the
    first one does."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
        refresh_per_second=2,
        disable=not is_main(),
    )
