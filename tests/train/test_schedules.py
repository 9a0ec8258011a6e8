import numpy as np

from train.schedules import warmup_then_polynomial


def test_without_warmup_the_first_step_has_the_peak():
    schedule = warmup_then_polynomial(peak=2.0, warmup_steps=0, num_steps=4)

    rates = [float(schedule(step)) for step in range(5)]

    np.testing.assert_allclose(rates, [2.0, 2 * 0.75**2, 2 * 0.5**2, 2 * 0.25**2, 0.0], rtol=1e-6)


def test_warmup_rises_in_equal_steps_to_the_peak():
    schedule = warmup_then_polynomial(peak=1.0, warmup_steps=3, num_steps=7)

    rates = [float(schedule(step)) for step in range(8)]

    expected = [0.25, 0.5, 0.75, 1.0, 0.75**2, 0.5**2, 0.25**2, 0.0]
    np.testing.assert_allclose(rates, expected, rtol=1e-6)
