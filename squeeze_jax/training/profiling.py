"""A `jax.profiler` trace of chosen steps."""

from pathlib import Path

import jax


class Profiler:
    """Traces the steps from the first to the last, into `workdir`/profile.

    A process that starts between them traces what is left; one that ends between them keeps what it
    has.
    """

    def __init__(self, steps: tuple[int, int] | None, workdir: Path) -> None:
        """steps: the first and the last step to trace; None traces nothing."""
        self._steps, self._folder, self._running = steps, workdir / "profile", False

    def update(self, steps_done: int) -> None:
        """Begins or ends the trace, as is due between two steps."""
        if self._steps is None:
            return
        first, last = self._steps
        if self._running and steps_done >= last:
            self.close()
        elif not self._running and first - 1 <= steps_done < last:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def close(self) -> None:
        """Ends the trace if one runs."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
