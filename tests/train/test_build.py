"""Every option comes to the part of a run that it is about."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import pytest

from train import build
from train.body import Accumulation
from train.configs import CONFIGS
from train.data import DATASETS
from train.step import AXIS

DIGITS = DATASETS["digits"]
NUM_TRAIN = 1437
# None of them is what it is by default.
CONFIG = dataclasses.replace(
    CONFIGS["digits"],
    **{"model": "densenet_bc40", "image_size": 16, "dtype": "bfloat16", "dropout_rate": 0.2},
    **{"norm_momentum": 0.7, "bn_group": 2, "learning_rate": 0.5, "warmup_epochs": 3.0},
    **{"schedule": "step", "decay_epochs": (10.0, 20.0), "batch_size": 96, "epochs": 30.0},
    **{"weight_decay": 0.01, "weight_decay_mask": "all", "momentum": 0.8, "nesterov": True},
    **{"trust_coefficient": 0.02, "max_trust_ratio": 0.3, "label_smoothing": 0.1},
    **{"ema_decay": 0.95, "group_size": 3, "num_norm_examples": 48, "microbatch_size": 3},
    **{"transfer_size": 48, "seed": 5},
)


@pytest.fixture
def given(monkeypatch):
    """What the makers of the parts are given, by their names."""
    found = {}

    def watch(name):
        make = getattr(build, name)

        def watched(*args, **options):
            found[name] = inspect.signature(make).bind(*args, **options).arguments
            return make(*args, **options)

        monkeypatch.setattr(build, name, watched)

    for name in ("make_model", "make_schedule", "make_optimizer", "TrainBody", "draw_state"):
        watch(name)
    return found


def training(config):
    network = build.network_of(config, DIGITS, 8)
    draw, _ = build.training_of(config, DIGITS, network, NUM_TRAIN, jax.devices())
    return jax.eval_shape(draw, jax.random.key(0))


def test_options_come_to_the_parts(given):
    state = training(CONFIG)

    assert given["make_model"] == {
        **{"name": "densenet_bc40", "num_classes": 10, "norm_momentum": 0.7, "axis_name": AXIS},
        **{"axis_index_groups": [[0, 1], [2, 3], [4, 5], [6, 7]], "dtype": jnp.dtype("bfloat16")},
        **{"dropout_rate": 0.2, "zero_init_residual": False},
    }
    # An epoch has 14.97 steps.
    assert given["make_schedule"] == {
        **{"name": "step", "peak": 0.5 * 96 / 256, "end": 0.0, "warmup_steps": 45},
        **{"num_steps": 450, "boundaries": [150, 299]},
    }
    schedule = given["make_optimizer"].pop("learning_rate")
    assert given["make_optimizer"] == {
        **{"name": "clars", "momentum": 0.8, "nesterov": True, "weight_decay": 0.01},
        **{"weight_decay_mask": "all", "trust_coefficient": 0.02, "max_trust_ratio": 0.3},
        **{"batch_size": 96, "group_size": 3, "num_steps": 450},
    }
    body = given["TrainBody"]
    assert body["schedule"] is schedule
    assert body["accumulation"] == Accumulation(2, 6, 3, 3, num_norm_examples=6)
    assert (body["label_smoothing"], body["seed"], body["dataset"]) == (0.1, 5, DIGITS)
    assert given["draw_state"]["image_shape"] == (16, 16, 1)
    assert state.ema_decay == 0.95
    assert state.eval_variables is state.ema


def test_other_options_come_to_the_parts(given):
    config = dataclasses.replace(
        CONFIGS["digits"],
        **{"zero_init_residual": True, "schedule": "cosine", "end_learning_rate": 0.01},
        **{"bn_group": 1, "optimizer": "sgd"},
    )

    state = training(config)

    assert given["make_model"]["zero_init_residual"]
    assert (given["make_model"]["axis_name"], state.ema) == (None, None)
    assert (given["make_schedule"]["name"], given["make_schedule"]["end"]) == ("cosine", 0.01)
    assert given["make_optimizer"]["name"] == "sgd"
    # Nobody asks for norms.
    assert given["TrainBody"]["accumulation"] == Accumulation(1, 90)
