"""A run that is killed again and again ends with the numbers of one that never was."""

import random
import time

import jax
import numpy as np
import pytest

from tests.train.commands import finish, numbers_of, start, wait_for_step
from train.checkpoint import Checkpoints
from train.run_folder import CHECKPOINTS

pytestmark = pytest.mark.faults

# Twenty steps, with a checkpoint after nearly every one of them, so that many kills meet one that
# is being written.
OPTIONS = (
    *("digits", "--batch-size", 288, "--epochs", 4, "--eval-epochs", 1, "--checkpoint-steps", 2),
    *("--transfer-size", 96, "--ema-decay", 0.9, "--seed", 2),
    *("--optimizer", "lena", "--learning-rate", 0.3, "--group-size", 4),
)


def state_of(workdir):
    with Checkpoints(workdir / CHECKPOINTS) as checkpoints:
        last = checkpoints.steps()[-1]
        return last, checkpoints.arrays(last)


@pytest.fixture
def run(data_dir):
    return lambda workdir: start(
        *OPTIONS, "--workdir", workdir, "--data-dir", data_dir, num_devices=2
    )


def test_kills_leave_no_trace(run, tmp_path, full):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(run(whole))
    moments, num_kills = random.Random(0), 20 if full else 2

    for index in range(1, num_kills + 1):
        process = run(killed)
        wait_for_step(18 * index // num_kills, killed, process)
        time.sleep(moments.uniform(0, 0.3))
        process.kill()
        process.communicate()
    # As a kill in the middle of a line leaves it.
    with (killed / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 9')
    finish(run(killed))

    assert numbers_of(killed) == numbers_of(whole)
    (step, state), (expected_step, expected) = state_of(killed), state_of(whole)
    assert step == expected_step == 20
    jax.tree.map(np.testing.assert_array_equal, state, expected)
