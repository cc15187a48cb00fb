"""A small run and its export, made once for all tests of exported folders."""

import json
import os

import pytest
from exports import exporting
from small_run import write_home


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """base, vae, mllm as published folders, and a weights folder `run`."""
    home = tmp_path_factory.mktemp("home")
    os.environ["SQUEEZE_JAX_CACHE"] = os.environ["SQUEEZE_TEST_CACHE"]
    write_home(home)
    scores = {"pairs": 512, "scores": {"staged": {"tasks": {"subject": {"value": 0.875}, "scene": {"value": 0.5}}}}}
    (home / "run" / "scores.json").write_text(json.dumps(scores))
    return home


@pytest.fixture(scope="session")
def exported(home):
    return exporting(home / "run", home / "exported", "--merge")
