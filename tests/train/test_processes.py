"""Several processes train as one does; each is a real one, with CPU devices of its own."""

import numpy as np
import pytest

from tests.train.commands import finish, numbers_of, refusals, start, start_two
from train.checkpoint import Checkpoints
from train.run_folder import CHECKPOINTS

OPTIONS = (
    *("digits", "--batch-size", "240", "--epochs", "1", "--transfer-size", "120"),
    *("--microbatch-size", "15", "--bn-group", "2", "--seed", "1"),
)


def start_both(data_dir, *options_of_each):
    options = ((*OPTIONS, "--data-dir", data_dir, *options) for options in options_of_each)
    return start_two(*options)


@pytest.fixture(scope="module")
def together(tmp_path_factory, data_dir):
    """A run of two processes of two devices: its folder and what they say."""
    workdir = tmp_path_factory.mktemp("together")
    return workdir, finish(*start_both(data_dir, *2 * [("--workdir", workdir)]))


@pytest.fixture(scope="module")
def alone(tmp_path_factory, data_dir):
    """One process of four devices."""
    workdir = tmp_path_factory.mktemp("alone")
    options = (*OPTIONS, "--workdir", workdir, "--data-dir", data_dir)
    finish(start(*options, num_devices=4, program="tests.train.small"))
    return workdir


def test_two_processes_of_two_devices_equal_one_of_four(together, alone):
    found, expected = numbers_of(together[0]), numbers_of(alone)

    assert len(found) == 7  # Six steps and an evaluation.
    for line, expected_line in zip(found, expected, strict=True):
        # The devices add up in another order, which the steps make larger.
        tolerance = 1e-5 if line["step"] == 1 else 1e-2
        assert line.keys() == expected_line.keys()
        for name, value in line.items():
            assert value == pytest.approx(expected_line[name], rel=tolerance)


def test_only_the_first_process_speaks(together):
    first, second = together[1]

    assert "step 6/6" in first
    assert "4 x cpu" in first
    assert "step" not in second


def test_checkpoint_of_two_processes_is_read_by_one(together, alone):
    with Checkpoints(together[0] / CHECKPOINTS) as checkpoints:
        assert checkpoints.steps()[-1] == 6
        found = checkpoints.arrays(6)["params"]
    with Checkpoints(alone / CHECKPOINTS) as checkpoints:
        expected = checkpoints.arrays(6)["params"]

    np.testing.assert_allclose(
        found["head"]["kernel"], expected["head"]["kernel"], rtol=1e-2, atol=1e-4
    )


def test_two_processes_go_on_together(together, data_dir):
    workdir = together[0]
    before = numbers_of(workdir)

    first, _ = finish(*start_both(data_dir, *2 * [("--workdir", workdir)]))

    assert "going on from step 6" in first
    assert numbers_of(workdir) == before


def test_process_with_other_options_is_named(tmp_path, data_dir):
    common = ("--workdir", tmp_path)

    first, second = refusals(*start_both(data_dir, common, (*common, "--epochs", "2")))

    assert first == "process 1 refuses to start: its message says why."
    assert second.startswith(
        f"--workdir is {tmp_path}, which holds a run with --epochs 1.0, but now it is 2.0: "
    )


def test_process_that_is_refused_by_itself_does_not_leave_the_other_waiting(tmp_path, data_dir):
    common = ("--workdir", tmp_path)

    first, second = refusals(*start_both(data_dir, common, (*common, "--batch-size", "241")))

    assert first == "process 1 refuses to start: its message says why."
    assert second.startswith("--batch-size is 241, but must be a multiple of ")
    assert not list(tmp_path.iterdir())


def test_folder_that_not_all_processes_see_is_refused(tmp_path, data_dir):
    folders = tmp_path / "first", tmp_path / "second"

    first, second = refusals(*start_both(data_dir, *(("--workdir", folder) for folder in folders)))

    assert first == "process 1 refuses to start: its message says why."
    assert second == (
        f"--workdir is {folders[1]}, but the config.json that process 0 has written is not there: "
        "name a folder on a file system that all processes see."
    )
