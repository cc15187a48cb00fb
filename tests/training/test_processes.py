"""Real processes over loopback: together they are one run, killed or not."""

import shutil
import signal
import time

import pytest
from training_runs import assert_same, ended, final_state, free_address, steps, wait_for_step

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Orbax, about restoring without shardings


def together(start, workdir, count, **settings):
    """All processes of one run."""
    address = free_address()
    return [start(workdir, address=address, count=count, index=i, **settings) for i in range(count)]


def finished(processes):
    """What each of them said, once all have ended well."""
    ends = [ended(process) for process in processes]
    assert [code for code, _ in ends] == [0] * len(ends), "\n".join(said for _, said in ends)
    return [said for _, said in ends]


@pytest.fixture(scope="module")
def two(start, tmp_path_factory):
    """A run of two processes that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("two")
    return workdir, finished(together(start, workdir, 2, batch_per_chip=2))


@pytest.mark.telling
@pytest.mark.slow
def test_two_processes_are_the_run_that_one_process_is(two, start, tmp_path):
    workdir, said = two
    finished([start(tmp_path, batch_per_chip=4)])
    assert_same(tmp_path, workdir, rtol=1e-4, atol=1e-5)
    assert "4 examples a step on 2 devices" in said[0]
    assert "validation" not in said[1]
    assert steps(workdir) == list(range(1, 9))


@pytest.mark.telling
@pytest.mark.slow
def test_a_checkpoint_damaged_for_one_of_two_is_set_aside_by_both(two, start, tmp_path):
    """Process 1's own part of the arrays: process 0 reads all that it wants."""
    workdir = tmp_path / "run"
    shutil.copytree(two[0], workdir)
    parts = [
        path
        for path in (workdir / "checkpoints" / "8" / "state" / "ocdbt.process_1").rglob("*")
        if path.is_file()
    ]
    assert parts
    for path in parts:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    said = finished(together(start, workdir, 2, batch_per_chip=2))
    assert "warning: the checkpoint of step 8 cannot be read (" in said[0]
    assert f"continuing {workdir} from step 6" in said[0]
    assert (workdir / "damaged" / "8").is_dir()
    assert_same(two[0], workdir)


@pytest.mark.telling
@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_where_one_of_two_fails_both_end_and_say_why(start, tmp_path, index):
    """The other waits for it in the step: without a word it would wait for ever."""
    processes = together(start, tmp_path, 2, batch_per_chip=2, fail=[index, 5])
    ends = [ended(process) for process in processes]
    assert [code for code, _ in ends] == [2, 2], ends
    sentence = "shard 7: record 3 cannot be read"
    assert f"error: {sentence}\n" in ends[index][1]
    assert f"error: process {index} has ended: {sentence}\n" in ends[1 - index][1]
    said = finished(together(start, tmp_path, 2, batch_per_chip=2))
    assert "from step 4" in said[0]


@pytest.mark.slow
def test_one_of_two_stands_still_for_a_while(two, start, tmp_path):
    processes = together(start, tmp_path, 2, batch_per_chip=2, slow=0.1)
    wait_for_step(tmp_path, 3, processes[0])
    processes[1].send_signal(signal.SIGSTOP)
    time.sleep(12)
    processes[1].send_signal(signal.SIGCONT)
    finished(processes)
    assert_same(two[0], tmp_path)


@pytest.mark.telling
@pytest.mark.slow
def test_one_of_two_is_killed_and_the_restarted_run_gives_the_same_bits(two, start, tmp_path):
    processes = together(start, tmp_path, 2, batch_per_chip=2, slow=0.3)
    wait_for_step(tmp_path, 5, processes[0])
    processes[1].send_signal(signal.SIGKILL)
    processes[1].communicate()
    processes[0].kill()  # as the scheduler does when a member of the job has failed
    processes[0].communicate()
    said = finished(together(start, tmp_path, 2, batch_per_chip=2))
    assert f"continuing {tmp_path} from step" in said[0]
    assert_same(two[0], tmp_path)


@pytest.mark.slow
def test_four_processes_are_that_run_too_and_one_goes_on_where_two_stopped(two, start, tmp_path):
    four, one = tmp_path / "four", tmp_path / "one"
    finished(together(start, four, 4))
    assert_same(two[0], four, rtol=1e-4, atol=1e-5)
    shutil.copytree(two[0], one)
    shutil.rmtree(one / "checkpoints" / "8")
    said = finished([start(one, batch_per_chip=4)])
    assert f"continuing {one} from step 6" in said[0]
    assert_same(two[0], one, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_sigterm_to_one_process_saves_the_run_of_both(two, start, tmp_path):
    processes = together(start, tmp_path, 2, batch_per_chip=2, slow=0.3, every=100)
    wait_for_step(tmp_path, 3, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    ends = [ended(process) for process in processes]
    assert [code for code, _ in ends] == [143, 143], ends
    assert final_state(tmp_path)[0] == steps(tmp_path)[-1]
    finished(together(start, tmp_path, 2, batch_per_chip=2, every=100))
    assert_same(two[0], tmp_path)
