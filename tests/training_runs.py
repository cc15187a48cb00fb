"""Runs of the tiny system in processes of their own, and what they leave behind."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from fake_encoders import FakeEncoders, some_examples

from squeeze_jax.data.extract import extract

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    out = tmp_path_factory.mktemp("features")
    for split, count in (("train", 12), ("held_out", 4)):
        extract(some_examples(count), FakeEncoders(), out / split, target_size=(32, 32), reference_long_side=32)
    return out


@pytest.fixture(scope="module")
def start(features, tmp_path_factory):
    """Starts a run: (workdir, settings) to its process, whose output is one stream of text."""
    cache = tmp_path_factory.mktemp("programs")
    names = os.environ | {"SQUEEZE_JAX_CACHE": str(cache), "PYTHONPATH": str(HERE.parent)}

    def begin(workdir, **settings):
        program = [sys.executable, str(HERE / "training" / "tiny_run.py"), workdir, features, json.dumps(settings)]
        return subprocess.Popen(
            [str(part) for part in program], env=names, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    return begin


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
