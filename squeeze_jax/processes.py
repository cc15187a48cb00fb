"""Several processes as one program: how they find each other, and arrays on devices that they
share.

Every process runs the same commands in the same order. What only process 0 does is plain writing
and printing: no step, no sampling and no save stands behind `is_main()`, since the others would
wait for it for ever.
"""

from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, Sharding

from squeeze_jax.array_types import Array, PyTree
from squeeze_jax.errors import InputError

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


def local_rows(where: Sharding, rows: int) -> np.ndarray:
    """Which of a global batch's rows [rows] lie on this process's devices, in ascending order."""
    every = np.arange(rows)
    parts = where.addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([every[index] for index in parts]))


def put_global(tree: Tree, where: PyTree) -> Tree:
    """Arrays that every process has whole, laid as `where` says (one sharding, or a tree of them)."""
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
