"""What a run shows while it goes: a live bar on a terminal, now and then a line elsewhere."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

_LINES_PER_RUN = 10


class TrainingProgress:
    """Step, loss, accuracy, examples per second and time left.

    Args:
        num_steps: steps of the run.
        batch_size: examples per step.
        console: where to show it.
    """

    def __init__(self, num_steps: int, batch_size: int, console: Console) -> None:
        columns: list[ProgressColumn] = [
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            TextColumn("left"),
        ]
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("compiling the first step", total=num_steps)
        self._console = console
        self._num_steps = num_steps
        self._batch_size = batch_size
        self._first_done = 0.0

    def update(self, step: int, loss: float, accuracy: float) -> None:
        """Shows that `step` steps are done, with the loss and accuracy of the last."""
        now = time.perf_counter()
        if step == 1:
            self._first_done = now  # What comes before is compilation.
        speed = (step - 1) * self._batch_size / max(now - self._first_done, 1e-9)
        status = f"loss {loss:.4f}  accuracy {accuracy:6.1%}  {speed:,.0f} examples/s"
        self._bar.update(self._task, completed=step, description=status)
        interval = max(1, self._num_steps // _LINES_PER_RUN)
        if not self._console.is_terminal and (step % interval == 0 or step in (1, self._num_steps)):
            left = (now - self._first_done) / max(step - 1, 1) * (self._num_steps - step)
            time_left = f"  {left:.0f} s left" if step > 1 else ""
            self._console.print(f"step {step}/{self._num_steps}  {status}{time_left}")

    def __enter__(self) -> "TrainingProgress":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()
