import dataclasses
import re

import pytest

from train.__main__ import main, parse
from train.configs import CONFIGS


def message(num_devices=8, **options):
    config = dataclasses.replace(CONFIGS["digits"], **options)
    with pytest.raises(ValueError, match="--") as info:
        config.validate(num_devices)
    return str(info.value)


@pytest.mark.parametrize("num_devices", [1, 2, 8])
def test_named_configurations_are_valid(num_devices):
    for config in CONFIGS.values():
        config.validate(num_devices)


def test_batch_that_the_devices_do_not_divide():
    assert message(batch_size=100) == (
        "--batch-size is 100, but must be a multiple of 8, the number of devices: 96 or 104 would "
        "do."
    )


def test_batch_smaller_than_the_devices():
    assert "8 would do" in message(batch_size=3)


def test_batch_larger_than_the_data_set():
    assert message(batch_size=2000) == (
        "--batch-size is 2000, but the training split of digits has 1437 examples: choose at most "
        "1432."
    )


def test_microbatch_that_does_not_divide_the_batch():
    assert message(batch_size=96, microbatch_size=64) == (
        "--microbatch-size is 64, but must divide --batch-size, 96: 8, 16, 24, 32, 48 or 96 would "
        "do."
    )


def test_microbatch_that_the_devices_do_not_divide():
    assert "--microbatch-size is 12, but must be a multiple of 8" in message(
        batch_size=96, microbatch_size=12
    )


def test_microbatch_larger_than_the_batch():
    assert message(batch_size=96, microbatch_size=192) == (
        "--microbatch-size is 192, but must be at most --batch-size, 96: lower it."
    )


def test_group_that_does_not_divide_a_share():
    assert message(batch_size=96, group_size=5) == (
        "--group-size is 5, but must divide the 12 examples that go through a device at a time: "
        "1, 2, 3, 4, 6 or 12 would do."
    )
    assert "the 6 examples" in message(batch_size=96, microbatch_size=48, group_size=4)


def test_norm_examples_that_make_no_whole_groups():
    assert message(batch_size=96, group_size=4, num_norm_examples=40) == (
        "--num-norm-examples is 40, but must be a multiple of 32, the number of devices times "
        "--group-size: 32 or 64 would do."
    )


def test_more_norm_examples_than_examples():
    assert message(batch_size=96, num_norm_examples=104) == (
        "--num-norm-examples is 104, but must be at most --batch-size, 96: lower it."
    )


@pytest.mark.parametrize(
    "name", ["batch_size", "group_size", "num_norm_examples", "microbatch_size"]
)
def test_sizes_below_one(name):
    assert message(**{name: 0}) == (
        f"--{name.replace('_', '-')} is 0, but must be at least 1: raise it."
    )


@pytest.mark.parametrize("name", ["seed", "weight_decay", "warmup_epochs"])
def test_negative_numbers(name):
    assert message(**{name: -1}) == (
        f"--{name.replace('_', '-')} is -1, but must be at least 0: raise it."
    )


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["epochs", "learning_rate"])
def test_numbers_that_must_be_positive(name, value):
    assert message(**{name: value}) == (
        f"--{name.replace('_', '-')} is {value:g}, but must be a finite number above 0: change it."
    )


@pytest.mark.parametrize("name", ["momentum", "norm_momentum"])
def test_momentum_of_one(name):
    assert message(**{name: 1.0}) == (
        f"--{name.replace('_', '-')} is 1, but must be at least 0 and less than 1: 0.9 is usual."
    )


def test_warmup_longer_than_the_run():
    assert message(epochs=2.0, warmup_epochs=2.0) == (
        "--warmup-epochs is 2, but must be less than --epochs, 2: warm up for less, or train for "
        "longer."
    )


def test_used_workdir(tmp_path):
    (tmp_path / "something").touch()

    assert message(workdir=tmp_path) == (
        f"--workdir is {tmp_path}, but that folder is not empty: name a new one, or remove it."
    )
    assert "that is a file" in message(workdir=tmp_path / "something")


def test_empty_workdir_is_accepted(tmp_path):
    dataclasses.replace(CONFIGS["digits"], workdir=tmp_path).validate(1)


def test_learning_rate_is_the_configurations_unless_given():
    config = CONFIGS["digits"]

    assert parse([]).peak_learning_rate == pytest.approx(
        config.tuned_learning_rates["clars"] * 720 / 256
    )
    assert parse(["--optimizer", "sgd"]).base_learning_rate == config.tuned_learning_rates["sgd"]
    assert parse(["digits", "--learning-rate", "0.7"]).base_learning_rate == 0.7


def test_steps_cover_the_epochs():
    config = dataclasses.replace(CONFIGS["digits"], batch_size=720, epochs=2)

    assert config.num_steps == 4  # 2 * 1,437 = 3.99 * 720


def test_wrong_option_is_one_line_and_exit_code_2(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train", "--batch-size", "7"])

    with pytest.raises(SystemExit) as info:
        main()

    assert info.value.code == 2
    assert re.fullmatch(r"python -m train: --batch-size is 7, .*\n", capsys.readouterr().err)


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])

    text = capsys.readouterr().out
    for field in dataclasses.fields(CONFIGS["digits"]):
        option = f"--{field.name.replace('_', '-')}"
        if field.name in ("dataset", "model", "tuned_learning_rates"):
            assert option not in text
        elif field.name != "config":
            assert option in text
    assert "720)" in text
