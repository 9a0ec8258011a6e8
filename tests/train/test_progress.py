import io

from rich.console import Console

from train.progress import TrainingProgress


def show(num_steps, **options):
    text = io.StringIO()
    console = Console(file=text, width=120, **options)
    with TrainingProgress(num_steps, batch_size=100, console=console) as progress:
        for step in range(1, num_steps + 1):
            progress.update(step, seconds=30.0 if step == 1 else 0.5, loss=1 / step, accuracy=0.5)
    return text.getvalue()


def test_plain_lines_where_there_is_no_terminal():
    text = show(200, force_terminal=False)

    assert "\x1b" not in text
    assert "\r" not in text
    lines = text.splitlines()
    assert lines[0] == "step 1/200  loss 1.0000  accuracy  50.0%"
    assert lines[1] == "step 20/200  loss 0.0500  accuracy  50.0%  200 examples/s  1:30 left"
    assert lines[-1].startswith("step 200/200")
    assert len(lines) == 11


def test_live_bar_on_a_terminal():
    text = show(3, force_terminal=True)

    assert "\x1b" in text
    assert "step 3/3" in text
    assert "200 examples/s  0:00 left" in text
