import io

import pytest
from rich.console import Console

from train.progress import TrainingProgress


def show(num_steps, **options):
    text = io.StringIO()
    console = Console(file=text, width=120, **options)
    with TrainingProgress(num_steps, batch_size=100, console=console) as progress:
        for step in range(1, num_steps + 1):
            progress.update(
                step,
                seconds=30.0 if step == 1 else 0.5,
                waited=20.0 if step == 1 else 0.1 if step < 150 else 0.02,
                loss=1 / step,
                accuracy=0.5,
            )
    return text.getvalue(), progress


def test_plain_lines_where_there_is_no_terminal():
    text, _ = show(200, force_terminal=False)

    assert "\x1b" not in text
    assert "\r" not in text
    lines = text.splitlines()
    assert lines[0] == "step 1/200  loss 1.0000  accuracy  50.0%"
    assert lines[1] == (
        "step 20/200  loss 0.0500  accuracy  50.0%  200 examples/s  20% waiting for data  1:30 left"
    )
    assert lines[-1].startswith("step 200/200")
    assert "  4% waiting for data" in lines[-1]
    assert len(lines) == 11


def test_live_bar_on_a_terminal():
    text, _ = show(3, force_terminal=True)

    assert "\x1b" in text
    assert "step 3/3" in text
    assert "200 examples/s  20% waiting for data  0:00 left" in text


def test_waiting_for_data_is_counted_after_the_first_step():
    _, progress = show(200, force_terminal=False)

    # Of 199 steps of half a second, 148 waited for 0.1 s each, and 51 for 0.02 s.
    assert progress.waiting() == pytest.approx((148 * 0.1 + 51 * 0.02) / (199 * 0.5))


def test_a_single_step_did_not_wait():
    _, progress = show(1, force_terminal=False)

    assert progress.waiting() == 0
