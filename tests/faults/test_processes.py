"""One of two processes is killed, is told to end, or never comes."""

import re
import signal

import pytest

from tests.train.commands import (
    finish,
    free_port,
    lines_of,
    numbers_of,
    start,
    start_two,
    wait_for_step,
)
from train.checkpoint import Checkpoints
from train.run_folder import CHECKPOINTS

pytestmark = pytest.mark.faults

OPTIONS = (
    *("digits", "--batch-size", 240, "--epochs", 4, "--eval-epochs", 4, "--seed", 1),
    *("--num-norm-examples", 16, "--checkpoint-steps", 3),
)


@pytest.fixture(scope="module")
def run(data_dir):
    def start_both(workdir):
        options = (*OPTIONS, "--workdir", workdir, "--data-dir", data_dir)
        return start_two(options, options)

    return start_both


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    finish(*run(workdir))
    return workdir


def checkpoints_of(workdir):
    with Checkpoints(workdir / CHECKPOINTS) as checkpoints:
        return checkpoints.steps()


@pytest.mark.long
@pytest.mark.parametrize("victim", [0, 1])
def test_other_process_ends_with_a_message_and_both_go_on(victim, run, whole, tmp_path):
    processes = run(tmp_path)
    # The checkpoint of step 3 is whole before that of step 6 is begun.
    wait_for_step(7, tmp_path, *processes)
    processes[victim].kill()
    # JAX's own time-out for a process that gives no sign is 100 seconds.
    _, errors = processes[1 - victim].communicate(timeout=200)

    assert processes[1 - victim].returncode not in (0, None)
    # Ours, or that of JAX, which ends a process whose coordinator has gone.
    assert re.search(r"cannot go on without the other processes|another task died", errors)
    processes[victim].communicate()

    first, _ = finish(*run(tmp_path))

    assert re.search(r"going on from step [3-9]", first)
    assert numbers_of(tmp_path) == numbers_of(whole)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_signal_to_one_ends_both_with_a_checkpoint(number, run, whole, tmp_path):
    processes = run(tmp_path)
    wait_for_step(5, tmp_path, *processes)
    processes[1].send_signal(number)
    outputs = [process.communicate(timeout=120) for process in processes]

    codes = [process.returncode for process in processes]
    assert codes == [143, 143 if number == signal.SIGTERM else 130], outputs
    done = lines_of(tmp_path)[-1]["step"]
    assert f"interrupted after step {done} of 24" in outputs[0][1]
    assert checkpoints_of(tmp_path)[-1] == done

    first, _ = finish(*run(tmp_path))

    assert f"going on from step {done}" in first
    assert numbers_of(tmp_path) == numbers_of(whole)


def test_process_that_does_not_come_is_named(data_dir, tmp_path):
    process = start(
        *(*OPTIONS, "--workdir", tmp_path / "run", "--data-dir", data_dir, "--join-seconds", 3),
        *("--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", 2, "--process-id", 0),
        num_devices=2,
    )
    _, errors = process.communicate(timeout=100)

    assert process.returncode == 2
    assert re.fullmatch(
        r"python -m train: --join-seconds is 3, and in that time process 1 did not come, or not "
        r"all of them, to --coordinator 127.0.0.1:\d+: start what is missing.*\n",
        errors,
    )
    assert not (tmp_path / "run").exists()
