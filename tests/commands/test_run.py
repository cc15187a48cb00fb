"""What all commands share: the compilation cache, exit codes."""

import os
import subprocess
import sys

import pytest

from squeeze_jax.commands.run import guarded
from squeeze_jax.errors import InputError, OutputError, Preempted

PROGRAM = """
from squeeze_jax.commands.run import setup
setup()
import jax
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # this program is small
print(jax.jit(lambda x: (x @ x).sum() + 1)(jax.numpy.ones((300, 300))))
"""


def test_a_second_process_finds_the_first_ones_programs_and_a_changed_flag_does_not(tmp_path):
    """The cache is set before the first array, and keyed by what decides a program."""

    def programs(**flags):
        environment = os.environ | {"SQUEEZE_JAX_CACHE": str(tmp_path), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""} | flags
        subprocess.run([sys.executable, "-c", PROGRAM], env=environment, check=True, capture_output=True)
        return {path.name for path in tmp_path.iterdir() if path.name.endswith("-cache")}

    first = programs()
    assert first
    assert programs() == first
    assert programs(XLA_FLAGS="--xla_backend_optimization_level=0") > first


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (None, 0, ""),
        (InputError("no folder x"), 2, "error: no folder x\n"),
        (OutputError("disk full"), 1, "error: disk full\n"),
        (Preempted("stopped after step 3"), 143, "stopped after step 3\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_what_a_user_can_mend_is_one_sentence(raised, code, said, capsys):
    def run():
        if raised is not None:
            raise raised

    assert guarded(run) == code
    assert capsys.readouterr().err == said
