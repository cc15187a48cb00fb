"""Runs in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_encoders import FakeEncoders, some_examples

from squeeze_jax.data.record_writer import extract

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    out = tmp_path_factory.mktemp("features")
    for split, count in (("train", 12), ("held_out", 4)):
        extract(some_examples(count), FakeEncoders(), out / split, target_size=(32, 32), reference_long_side=32)
    return out


@pytest.fixture(scope="module")
def start(records, tmp_path_factory):
    """Starts a run: (workdir, settings) to its process, whose output is one stream of text."""
    cache = tmp_path_factory.mktemp("programs")
    names = os.environ | {"SQUEEZE_JAX_CACHE": str(cache), "PYTHONPATH": str(HERE.parents[1])}

    def begin(workdir, **settings):
        program = [sys.executable, str(HERE / "tiny_run.py"), workdir, records, json.dumps(settings)]
        return subprocess.Popen(
            [str(part) for part in program], env=names, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    return begin
