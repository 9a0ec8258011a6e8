"""A run that was killed goes on to the numbers that it would have had."""

import jax
import numpy as np
import pytest

from tests.train.commands import finish, kill_when, lines_of, numbers_of, start
from train import checkpoint
from train.run_folder import CHECKPOINTS

# Nine steps, with a checkpoint after every third.
OPTIONS = (
    *("digits", "--batch-size", "480", "--epochs", "3", "--ema-decay", "0.9", "--seed", "5"),
    *("--optimizer", "lena", "--learning-rate", "0.3", "--group-size", "4"),
    *("--transfer-size", "160"),
)


def state_of(workdir):
    with checkpoint.open_folder(workdir / CHECKPOINTS) as checkpoints:
        return checkpoints.latest_step(), checkpoints.restore(checkpoints.latest_step())["state"]


@pytest.fixture
def run(data_dir):
    return lambda workdir: start(*OPTIONS, "--workdir", workdir, "--data-dir", data_dir)


def test_killed_run_goes_on_to_the_same_numbers(run, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(run(whole))

    # After the checkpoint of step 3, while step 5 or a later one is under way.
    kill_when(
        lambda: (killed / CHECKPOINTS / "3").exists() and lines_of(killed)[-1]["step"] >= 4,
        run(killed),
    )
    # As a kill in the middle of a line leaves it.
    with (killed / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 9')
    (output,) = finish(run(killed))

    assert "going on from step" in output
    assert numbers_of(killed) == numbers_of(whole)
    (step, state), (expected_step, expected) = state_of(killed), state_of(whole)
    assert step == expected_step == 9
    jax.tree.map(np.testing.assert_array_equal, state, expected)
