"""Runs of the tiny system in processes of their own, and what they leave behind."""

import json
import socket
import time

import jax
import numpy as np
import orbax.checkpoint as ocp


def free_address():
    """HOST:PORT that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return f"localhost:{probe.getsockname()[1]}"


def ended(process, seconds=240):
    """Its exit code and what it said."""
    said, _ = process.communicate(timeout=seconds)
    return process.returncode, said


def steps(workdir):
    path = workdir / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row["step"] for row in rows if "loss" in row]


def wait_for_step(workdir, step, process, seconds=200):
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if steps(workdir)[-1:] >= [step]:
            return
        time.sleep(0.02)
    raise AssertionError(f"no step {step}: {ended(process)}")


def final_state(workdir):
    """Newest step, and every array of its checkpoint by path."""
    handlers = ocp.handlers.DefaultCheckpointHandlerRegistry([])
    handlers.add("state", ocp.args.StandardRestore, ocp.StandardCheckpointHandler())
    handlers.add("data", ocp.args.JsonRestore, ocp.JsonCheckpointHandler())
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # however many wrote it
    with ocp.CheckpointManager((workdir / "checkpoints").absolute(), handler_registry=handlers) as manager:
        step = manager.latest_step()
        like = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), manager.item_metadata(step)["state"]
        )
        items = ocp.args.Composite(state=ocp.args.StandardRestore(like), data=ocp.args.JsonRestore())
        restored = manager.restore(step, args=items)
    return step, dict(flat(restored["state"])), restored["data"]


def flat(tree, prefix=""):
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from flat(value, f"{prefix}/{key}")
    elif isinstance(tree, (list, tuple)):
        for key, value in enumerate(tree):
            yield from flat(value, f"{prefix}/{key}")
    elif tree is not None:
        yield prefix, np.asarray(tree)


def assert_same(workdir, other, **close):
    (step, a, place), (there, b, elsewhere) = final_state(workdir), final_state(other)
    assert step == there
    assert place == elsewhere
    assert a.keys() == b.keys()
    for name in a:
        if close:
            np.testing.assert_allclose(a[name], b[name], err_msg=name, **close)
        else:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)
