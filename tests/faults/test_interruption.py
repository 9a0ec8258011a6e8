"""SIGTERM and Ctrl-C leave a checkpoint, a message and an exit code; kills leave no trace."""

import dataclasses
import random
import signal
import time

import jax
import numpy as np
import pytest

from tests.train.commands import finish, lines_of, numbers_of, run_here, start, wait_for_step
from train import evaluation, loop
from train.checkpoint import Checkpoints
from train.configs import CONFIGS
from train.errors import RunError
from train.run_folder import CHECKPOINTS
from train.setup import prepare

pytestmark = pytest.mark.faults

# Twenty steps, with all that a run keeps: averaged weights, sums over pieces, group norms.
OPTIONS = (
    *("digits", "--batch-size", 288, "--epochs", 4, "--eval-epochs", 1),
    *("--transfer-size", 96, "--ema-decay", 0.9, "--seed", 2),
    *("--optimizer", "lena", "--learning-rate", 0.3, "--group-size", 4),
)
# With a checkpoint after nearly every step, many kills meet one that is being written.
CHECKPOINTS_OFTEN = ("--checkpoint-steps", 2)


@pytest.fixture(scope="module")
def run(data_dir):
    return lambda workdir, *options: start(
        *OPTIONS, *options, "--workdir", workdir, "--data-dir", data_dir, num_devices=2
    )


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    finish(run(workdir))
    return workdir


def checkpoints_of(workdir):
    """The steps of which there are checkpoints, and the state in the last of them."""
    with Checkpoints(workdir / CHECKPOINTS) as checkpoints:
        steps = checkpoints.steps()
        return steps, checkpoints.arrays(steps[-1]) if steps else None


def test_kills_leave_no_trace(run, whole, tmp_path, full):
    moments, num_kills = random.Random(0), 20 if full else 2

    for index in range(1, num_kills + 1):
        process = run(tmp_path, *CHECKPOINTS_OFTEN)
        wait_for_step(18 * index // num_kills, tmp_path, process)
        time.sleep(moments.uniform(0, 0.3))
        process.kill()
        process.communicate()
    # As a kill in the middle of a line leaves it.
    with (tmp_path / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 9')
    finish(run(tmp_path, *CHECKPOINTS_OFTEN))

    assert numbers_of(tmp_path) == numbers_of(whole)
    (steps, state), (expected_steps, expected) = checkpoints_of(tmp_path), checkpoints_of(whole)
    assert steps[-1] == expected_steps[-1] == 20
    jax.tree.map(np.testing.assert_array_equal, state, expected)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        pytest.param(signal.SIGTERM, 143, id="SIGTERM"),
        pytest.param(signal.SIGINT, 130, id="SIGINT", marks=pytest.mark.long),
    ],
)
def test_signal_leaves_a_checkpoint_of_all_that_was_done(number, code, run, whole, tmp_path):
    process = run(tmp_path)
    wait_for_step(5, tmp_path, process)
    process.send_signal(number)
    output, errors = process.communicate(timeout=300)

    assert process.returncode == code
    assert f"{number.name}: the run ends after this step, with a checkpoint." in output
    (message,) = errors.splitlines()
    done = lines_of(tmp_path)[-1]["step"]
    assert 5 <= done < 20
    assert message == (
        f"python -m train: interrupted after step {done} of 20, of which there is a checkpoint. "
        "Go on with the same command."
    )
    *evaluated, last = checkpoints_of(tmp_path)[0]
    assert last == done
    assert all(step % 5 == 0 for step in evaluated)  # An epoch has five steps.

    (output,) = finish(run(tmp_path))
    assert f"going on from step {done}" in output
    assert numbers_of(tmp_path) == numbers_of(whole)


def test_second_interrupt_ends_at_once(run, tmp_path):
    """While the first step is compiled, which takes long, Python's own handlers would wait."""
    process = run(tmp_path)
    assert "20 steps" in process.stdout.readline()

    process.send_signal(signal.SIGINT)
    assert "SIGINT" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)

    assert process.returncode == 130
    assert checkpoints_of(tmp_path)[0] == []


class Request:
    """Takes the place of the signals: the run is told to end while it evaluates."""

    exit_code = 143

    def __init__(self, say):
        self.requested = False

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def reached(self, step):
        return self.requested


@pytest.mark.long
def test_interrupted_evaluation_is_made_up_for(data_dir, tmp_path, monkeypatch):
    config = dataclasses.replace(
        CONFIGS["digits"],
        **{"batch_size": 480, "epochs": 2.0, "group_size": 60, "data_dir": data_dir},
    )
    whole, interrupted = (
        dataclasses.replace(config, workdir=tmp_path / name) for name in ("whole", "interrupted")
    )
    run_here(prepare(whole))
    request = Request(None)
    monkeypatch.setattr(loop, "Interruption", lambda say: request)
    eval_batches = evaluation.eval_batches

    def told_to_end(*args, **options):
        request.requested = True
        return eval_batches(*args, **options)

    monkeypatch.setattr(evaluation, "eval_batches", told_to_end)
    with pytest.raises(RunError, match="interrupted after step 3 of 6") as error:
        run_here(prepare(interrupted))
    assert error.value.exit_code == 143
    assert [line["step"] for line in lines_of(interrupted.workdir)] == [1, 2, 3]
    monkeypatch.undo()

    run_here(prepare(interrupted))

    assert numbers_of(interrupted.workdir) == numbers_of(whole.workdir)
