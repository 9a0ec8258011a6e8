"""A whole run: training, evaluation, checkpoints, and what is left of it in the run folder."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.experimental import multihost_utils
from rich.console import Console

from train import metrics
from train.build import training_of
from train.checkpoint import Checkpoints
from train.errors import RunError
from train.evaluation import make_evaluation
from train.finite import describe
from train.interruption import Interruption
from train.pieces import PiecesOnDevices, pieces_of
from train.plots import plot_curves
from train.progress import TrainingProgress
from train.run_folder import CHECKPOINTS
from train.schedules import advanced
from train.setup import Prepared
from train.step import init_state, replicate


def train(prepared: Prepared) -> None:
    """Trains to the end, from the start or from the last checkpoint in the run folder.

    Raises:
        RunError: the run cannot go on, or was told to end. There is a checkpoint of all that was
            computed; with several processes, where only one of them cannot go on, at least of what
            there was when it last evaluated.
    """
    config, devices = prepared.config, jax.devices()
    is_first = jax.process_index() == 0
    # The others know the same numbers, and would write over one another.
    console = Console(soft_wrap=True, highlight=False, quiet=not is_first)
    title = f"{config.model} with {config.optimizer} on {config.dataset}"
    with (
        Interruption(console.print) as interruption,
        Checkpoints(prepared.workdir / CHECKPOINTS) as checkpoints,
    ):
        console.print(
            f"{title}: {prepared.num_steps} steps of {config.batch_size} examples, "
            f"{len(devices)} x {devices[0].device_kind}"
        )
        run = _Run(prepared, checkpoints, interruption, console.print)
        with (
            metrics.MetricsWriter(
                prepared.workdir if is_first else None, run.step, bool(run.evaluation)
            ) as writer,
            TrainingProgress(prepared.num_steps, config.batch_size, console, run.step) as progress,
        ):
            run.to_the_end(writer, progress)

    if is_first:
        lines = metrics.read(prepared.workdir)
        title = f"{title}, batch {config.batch_size}"
        plot_curves(lines, title, prepared.layers, prepared.workdir / "curves.png")
    accuracy = run.evaluation["test_accuracy"]
    num_examples = len(prepared.test_examples) - run.evaluation.get("bad_examples", 0)
    console.print(f"waiting for data: {progress.waiting():.1%} of the time of the steps")
    console.print(f"held-out accuracy: {accuracy:.2%} of {num_examples} examples")
    console.print(f"run folder: {prepared.workdir}")


class _Run:
    """A run under way.

    Attributes:
        step: steps that are done.
        evaluation: of the state after this step; empty where there is none.
    """

    def __init__(
        self,
        prepared: Prepared,
        checkpoints: Checkpoints,
        interruption: Interruption,
        say: Callable[[str], None],
    ) -> None:
        self._prepared = prepared
        self._config = prepared.config
        self._checkpoints = checkpoints
        self._interruption = interruption
        self._num_train = len(prepared.train_examples)
        devices = jax.devices()
        draw, self._train_step = training_of(
            self._config, prepared.dataset, prepared.network, self._num_train, devices
        )
        self._state = init_state(draw, self._config.seed, devices)
        self.evaluation: dict[str, float] = {}
        found = checkpoints.restore(self._state, say)
        if found is not None:
            restored, self.evaluation = found
            self._state = replicate(restored, devices)
            say(f"going on from step {int(self._state.step)}")
        self.step = self._saved = int(self._state.step)
        self._skipped_in_a_row = 0
        self._evaluate_state = make_evaluation(prepared, devices)
        self._pieces = PiecesOnDevices(pieces_of(prepared, self.step), devices)

    def to_the_end(self, writer: metrics.MetricsWriter, progress: TrainingProgress) -> None:
        """Trains, evaluates and saves until all steps are done, or until it has to end."""
        if self.step and self._is_evaluated() and not self.evaluation:
            self._evaluate(writer)  # It was interrupted before.
            self._end_if_told()
        while self.step < self._prepared.num_steps:
            self._take_step(writer, progress)
            if self._is_evaluated():
                self._evaluate(writer)
            elif self._is_saved():
                self._save()
            self._end_if_told()

    def _take_step(self, writer: metrics.MetricsWriter, progress: TrainingProgress) -> None:
        started = time.perf_counter()
        with self._keeping():
            self._state, measured = self._train_step(self._state, self._pieces)
        measured = jax.device_get(measured)
        self.step += 1
        self.evaluation = {}
        problem = self._not_finite(measured.pop("finite"))
        line = _train_line(measured, self._prepared.layers)
        line["step_seconds"] = time.perf_counter() - started
        line["data_seconds"] = self._pieces.waited()
        if self._config.on_nonfinite == "skip":
            line["skipped"] = int(problem is not None)
        if self._config.max_bad_examples:
            line["bad_examples"] = _over_processes(self._pieces.bad_examples())
        writer.write(self.step, {"epoch": self._epoch, **line})
        progress.update(
            self.step,
            seconds=line["step_seconds"],
            waited=line["data_seconds"],
            loss=line["train_loss"],
            accuracy=line["train_accuracy"],
        )
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if problem else 0
        if problem and (
            self._config.on_nonfinite == "stop"
            or self._skipped_in_a_row > self._config.max_nonfinite_steps
        ):
            self._end_before(problem)

    def _not_finite(self, finite: dict[str, Any]) -> str | None:
        params = self._state.params
        return describe(
            finite,
            {
                "loss": 0.0,
                **dict.fromkeys(("gradient", "norms", "weights"), params),
                "running averages": self._state.batch_stats,
            },
        )

    def _evaluate(self, writer: metrics.MetricsWriter) -> None:
        """Evaluates and saves, if there is time for it."""
        if jax.process_count() > 1:
            self._save()  # Where one of them ends during it, the others cannot.
        with self._keeping():
            evaluation = self._evaluate_state(self._state, self._interruption)
        if evaluation is not None:
            self.evaluation = evaluation
            writer.write(self.step, {"epoch": self._epoch, **evaluation})
            self._save()

    @contextlib.contextmanager
    def _keeping(self) -> Iterator[None]:
        """Saves the state if data cannot be read, which have not changed it."""
        try:
            yield
        except RunError:
            if jax.process_count() == 1 and self._saved < self.step:
                self._save()
            raise

    def _save(self) -> None:
        self._checkpoints.save(self._state, self.evaluation)
        self._saved = self.step

    @property
    def _epoch(self) -> float:
        return self.step * self._config.batch_size / self._num_train

    def _is_evaluated(self) -> bool:
        """Whether an evaluation follows this step."""
        interval = max(round(self._config.eval_epochs * self._num_train), 1)
        batch_size = self._config.batch_size
        return (
            self.step == self._prepared.num_steps or self.step * batch_size % interval < batch_size
        )

    def _is_saved(self) -> bool:
        """Whether a checkpoint follows this step, apart from that of an evaluation."""
        interval = self._config.checkpoint_steps
        return interval is not None and self.step % interval == 0

    def _is_complete(self) -> bool:
        return self.step == self._prepared.num_steps and bool(self.evaluation)

    def _end_if_told(self) -> None:
        if not self._interruption.reached() or self._is_complete():
            return
        if self._saved < self.step:
            self._save()
        self._checkpoints.wait()
        raise RunError(
            f"interrupted after step {self.step} of {self._prepared.num_steps}, of which there is "
            f"a checkpoint. Go on with {self._same_command}.",
            self._interruption.exit_code,
        )

    def _end_before(self, problem: str) -> None:
        """Ends the run with the state before the last step, which that step has left as it was."""
        before = self.step - 1
        if self._saved < before:
            self._state = self._state.replace(
                step=self._state.step - 1, opt_state=advanced(self._state.opt_state, -1)
            )
            self._save()
        self._checkpoints.wait()
        there_is = f", and there is a checkpoint of step {before}" if before else ""
        pass_over = (
            "--on-nonfinite skip"
            if self._config.on_nonfinite == "stop"
            else f"--max-nonfinite-steps above {self._config.max_nonfinite_steps}"
        )
        raise RunError(
            f"step {self.step} is not finite: {problem}. Nothing of it was kept{there_is}. Look at "
            "the data and the learning rate, of which another needs a new run. To try the step "
            f"again, start {self._same_command}; to pass over it, add {pass_over}."
        )

    @property
    def _same_command(self) -> str:
        option = f" and --workdir {self._prepared.workdir}" if self._config.workdir is None else ""
        return f"the same command{option}"


def _over_processes(number: int) -> int:
    return int(np.sum(multihost_utils.process_allgather(np.asarray(number))))


def _train_line(measured: dict[str, Any], layers: Sequence[str]) -> dict[str, Any]:
    """Makes a line of the record of what a step measured, biases and scales left out."""
    line: dict[str, Any] = {
        "train_loss": float(measured.pop("loss")),
        "train_accuracy": float(measured.pop("accuracy")),
        "learning_rate": float(measured.pop("learning_rate")),
    }
    for name, tree in measured.items():
        by_layer = traverse_util.flatten_dict(tree, sep="/")
        line[name] = {layer: float(by_layer[layer]) for layer in layers}
    return line
