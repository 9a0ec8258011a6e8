import dataclasses
import functools
import re

import pytest

from benchmarks import memory
from benchmarks.targets import TARGETS
from train.configs import CONFIGS
from train.models import MODELS
from train.models.resnet import ResNet

pytestmark = pytest.mark.usefixtures("compiled_fast")

CONFIG = dataclasses.replace(CONFIGS["digits"], batch_size=16, microbatch_size=16)


@pytest.fixture
def small(monkeypatch):
    """A network that compiles faster."""
    network = functools.partial(ResNet, stage_sizes=(1,), width=32)
    monkeypatch.setitem(MODELS, CONFIG.model, network)


@pytest.fixture(scope="module")
def single(compiled_fast):
    """The parameters, and the plans where a step is one micro-batch."""
    return memory.memory_of(CONFIG)


@pytest.mark.usefixtures("small")
def test_table(capsys):
    memory.main(
        ["--config", "digits", "--image-size", "8", "--batch-size", "64", "--microbatch-size", "16"]
    )

    text = capsys.readouterr().out
    assert re.findall(r"^\| (.*?) +\| (\w+) +\|", text, re.MULTILINE)[1:] == [
        ("a batch of 16", "step"),
        ("a batch of 64 in transfers of 16", "accumulate"),
        ("a batch of 64 in transfers of 16", "finish"),
    ]
    (more,) = re.findall(r"large batch ([+-]\d\.\d\d) times", text)
    assert float(more) <= 2


def test_images_and_parameters_are_in_the_plan(single):
    params, plans = single

    images = 16 * 8 * 8 * (1 + 4)  # bytes and, on their way into the network, floats
    assert params == 4 * 77_754  # as tests/train/test_models.py counts them
    assert plans["step"].arguments >= 16 * 8 * 8 + 2 * params
    assert plans["step"].temporary > images
    # The new state takes the place of the old one.
    assert plans["step"].results < params


@pytest.mark.usefixtures("small")
def test_batch_in_transfers_needs_one_microbatch_and_two_trees_like_the_parameters():
    params, single = memory.memory_of(CONFIG)
    large = dataclasses.replace(CONFIG, batch_size=128, transfer_size=16)

    _, plans = memory.memory_of(large)

    for plan in plans.values():
        assert plan.total <= single["step"].total + 2 * params


def test_loop_over_microbatches_needs_one_of_them_and_two_trees(single, monkeypatch):
    """On accelerators, where micro-batches are a loop; the images are arguments."""
    params, plans_of_single = single
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    # It would be tried, on the CPU that this is.
    monkeypatch.setenv("CLARS_OPTAX_KERNEL", "off")

    _, plans = memory.memory_of(dataclasses.replace(CONFIG, batch_size=128))

    assert plans["step"].temporary <= plans_of_single["step"].temporary + 2 * params


@pytest.mark.tpu
@pytest.mark.usefixtures("small")
def test_step_is_mapped_over_tpus():
    params, single = memory.memory_of(CONFIG)

    _, mapped = memory.memory_of(dataclasses.replace(CONFIG, batch_size=64), TARGETS["v5e"])

    # Of 128 channels in a tile, the network has 32.
    assert 1 <= mapped["step"].arguments / single["step"].arguments <= 5
    assert mapped["step"].results < params
    assert mapped["step"].work["cycles"] > 0
