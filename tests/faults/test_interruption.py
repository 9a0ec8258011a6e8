"""SIGTERM and Ctrl-C: one last checkpoint, a message and an exit code."""

import dataclasses
import signal

import pytest

from tests.train.commands import (
    finish,
    lines_of,
    numbers_of,
    start,
    wait_for_step,
)
from train import evaluation, loop
from train.checkpoint import Checkpoints
from train.configs import CONFIGS
from train.errors import RunError
from train.loop import train
from train.run_folder import CHECKPOINTS
from train.setup import prepare

pytestmark = pytest.mark.faults

# Thirty steps with one evaluation, at the end.
OPTIONS = (
    *("digits", "--batch-size", 240, "--epochs", 5, "--eval-epochs", 5, "--seed", 1),
    *("--num-norm-examples", 16),
)


@pytest.fixture(scope="module")
def run(data_dir):
    return lambda workdir: start(
        *OPTIONS, "--workdir", workdir, "--data-dir", data_dir, num_devices=2
    )


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    finish(run(workdir))
    return workdir


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
    assert 5 <= done < 30
    assert message == (
        f"python -m train: interrupted after step {done} of 30, of which there is a checkpoint. "
        "Go on with the same command."
    )
    with Checkpoints(tmp_path / CHECKPOINTS) as checkpoints:
        assert checkpoints.steps() == [done]

    (output,) = finish(run(tmp_path))
    assert f"going on from step {done}" in output
    assert numbers_of(tmp_path) == numbers_of(whole)


def test_second_interrupt_ends_at_once(run, tmp_path):
    """While the first step is compiled, which takes long, Python's own handlers would wait."""
    process = run(tmp_path)
    assert "30 steps" in process.stdout.readline()

    process.send_signal(signal.SIGINT)
    assert "SIGINT" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)

    assert process.returncode == 130
    with Checkpoints(tmp_path / CHECKPOINTS) as checkpoints:
        assert checkpoints.steps() == []


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
    train(prepare(whole))
    request = Request(None)
    monkeypatch.setattr(loop, "Interruption", lambda say: request)
    eval_batches = evaluation.eval_batches

    def told_to_end(*args, **options):
        request.requested = True
        return eval_batches(*args, **options)

    monkeypatch.setattr(evaluation, "eval_batches", told_to_end)
    with pytest.raises(RunError, match="interrupted after step 3 of 6") as error:
        train(prepare(interrupted))
    assert error.value.exit_code == 143
    assert [line["step"] for line in lines_of(interrupted.workdir)] == [1, 2, 3]
    monkeypatch.undo()

    train(prepare(interrupted))

    assert numbers_of(interrupted.workdir) == numbers_of(whole.workdir)
