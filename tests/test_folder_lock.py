"""One run a folder: a second is refused by name, a dead one's lock blocks nobody."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from squeeze_jax import folder_lock
from squeeze_jax.errors import InputError
from squeeze_jax.folder_lock import hold, hold_for_run

HOLDER = """
import sys, time
from pathlib import Path
from squeeze_jax.folder_lock import hold
with hold(Path(sys.argv[1]), "a run"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds `tmp_path`/run.lock until its standard input ends."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run.lock")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_is_refused_and_names_the_first(tmp_path, other):
    about = json.loads((tmp_path / "run.lock").read_text())
    assert about["process"] == other.pid
    words = rf"a run is at work in it already \(process {other.pid} on {about['host']}, since 20"
    with pytest.raises(InputError, match=words), hold(tmp_path / "run.lock", "a run"):
        pass
    with hold(tmp_path / "another.lock", "a run"):
        pass
    other.communicate("")  # it ends, and its lock is gone
    assert not (tmp_path / "run.lock").exists()
    with hold(tmp_path / "run.lock", "a run"):
        pass


def test_a_dead_ones_lock_blocks_nobody(tmp_path, other):
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert (tmp_path / "run.lock").exists(), "nobody was there to remove it"
    with hold(tmp_path / "run.lock", "a run"):
        assert json.loads((tmp_path / "run.lock").read_text())["process"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_a_process_does_not_hold_one_folder_twice(tmp_path):
    lock = tmp_path / "run.lock"
    with hold(lock, "a run"):
        with pytest.raises(InputError, match="this very process"), hold(lock, "a run"):
            pass
        command = [sys.executable, "-c", HOLDER, str(lock)]  # the refusal dropped nothing
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert f"process {os.getpid()} on" in ran.stderr


def test_a_folder_that_takes_no_lock_is_one_sentence_on_all_processes(tmp_path, monkeypatch):
    """The others wait for what process 0 says."""
    (tmp_path / "file").touch()
    place, said = tmp_path / "file" / "run.lock", []

    def broadcast(value):
        said.append(value)
        return value

    monkeypatch.setattr(folder_lock, "broadcast_from_main", broadcast)
    with pytest.raises(InputError, match="cannot be made or opened"), hold_for_run(place, "a run"):
        pass
    assert said == [1.0]

    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(folder_lock, "hold", fail)
    with pytest.raises(MemoryError), hold_for_run(tmp_path / "run.lock", "a run"):
        pass
    assert said == [1.0, 1.0]


def test_one_that_is_removed_while_it_is_looked_at_is_made_again(tmp_path, monkeypatch):
    lock, fstat = tmp_path / "run.lock", os.fstat

    def remove_first(file):
        monkeypatch.setattr(os, "fstat", fstat)
        lock.unlink()
        return fstat(file)

    monkeypatch.setattr(os, "fstat", remove_first)
    with hold(lock, "a run"):
        assert json.loads(lock.read_text())["process"] == os.getpid()


def test_an_error_releases_it(tmp_path):
    with pytest.raises(ZeroDivisionError), hold(tmp_path / "run.lock", "a run"):
        raise ZeroDivisionError
    with hold(tmp_path / "run.lock", "a run"):
        pass
