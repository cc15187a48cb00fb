"""SIGTERM, with which clouds announce that they take a machine back.

It is looked at between two steps, and on all processes alike.
"""

import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Interruption:
    """Within its `with` block SIGTERM does not end the process; `requested` tells that it came."""

    def __init__(self) -> None:
        self._received = False
        self._previous: object = None

    def __enter__(self) -> "Interruption":
        # Several processes: the runtime of `jax.distributed` has a handler of its own, which tells
        # the others.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)  # pyright: ignore[reportArgumentType]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True

    def requested(self, step: int) -> bool:
        """Whether to save and end now. Call it after every step: processes agree on one that none
        has passed."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._received
