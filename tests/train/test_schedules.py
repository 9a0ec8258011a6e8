import functools

import numpy as np
import optax
import pytest

from train.schedules import make_schedule

warmup_then_polynomial = functools.partial(make_schedule, "polynomial", end=0.0)


def rates(schedule, steps):
    return [float(schedule(step)) for step in steps]


def test_without_warmup_the_first_step_has_the_peak():
    schedule = warmup_then_polynomial(peak=2.0, warmup_steps=0, num_steps=4)

    rates = [float(schedule(step)) for step in range(5)]

    np.testing.assert_allclose(rates, [2.0, 2 * 0.75**2, 2 * 0.5**2, 2 * 0.25**2, 0.0], rtol=1e-6)


def test_warmup_rises_in_equal_steps_to_the_peak():
    schedule = warmup_then_polynomial(peak=1.0, warmup_steps=3, num_steps=7)

    rates = [float(schedule(step)) for step in range(8)]

    expected = [0.25, 0.5, 0.75, 1.0, 0.75**2, 0.5**2, 0.25**2, 0.0]
    np.testing.assert_allclose(rates, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "options"),
    [("polynomial", {}), ("cosine", {}), ("step", {"boundaries": [5]}), ("constant", {})],
)
def test_every_schedule_warms_up(name, options):
    schedule = make_schedule(name, peak=1.0, end=0.0, warmup_steps=3, num_steps=7, **options)

    np.testing.assert_allclose(rates(schedule, range(4)), [0.25, 0.5, 0.75, 1.0], rtol=1e-6)


def test_polynomial_of_the_authors_of_clars():
    """0.128 for each 256 examples at batch 16,384, 90 epochs, power 2, to 0.0001."""
    schedule = make_schedule("polynomial", peak=8.192, end=1e-4, warmup_steps=0, num_steps=7038)

    expected = [8.192, 0.25 * (8.192 - 1e-4) + 1e-4, 1e-4]
    np.testing.assert_allclose(rates(schedule, [0, 3519, 7038]), expected, rtol=1e-5)


def test_cosine():
    """As far from the middle on one side as on the other, and a quarter of the way 0.854."""
    schedule = make_schedule("cosine", peak=3.0, end=1.0, warmup_steps=2, num_steps=10)

    expected = [3.0, 1 + 2 * (1 + np.sqrt(0.5)) / 2, 2.0, 1 + 2 * (1 - np.sqrt(0.5)) / 2, 1.0, 1.0]
    np.testing.assert_allclose(rates(schedule, [2, 4, 6, 8, 10, 12]), expected, rtol=1e-6)


def test_cosine_is_that_of_optax():
    schedule = make_schedule("cosine", peak=3.0, end=0.5, warmup_steps=0, num_steps=50)

    expected = optax.warmup_cosine_decay_schedule(3.0, 3.0, 0, 50, end_value=0.5)
    np.testing.assert_allclose(rates(schedule, range(51)), rates(expected, range(51)), rtol=1e-6)


def test_step_of_goyal_et_al():
    """Batch 8,192: 3.2 after five epochs of 156 steps, a tenth at epochs 30, 60 and 80."""
    schedule = make_schedule(
        "step",
        peak=3.2,
        end=0.0,
        warmup_steps=5 * 156,
        num_steps=90 * 156,
        boundaries=[30 * 156, 60 * 156, 80 * 156],
    )

    steps = [5 * 156, 30 * 156 - 1, 30 * 156, 60 * 156 - 1, 60 * 156, 80 * 156, 90 * 156 - 1]
    expected = [3.2, 3.2, 0.32, 0.32, 0.032, 0.0032, 0.0032]
    np.testing.assert_allclose(rates(schedule, steps), expected, rtol=1e-5)
    np.testing.assert_allclose(np.diff(rates(schedule, range(781))), 3.2 / 781, rtol=1e-2)


def test_constant():
    schedule = make_schedule("constant", peak=0.7, end=0.0, warmup_steps=0, num_steps=5)

    np.testing.assert_allclose(rates(schedule, range(7)), 0.7, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"name": "linear"},
            "--schedule is 'linear', but must be 'polynomial', 'cosine', 'step' or 'constant'.",
        ),
        (
            {"warmup_steps": 10},
            "--warmup-epochs comes to 10 steps, but the whole run has 10: warm up for less, or "
            "train for longer.",
        ),
        (
            {"end": 1.0},
            "--end-learning-rate is 1, but must be at least 0 and less than the peak of the "
            "learning rate, 1.",
        ),
        (
            {"name": "cosine", "end": -0.1},
            "--end-learning-rate is -0.1, but must be at least 0 and less than the peak of the "
            "learning rate, 1.",
        ),
        (
            {"name": "constant", "end": 1e-4},
            "--end-learning-rate is 0.0001, but the schedule constant has no such thing: set it to "
            "0, or choose polynomial or cosine.",
        ),
        (
            {"name": "step", "end": 1e-4, "boundaries": [5]},
            "--end-learning-rate is 0.0001, but the schedule step has no such thing: set it to 0, "
            "or choose polynomial or cosine.",
        ),
        (
            {"name": "step"},
            "--decay-epochs is missing: the schedule step falls to a tenth at each of them. Name "
            "some, or choose another schedule.",
        ),
        (
            {"name": "cosine", "boundaries": [5]},
            "--decay-epochs is given, but the schedule cosine has no such thing: say "
            "--decay-epochs without any, or choose step.",
        ),
        (
            {"name": "step", "boundaries": [5, 4]},
            "--decay-epochs comes to the steps 5, 4, but each must come after the one before.",
        ),
        (
            {"name": "step", "boundaries": [5, 5]},
            "--decay-epochs comes to the steps 5, 5, but each must come after the one before.",
        ),
        (
            {"name": "step", "boundaries": [5, 10]},
            "--decay-epochs comes to the steps 5, 10, but each must lie between the end of the "
            "warm-up, at 2, and that of the run, at 10.",
        ),
        (
            {"name": "step", "boundaries": [2, 5]},
            "--decay-epochs comes to the steps 2, 5, but each must lie between the end of the "
            "warm-up, at 2, and that of the run, at 10.",
        ),
    ],
)
def test_options_that_make_no_sense(options, message):
    usual = {"name": "polynomial", "peak": 1.0, "end": 0.0, "warmup_steps": 2, "num_steps": 10}

    with pytest.raises(ValueError, match=r"^--") as error:
        make_schedule(**(usual | options))

    assert str(error.value) == message
