import dataclasses
import re
from pathlib import Path

import pytest

from train.__main__ import main, parse
from train.configs import CONFIGS
from train.data import DATASETS
from train.validation import validate, validate_cluster, validate_with_data

DIGITS = DATASETS["digits"]


def message(num_devices=8, num_processes=1, **options):
    config = dataclasses.replace(CONFIGS["digits"], **options)
    with pytest.raises(ValueError, match="--") as info:
        validate(config, DIGITS, num_devices, num_processes)
    return str(info.value)


@pytest.mark.parametrize("num_devices", [1, 2, 8, 64])
@pytest.mark.parametrize("name", CONFIGS)
def test_named_configurations_are_valid(name, num_devices):
    config = CONFIGS[name]
    if config.batch_size % num_devices == 0:
        validate(config, DATASETS[config.dataset], num_devices)
    assert config.config == name


def test_configurations_for_imagenet_run_at_batch_16384_on_any_usual_number_of_devices():
    for name in ("imagenet-resnet50", "imagenet-densenet121", "imagenet-mobilenetv2"):
        config = parse([name, "--batch-size", "16384"])
        for num_devices in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512):
            validate(config, DATASETS[config.dataset], num_devices)


def test_batch_that_the_devices_do_not_divide():
    assert message(batch_size=100) == (
        "--batch-size is 100, but must be a multiple of 8, the number of devices: 96 or 104 would "
        "do."
    )


def test_batch_smaller_than_the_devices():
    assert "8 would do" in message(batch_size=3)


def test_batch_larger_than_the_data_set():
    config = dataclasses.replace(CONFIGS["digits"], batch_size=2000)
    with pytest.raises(ValueError, match="--batch-size is 2000, but the training split") as info:
        validate_with_data(config, 1437)
    assert str(info.value).endswith("of digits has 1437 examples: choose at most as many.")


def test_run_of_no_step():
    config = dataclasses.replace(CONFIGS["digits"], epochs=1e-9)
    with pytest.raises(ValueError, match="--epochs is 1e-09, which is no step of"):
        validate_with_data(config, 1437)


@pytest.mark.parametrize("name", ["workdir", "data_dir"])
def test_addresses_in_the_place_of_paths(name):
    assert message(**{name: Path("gs://bucket/run")}) == (
        f"--{name.replace('_', '-')} is gs:/bucket/run, but must be a path, not an address: mount "
        "a file system that has it."
    )


def test_microbatch_that_does_not_divide_a_share():
    assert message(batch_size=96, microbatch_size=8) == (
        "--microbatch-size is 8, but must divide the share of a device, 12: 1, 2, 3, 4, 6 or 12 "
        "would do."
    )


def test_share_that_is_smaller_than_a_microbatch_goes_through_at_once():
    validate(dataclasses.replace(CONFIGS["digits"], batch_size=96, microbatch_size=13), DIGITS, 8)


def test_transfer_that_does_not_divide_the_batch():
    assert message(batch_size=96, transfer_size=64) == (
        "--transfer-size is 64, but must divide --batch-size, 96: 8, 16, 24, 32, 48 or 96 would do."
    )


def test_transfer_that_the_devices_do_not_divide():
    assert "--transfer-size is 12, but must be a multiple of 8" in message(
        batch_size=96, transfer_size=12
    )


def test_transfer_larger_than_the_batch():
    assert message(batch_size=96, transfer_size=192) == (
        "--transfer-size is 192, but must be at most --batch-size, 96: lower it."
    )


def test_microbatch_that_does_not_divide_a_transfer():
    assert "must divide the share of a device in a transfer, 6" in message(
        batch_size=96, transfer_size=48, microbatch_size=4
    )


def test_groups_of_devices_that_do_not_divide_them():
    assert message(bn_group=3) == (
        "--bn-group is 3, but must divide the number of devices, 8: 1, 2, 4 or 8 would do."
    )


def test_group_that_does_not_divide_a_share():
    assert message(batch_size=96, group_size=5) == (
        "--group-size is 5, but must divide the 12 examples that go through a device at a time: "
        "1, 2, 3, 4, 6 or 12 would do."
    )
    assert "the 6 examples" in message(batch_size=96, microbatch_size=6, group_size=4)
    assert "the 6 examples" in message(batch_size=96, transfer_size=48, group_size=4)


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
    "name",
    [
        "batch_size",
        "bn_group",
        "group_size",
        "image_size",
        "microbatch_size",
        "num_norm_examples",
        "transfer_size",
    ],
)
def test_sizes_below_one(name):
    assert message(**{name: 0}) == (
        f"--{name.replace('_', '-')} is 0, but must be from 1 to 3.4e+38: change it."
    )


@pytest.mark.parametrize("name", ["seed", "weight_decay", "warmup_epochs", "end_learning_rate"])
def test_negative_numbers(name):
    assert message(**{name: -1}) == (
        f"--{name.replace('_', '-')} is -1, but must be from 0 to 3.4e+38: change it."
    )


@pytest.mark.parametrize("value", [0.0, 1e39, float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["epochs", "eval_epochs", "learning_rate", "trust_coefficient", "max_trust_ratio"]
)
def test_numbers_that_must_be_positive(name, value):
    assert message(**{name: value}) == (
        f"--{name.replace('_', '-')} is {value:g}, but must be above 0 and at most 3.4e+38: "
        "change it."
    )


@pytest.mark.parametrize(
    ("name", "usual"), [("momentum", 0.9), ("norm_momentum", 0.9), ("ema_decay", 0.999)]
)
def test_decay_rate_of_one(name, usual):
    assert message(**{name: 1.0}) == (
        f"--{name.replace('_', '-')} is 1, but must be at least 0 and less than 1: {usual} is "
        "usual."
    )


def test_warmup_longer_than_the_run():
    assert message(epochs=2.0, warmup_epochs=2.0) == (
        "--warmup-epochs is 2, but must be less than --epochs, 2: warm up for less, or train for "
        "longer."
    )


@pytest.mark.parametrize("optimizer", ["lena", "tvlars"])
def test_warmup_of_optimizers_that_bring_their_own(optimizer):
    assert f"but {optimizer} brings what takes the place of warm-up" in message(
        optimizer=optimizer, learning_rate=1.0, warmup_epochs=1.0
    )


def test_schedule_of_tvlars():
    assert message(optimizer="tvlars", learning_rate=1.0) == (
        "--schedule is polynomial, but tvlars has one of its own: choose constant, with "
        "--end-learning-rate 0."
    )


@pytest.mark.parametrize(("name", "value"), [("group_size", 90), ("num_norm_examples", 8)])
def test_norms_for_an_optimizer_that_needs_none(name, value):
    assert "but sgd needs no norms of per-example gradients" in message(
        optimizer="sgd", **{name: value}
    )


def test_numbers_out_of_all_proportion():
    assert "--epochs is 1e+38, but must be at most 1,000,000" in message(epochs=1e38)
    assert "--learning-rate is 3e+38, which for a batch of" in message(learning_rate=3e38)
    assert "--decay-epochs is inf" in message(decay_epochs=(1.0, float("inf")))


def test_seed_too_large():
    assert message(seed=2**32) == "--seed is 4294967296, but must be less than 2^32: lower it."


@pytest.mark.parametrize("name", ["dropout_rate", "label_smoothing"])
def test_share_of_one(name):
    assert "but must be at least 0 and less than 1: 0.1 is usual." in message(**{name: 1.0})


def test_options_that_the_model_has_not():
    assert "--dropout-rate" in message(dropout_rate=0.1)
    assert "--zero-init-residual" in message(model="densenet_bc40", zero_init_residual=True)


def test_options_that_the_optimizer_has_not():
    assert "--trust-coefficient" in message(optimizer="sgd", trust_coefficient=0.1)


def test_unknown_network():
    assert "resnet50" in message(model="vgg16")


def test_optimizer_without_a_learning_rate():
    assert message(optimizer="lamb") == (
        "--learning-rate is missing: the configuration digits names none for lamb, only for clars, "
        "lars or sgd. Give one, for a batch of 256 examples."
    )
    validate(
        dataclasses.replace(CONFIGS["digits"], optimizer="lamb", learning_rate=0.01), DIGITS, 8
    )


def test_schedule_is_checked_against_the_length_of_the_run():
    config = dataclasses.replace(
        CONFIGS["digits"], schedule="step", epochs=4, decay_epochs=(2.0, 8.0)
    )
    with pytest.raises(ValueError, match="--decay-epochs"):
        validate_with_data(config, 1437)


def test_workdir_that_is_a_file(tmp_path):
    (tmp_path / "something").touch()

    assert "that is a file" in message(workdir=tmp_path / "something")


def test_several_processes_need_a_workdir():
    assert "--workdir is missing" in message(num_processes=2)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_processes": 2}, "--num-processes is 2, but --coordinator is None"),
        ({"coordinator": "auto", "process_id": 0}, "--process-id is 0, but --coordinator is auto"),
        ({"coordinator": "h:1", "process_id": 0}, "--num-processes is missing"),
        ({"coordinator": "h:1", "num_processes": 2}, "--process-id is missing"),
        (
            {"coordinator": "h:1", "num_processes": 2, "process_id": 2},
            "--process-id is 2, but must be less than --num-processes, 2",
        ),
        (
            {"coordinator": "h", "num_processes": 2, "process_id": 1},
            "--coordinator is 'h', but must be HOST:PORT or auto",
        ),
    ],
    ids=str,
)
def test_cluster(options, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        validate_cluster(dataclasses.replace(CONFIGS["digits"], **options))


def test_learning_rate_is_the_configurations_unless_given():
    config = CONFIGS["digits"]

    assert parse([]).peak_learning_rate == pytest.approx(config.learning_rates["clars"] * 720 / 256)
    assert parse(["--optimizer", "sgd"]).base_learning_rate == config.learning_rates["sgd"]
    assert parse(["digits", "--learning-rate", "0.7"]).base_learning_rate == 0.7


def test_steps_cover_the_epochs():
    config = dataclasses.replace(CONFIGS["digits"], batch_size=720, epochs=2)

    assert config.num_steps(1437) == 4  # 2 * 1,437 = 3.99 * 720
    config = dataclasses.replace(config, batch_size=600, epochs=16.1)
    assert config.num_steps(60_000) == 1610  # Not one more for a rounding.


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
        if field.name == "learning_rates":
            assert option + " " not in text.replace("--learning-rate ", "")
        elif field.name != "config":
            assert option in text
    assert "720)" in text
