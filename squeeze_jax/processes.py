"""Several processes as one program: how they find each other, and arrays on devices that they
share.

Every process runs the same commands in the same order. What only process 0 does is plain writing
and printing: no step, no sampling and no save stands behind `is_main()`, since the others would
wait for it for ever. They would for one that fails alone, too: `ending_together` ends them.
"""

import atexit
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, Sharding

from squeeze_jax.array_types import Array, PyTree
from squeeze_jax.errors import InputError, OutputError, Preempted, exit_code, first_line

FAILED, LEFT = "squeeze_jax/failed", "squeeze_jax/left"
"""Folders of the coordination service: what a process ended with, and who has left."""
POLL, GRACE = 2.0, 5.0
"""Seconds between two looks at what others ended with, and seconds in which a process may end by
itself, of the same cause, before it is ended (our decision)."""

Tree = TypeVar("Tree")


def init_distributed(
    coordinator: str | None = None, count: int | None = None, index: int | None = None
) -> None:
    """Meets the other processes; call it before anything asks for a device.

    coordinator: HOST:PORT of process 0, with the number of processes and this one's own. All None:
    the environment says it, as on Cloud TPU, under Slurm or MPI. Raises InputError where the
    numbers do not fit or nobody answers.
    """
    explicit = (coordinator, count, index)
    if any(part is None for part in explicit) and any(part is not None for part in explicit):
        raise InputError(
            "--coordinator, --num-processes and --process-id belong together; give all three"
        )
    if count is not None and index is not None and not 0 <= index < count:
        raise InputError(f"--process-id {index} must be from 0 to {count - 1}")
    try:
        jax.distributed.initialize(coordinator, count, index)
    except (RuntimeError, ValueError) as error:
        how = (
            f"at {coordinator}"
            if coordinator
            else "from the environment; give --coordinator HOST:PORT and the rest"
        )
        raise InputError(f"the processes do not find each other {how} ({error})") from None


def is_main() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def broadcast_from_main(value: float) -> float:
    """Process 0's number (to float32), on every process."""
    if jax.process_count() == 1:
        return value
    return float(multihost_utils.broadcast_one_to_all(np.float32(value)))


def gather(value: int) -> list[int]:
    """Each process's number, in order, on every process."""
    if jax.process_count() == 1:
        return [value]
    return multihost_utils.process_allgather(np.int32(value)).tolist()


@contextmanager
def ending_together() -> Iterator[None]:
    """Where one of several processes fails inside the block, all end: the others, which would wait
    for it in their next common step, print what it said and exit with its code.

    A process that is killed says nothing; `jax.distributed` ends the others after its heartbeat's
    timeout.
    """
    state = distributed.global_state
    client, own, count = state.client, int(state.process_id or 0), int(state.num_processes or 1)
    if client is None or count == 1:
        yield
        return
    done = threading.Event()
    watch = (client, own, count, done)
    threading.Thread(target=_end_with_others, args=watch, daemon=True).start()
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Preempted):  # all are: they agree on the step
            if not isinstance(error, (InputError, OutputError)):
                # It may be what the end of another one does to a common step.
                _end_like_others(client, own, count)
            _tell_others(client, own, count, error)
        raise
    finally:
        done.set()


def _tell_others(client: Any, own: int, count: int, error: BaseException) -> None:
    """Notes what this process ends with, and how it leaves when that has been said here."""
    code, said = exit_code(error), f"{type(error).__name__}: {first_line(error)}"
    if isinstance(error, (InputError, OutputError)):
        said = str(error).partition("\n")[0]
    with suppress(Exception):  # the service may be gone
        client.key_value_set(f"{FAILED}/{own}", f"{code} {said}")

    def speak_and_leave() -> None:
        print(f"error: {said}", file=sys.stderr)
        _leave(client, own, count, code)

    def leave() -> None:
        late.cancel()
        _leave(client, own, count, code)

    # An orderly farewell would wait for those that end otherwise, and what is closed on the way
    # there may, too.
    late = threading.Timer(2 * (POLL + GRACE), speak_and_leave)
    late.daemon = True
    late.start()
    atexit.register(leave)


def _end_with_others(client: Any, own: int, count: int, done: threading.Event) -> None:
    """Ends this process once another one has failed."""
    while not done.wait(POLL):
        if _failed(client, own) and not done.wait(GRACE):
            _end_like_others(client, own, count)


def _failed(client: Any, own: int) -> list[tuple[str, str]]:
    """Other processes that have failed, and what with."""
    with suppress(Exception):  # the coordinator is gone: JAX ends this process itself
        noted = sorted(client.key_value_dir_get(FAILED))
        return [one for one in noted if one[0].rpartition("/")[2] != str(own)]
    return []


def _end_like_others(client: Any, own: int, count: int) -> None:
    """Ends this process with what another one has ended with, if any has."""
    for place, noted in _failed(client, own):
        code, _, said = noted.partition(" ")
        number = place.rpartition("/")[2]
        print(f"error: process {number} has ended: {said}", file=sys.stderr)
        _leave(client, own, count, int(code))


def _leave(client: Any, own: int, count: int, code: int) -> None:
    """Ends this process; process 0, which has the coordination service, goes last."""
    sys.stdout.flush()
    sys.stderr.flush()
    with suppress(Exception):
        if own:
            client.key_value_set(f"{LEFT}/{own}", "")
        end = time.monotonic() + 3 * (POLL + GRACE)
        while own == 0 and time.monotonic() < end:
            if len(client.key_value_dir_get(LEFT)) == count - 1:
                break
            time.sleep(POLL / 10)
    os._exit(code)


def local_rows(where: Sharding, rows: int) -> np.ndarray:
    """Which of a global batch's rows [rows] lie on this process's devices, in ascending order."""
    every = np.arange(rows)
    parts = where.addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([every[index] for index in parts]))


def put_global(tree: Tree, where: PyTree) -> Tree:
    """Arrays that every process has whole, laid as `where` says (one sharding, or a tree of
    them)."""
    if jax.process_count() == 1:
        return jax.device_put(tree, where)
    if isinstance(where, Sharding):
        where = jax.tree.map(lambda _: where, tree)

    def one(x: Array, to: Sharding) -> jax.Array:
        whole = np.asarray(x)
        return jax.make_array_from_callback(whole.shape, to, lambda index: whole[index])

    return jax.tree.map(one, tree, where)


def put_local_rows(tree: Tree, where: NamedSharding, rows: int) -> Tree:
    """A global batch of which every process has its `local_rows` alone."""
    if jax.process_count() == 1:
        return jax.device_put(tree, where)
    every, own = np.arange(rows), local_rows(where, rows)

    def one(x: np.ndarray) -> jax.Array:
        def read(index: PyTree) -> np.ndarray:
            return x[np.searchsorted(own, every[index[0]])]

        return jax.make_array_from_callback((rows, *x.shape[1:]), where, read)

    return jax.tree.map(one, tree)


def to_host(x: jax.Array) -> np.ndarray:
    """An array [...] that may lie on several processes' devices, whole on each of them."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
