"""Any options at all: either the run trains, or it is refused in one line before it writes."""

import dataclasses
import functools
import math
import typing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.train.commands import lines_of, run_here
from train.config import Config
from train.configs import CONFIGS
from train.data import DATASETS, dataset_of
from train.errors import RunError
from train.models import MODELS, resnet
from train.optimizers import OptimizerName
from train.schedules import ScheduleName
from train.setup import prepare
from train.validation import validate, validate_cluster, validate_with_data

pytestmark = pytest.mark.faults

NUM_TRAIN = 1437

sizes = st.none() | st.integers(-1, 2000) | st.sampled_from([8, 16, 24, 48, 64, 240, 480, 720])
numbers = (
    st.floats(-1, 3)
    | st.sampled_from([0.0, 0.1, 0.9, 1.0, math.nan, math.inf, 1e-300, 1e30])
    | st.integers(-1, 3).map(float)
)
shares = st.floats(-0.1, 1.1) | numbers
either = st.booleans()

# What the command line can hand over, by option; the rest of each type is refused by tyro.
VALUES = {
    "dataset": st.sampled_from([*DATASETS, "imagenet", "nothing", "", "../digits", "a b"]),
    "augmentation": st.sampled_from(["auto", "crop-flip", "crop", "shift-flip", "shift", "none"]),
    "model": st.sampled_from([*MODELS, "resnet", ""]),
    "image_size": st.none() | st.integers(-1, 40),
    "dtype": st.sampled_from(["float32", "bfloat16"]),
    "dropout_rate": shares,
    "zero_init_residual": either,
    "norm_momentum": shares,
    "bn_group": st.none() | st.integers(-1, 10),
    "optimizer": st.sampled_from(typing.get_args(OptimizerName)),
    "learning_rate": st.none() | numbers,
    "warmup_epochs": numbers,
    "schedule": st.sampled_from(typing.get_args(ScheduleName)),
    "end_learning_rate": numbers,
    "decay_epochs": st.lists(numbers, max_size=3).map(tuple),
    "batch_size": st.integers(-1, 3000),
    "epochs": numbers,
    "weight_decay": numbers,
    "weight_decay_mask": st.sampled_from(["weights", "all"]),
    "momentum": shares,
    "nesterov": either,
    "trust_coefficient": st.none() | numbers,
    "max_trust_ratio": st.none() | numbers,
    "label_smoothing": shares,
    "ema_decay": st.none() | shares,
    "group_size": st.integers(-1, 64),
    "num_norm_examples": sizes,
    "microbatch_size": sizes,
    "transfer_size": sizes,
    "eval_epochs": numbers,
    "checkpoint_steps": st.none() | st.integers(-1, 5),
    "on_nonfinite": st.sampled_from(["stop", "skip"]),
    "max_nonfinite_steps": st.integers(-1, 3),
    "max_bad_examples": st.integers(-1, 3),
    "seed": st.integers(-1, 2**33),
    "coordinator": st.sampled_from([None, "auto", "host", "host:port", ":1", "host:1"]),
    "num_processes": st.none() | st.integers(-1, 3),
    "process_id": st.none() | st.integers(-1, 3),
    "join_seconds": st.integers(-1, 3),
}
FOLDERS = {"config", "workdir", "resume", "data_dir", "learning_rates"}
CLUSTER = {"coordinator", "num_processes", "process_id", "join_seconds"}


def configs(base, names, most_changes):
    """The options of `base`, up to so many of them changed to anything."""
    changes = st.lists(st.sampled_from(sorted(names)), max_size=most_changes, unique=True).flatmap(
        lambda chosen: st.fixed_dictionaries({name: VALUES[name] for name in chosen})
    )
    return changes.map(lambda changed: dataclasses.replace(base, **changed))


def test_every_option_is_drawn():
    options = {field.name for field in dataclasses.fields(Config)}

    assert VALUES.keys() | FOLDERS == options


def assert_refusal(error, of=""):
    message = str(error)
    assert of in message
    assert "\n" not in message
    # It names an option, or what the other processes are to do.
    assert "--" in message


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(configs(CONFIGS["digits"], VALUES, most_changes=6))
def test_options_are_taken_or_refused_in_one_line(config):
    try:
        validate_cluster(config)
        dataset = dataset_of(config.dataset, Path("/nowhere"), config.augmentation)
        validate(config, dataset, num_devices=8)
        validate_with_data(config, NUM_TRAIN)
    except (ValueError, FileNotFoundError) as error:
        assert_refusal(error)
    else:
        assert config.num_steps(NUM_TRAIN) >= 1


# Small enough to be compiled many times: one residual block.
NETWORK = functools.partial(resnet.ResNet, stage_sizes=(1,), width=4)
BASE = dataclasses.replace(
    CONFIGS["digits"], batch_size=48, epochs=2 * 48 / NUM_TRAIN, eval_epochs=1e6, group_size=2
)


def test_what_is_taken_trains(data_dir, tmp_path_factory, monkeypatch, full):
    monkeypatch.setitem(MODELS, BASE.model, NETWORK)

    @settings(
        suppress_health_check=list(HealthCheck), deadline=None, max_examples=60 if full else 2
    )
    @given(configs(BASE, VALUES.keys() - CLUSTER - {"dataset", "model", "epochs"}, most_changes=4))
    def check(config):
        workdir = tmp_path_factory.mktemp("runs") / "run"
        size = max(config.batch_size, 1)
        config = dataclasses.replace(
            config, epochs=2 * size / NUM_TRAIN, data_dir=data_dir, workdir=workdir
        )
        try:
            prepared = prepare(config)
        except ValueError as error:
            assert_refusal(error)
            assert not workdir.exists()
            return
        try:
            run_here(prepared)
        except RunError as error:
            # A learning rate of 1e30 is nobody's mistake but the user's.
            assert_refusal(error, "is not finite")
            return
        assert [line["step"] for line in lines_of(workdir)] == [1, 2, 2]

    check()
