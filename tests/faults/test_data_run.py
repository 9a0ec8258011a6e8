"""A run that meets bad examples: it ends and names one, or passes over them and counts them."""

import dataclasses

import pytest

from tests.train.commands import lines_of, run_here
from train.configs import CONFIGS
from train.errors import RunError
from train.setup import prepare

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("small_network")]


class Broken:
    """Examples of which some cannot be read."""

    def __init__(self, examples, bad):
        self.examples = examples
        self.bad = bad

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        if index in self.bad:
            raise ValueError(f"example {index} cannot be read.")
        return self.examples[index]


@pytest.fixture
def broken_run(data_dir, tmp_path):
    def prepare_with(**options):
        config = dataclasses.replace(
            CONFIGS["digits"],
            **{"batch_size": 480, "epochs": 3.0, "eval_epochs": 3.0, "group_size": 60},
            **{"data_dir": data_dir, "workdir": tmp_path / "run", **options},
        )
        prepared = prepare(config)
        return dataclasses.replace(
            prepared,
            train_examples=Broken(prepared.train_examples, {7, 900}),
            test_examples=Broken(prepared.test_examples, {359}),
        )

    return prepare_with


def test_bad_examples_are_passed_over_and_counted(broken_run):
    run = broken_run(max_bad_examples=2)

    run_here(run)

    *lines, evaluation = lines_of(run.config.workdir)
    # Nine batches are three passes and nine images more, one of which may be bad, too.
    assert 6 <= sum(line["bad_examples"] for line in lines) <= 8
    assert evaluation["bad_examples"] == 1
    found = evaluation["test_accuracy"] * 359
    assert found == pytest.approx(round(found), abs=1e-4)


def test_bad_example_ends_the_run(broken_run):
    run = broken_run()

    with pytest.raises(RunError, match=r"^example (7|900) cannot be read\."):
        run_here(run)
