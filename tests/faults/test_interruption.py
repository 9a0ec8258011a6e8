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
    return lambda workdir, *options, program="tests.train.small": start(
        *(*OPTIONS, *options, "--workdir", workdir, "--data-dir", data_dir),
        num_devices=2,
        program=program,
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
    process = run(tmp_path, program="train")
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

    def __init__(self):
        self.is_told = False

    def __enter__(self):
        self.is_told = False
        return self

    def __exit__(self, *error):
        pass

    def reached(self):
        return self.is_told


@pytest.fixture
def config(data_dir, tmp_path, small_network):
    """Six steps, of which three are an epoch."""
    return dataclasses.replace(
        CONFIGS["digits"],
        **{"optimizer": "sgd", "batch_size": 480, "epochs": 2.0, "seed": 3},
        **{"data_dir": data_dir, "workdir": tmp_path / "run"},
    )


@pytest.fixture
def evaluated(config, tmp_path):
    """The record of the run as it is when nothing happens."""
    whole = dataclasses.replace(config, workdir=tmp_path / "whole")
    run_here(prepare(whole))
    return numbers_of(whole.workdir)


@pytest.mark.long
def test_interrupted_evaluation_is_made_up_for(config, evaluated, monkeypatch):
    request = Request()
    eval_batches = evaluation.eval_batches

    def told_to_end(*args, **options):
        request.is_told = True
        return eval_batches(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "Interruption", lambda say: request)
        patch.setattr(evaluation, "eval_batches", told_to_end)
        for _ in range(2):  # The one that makes up for it, too.
            with pytest.raises(RunError, match="interrupted after step 3 of 6") as error:
                run_here(prepare(config))
            assert error.value.exit_code == 143
            assert [line["step"] for line in lines_of(config.workdir)] == [1, 2, 3]

    run_here(prepare(config))
    assert numbers_of(config.workdir) == evaluated


def test_last_evaluation_is_interrupted_twice(config, monkeypatch):
    config = dataclasses.replace(config, epochs=1.0)
    request = Request()
    eval_batches = evaluation.eval_batches

    def told_to_end(*args, **options):
        request.is_told = True
        return eval_batches(*args, **options)

    monkeypatch.setattr(loop, "Interruption", lambda say: request)
    monkeypatch.setattr(evaluation, "eval_batches", told_to_end)
    for _ in range(2):
        with pytest.raises(RunError, match="interrupted after step 3 of 3"):
            run_here(prepare(config))


class Unreadable:
    """Examples of which one cannot be read."""

    def __init__(self, examples, bad):
        self._examples, self._bad = examples, bad

    def __len__(self):
        return len(self._examples)

    def __getitem__(self, index):
        if index == self._bad:
            raise ValueError(f"example {index} cannot be read.")
        return self._examples[index]


@pytest.mark.parametrize(
    ("split", "steps"), [("test_examples", (3,)), ("train_examples", range(3))]
)
def test_examples_that_cannot_be_read_leave_a_checkpoint_of_all_before(config, split, steps):
    prepared = prepare(config)
    broken = Unreadable(getattr(prepared, split), bad=7)
    with pytest.raises(RunError, match=r"^example 7 cannot be read\."):
        run_here(dataclasses.replace(prepared, **{split: broken}))

    done = len(lines_of(config.workdir))
    assert done in steps
    assert checkpoints_of(config.workdir)[0] == ([done] if done else [])
