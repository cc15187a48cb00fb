"""A `jax.profiler` trace of chosen steps."""

import jax

from squeeze_jax.storage import AnyPath, GrowingFiles


class Profiler:
    """Traces the steps from the first to the last, into `workdir`/profile.

    A process that starts between them traces what is left; one that ends between them keeps what it
    has.
    """

    def __init__(self, steps: tuple[int, int] | None, workdir: AnyPath) -> None:
        """steps: the first and the last step to trace; None traces nothing."""
        self._steps, self._running = steps, False
        self._files = None if steps is None else GrowingFiles(workdir)

    def update(self, steps_done: int) -> None:
        """Begins or ends the trace, as is due between two steps."""
        if self._steps is None or self._files is None:
            return
        first, last = self._steps
        if self._running and steps_done >= last:
            self._stop()
        elif not self._running and first - 1 <= steps_done < last:
            jax.profiler.start_trace(str(self._files.folder / "profile"))
            self._running = True

    def close(self) -> None:
        """Ends the trace if one runs."""
        self._stop()
        if self._files is not None:
            self._files.close()

    def _stop(self) -> None:
        if self._running and self._files is not None:
            self._running = False
            jax.profiler.stop_trace()
            self._files.upload()
