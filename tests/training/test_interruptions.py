"""Runs in processes of their own: pre-empted, on a full disk, with a damaged checkpoint, on other devices."""

import json
import shutil
import signal
import time

import pytest
from training_runs import assert_same, ended, final_state, steps, wait_for_step

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Orbax, about restoring without shardings


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """A run of eight steps that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("whole")
    code, said = ended(start(workdir))
    assert code == 0, said
    return workdir


@pytest.mark.telling
@pytest.mark.slow
def test_sigterm_saves_and_the_next_start_goes_on_with_the_same_bits(whole, start, tmp_path):
    process = start(tmp_path, slow=0.3, every=100)
    wait_for_step(tmp_path, 3, process)
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    code, said = ended(process)
    assert time.monotonic() - asked < 30
    assert code == 143, said
    done = steps(tmp_path)[-1]
    assert f"stopped by SIGTERM after step {done}, which is saved" in said
    assert [int(path.name) for path in (tmp_path / "checkpoints").iterdir()] == [done]
    code, said = ended(start(tmp_path, every=100))
    assert code == 0, said
    assert f"continuing {tmp_path} from step {done}" in said
    assert_same(whole, tmp_path)
    assert steps(tmp_path) == list(range(1, 9))


@pytest.mark.slow
def test_a_run_stands_still_for_a_while_and_goes_on_with_the_same_bits(whole, start, tmp_path):
    process = start(tmp_path, slow=0.2)
    wait_for_step(tmp_path, 3, process)
    process.send_signal(signal.SIGSTOP)
    time.sleep(5)
    process.send_signal(signal.SIGCONT)
    code, said = ended(process)
    assert code == 0, said
    assert_same(whole, tmp_path)


@pytest.mark.telling
@pytest.mark.slow
def test_a_clock_set_back_again_and_again_changes_nothing(whole, start, tmp_path):
    """By an hour at every look: no order, no duration and no share of time goes by it."""
    code, said = ended(start(tmp_path, back=3600, limit=(6, 4096)))  # its disk is full after step 4
    assert code == 1, said
    code, said = ended(start(tmp_path, back=3600))
    assert code == 0, said
    assert f"continuing {tmp_path} from step 4" in said
    assert_same(whole, tmp_path)
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        times = {"goodput", "step_seconds", "examples_per_second", "input_wait"}
        assert all(row[name] >= 0 for name in times & row.keys()), row
        assert row.get("goodput", 0) <= 1, row


@pytest.mark.telling
@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_leaves_the_checkpoint_before(start, tmp_path):
    code, said = ended(start(tmp_path, limit=(6, 4096)))
    assert code == 1, said
    assert "could not be written" in said
    assert "the newest whole one is step 4" in said
    assert any(line.startswith("error: ") and "File too large" in line for line in said.splitlines())
    assert final_state(tmp_path)[0] == 4
    code, said = ended(start(tmp_path))
    assert code == 0, said
    assert f"continuing {tmp_path} from step 4" in said
    assert final_state(tmp_path)[0] == 8


@pytest.mark.telling
@pytest.mark.slow
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(whole, start, tmp_path):
    workdir = tmp_path / "damaged"
    shutil.copytree(whole, workdir)
    for path in (workdir / "checkpoints" / "8").rglob("*"):
        if path.is_file() and "state" in path.parts:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    code, said = ended(start(workdir))
    assert code == 0, said
    assert "warning: the checkpoint of step 8 cannot be read" in said
    assert f"it now lies in {workdir / 'damaged' / '8'}" in said
    assert f"continuing {workdir} from step 6" in said
    assert_same(whole, workdir)
    assert (workdir / "damaged" / "8").is_dir()
    for path in (workdir / "checkpoints").rglob("*"):
        if path.is_file() and "state" in path.parts:
            path.write_bytes(b"")
    code, said = ended(start(workdir))
    assert code == 2, said
    assert "not one checkpoint can be read" in said, "never from the beginning unasked"


@pytest.mark.slow
def test_another_number_of_devices_continues_the_same_run(whole, start, tmp_path):
    """Two devices with a row each go on where one with two rows stopped."""
    code, said = ended(start(tmp_path, steps=8, batch_per_chip=2))
    assert code == 0, said
    two = tmp_path / "two"
    shutil.copytree(tmp_path, two, ignore=lambda *_: ["two"])
    shutil.rmtree(two / "checkpoints" / "8")
    code, said = ended(start(two, steps=8, devices=2, mesh=(1, 2, 1)))
    assert code == 0, said
    assert f"continuing {two} from step 6" in said
    assert_same(tmp_path, two, rtol=1e-4, atol=1e-5)
