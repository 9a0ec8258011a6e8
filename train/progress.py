"""What a run shows while it goes: a live bar on a terminal, now and then a line elsewhere."""

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

_LINES_PER_RUN = 10
_STEPS_OF_AVERAGE = 10


class TrainingProgress:
    """Step, loss, accuracy, examples per second, share of waiting for data and time left.

    Args:
        num_steps: steps of the run.
        batch_size: examples per step.
        console: where to show it.
        done: steps that an earlier part of the run has done.
    """

    def __init__(self, num_steps: int, batch_size: int, console: Console, done: int = 0) -> None:
        self._bar = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=24),
            TextColumn("{task.description}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("compiling the first step", total=num_steps, completed=done)
        self._first = done + 1
        self._console = console
        self._num_steps = num_steps
        self._batch_size = batch_size
        self._seconds: list[float] = []
        self._waited: list[float] = []

    def update(
        self, step: int, seconds: float, waited: float, loss: float, accuracy: float
    ) -> None:
        """Shows that `step` steps are done.

        Args:
            step: counts from 1.
            seconds: what the last step took.
            waited: seconds of these in which the devices waited for data.
            loss: that of the last step.
            accuracy: that of the last step.
        """
        status = f"loss {loss:.4f}  accuracy {accuracy:6.1%}"
        if step > self._first:  # The first step is compilation for the most part.
            self._seconds.append(seconds)
            self._waited.append(waited)
            recent = self._seconds[-_STEPS_OF_AVERAGE:]
            mean = sum(recent) / len(recent)
            left = round(mean * (self._num_steps - step))
            status += f"  {self._batch_size / mean:,.0f} examples/s"
            status += f"  {self.waiting(_STEPS_OF_AVERAGE):.0%} waiting for data"
            status += f"  {left // 60}:{left % 60:02} left"
        self._bar.update(self._task, completed=step, description=status)
        interval = max(1, self._num_steps // _LINES_PER_RUN)
        if not self._console.is_terminal and (
            step % interval == 0 or step in (self._first, self._num_steps)
        ):
            self._console.print(f"step {step}/{self._num_steps}  {status}")

    def waiting(self, num_steps: int = 0) -> float:
        """Returns the share of the time of the steps in which the devices waited for data.

        Args:
            num_steps: the last so many steps; 0 for all but the first, which is nearly all
                compilation.

        Returns:
            A number from 0 to 1; 0 where there are no such steps.
        """
        total = sum(self._seconds[-num_steps:])
        return sum(self._waited[-num_steps:]) / total if total else 0.0

    def __enter__(self) -> "TrainingProgress":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()
