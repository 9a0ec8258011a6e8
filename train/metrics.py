"""The record of a run: JSON lines for scripts, TensorBoard events for eyes."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import tensorboardX

from train.errors import RunError

_LINES = "metrics.jsonl"


class MetricsWriter:
    """Writes scalars to `metrics.jsonl` and to TensorBoard events in the same folder.

    Each line of the file is one call of `write`: the step and the scalars by name. What has one
    scalar per layer, such as the trust ratio, is an object by the layer's path.

    Args:
        folder: the run folder; None for a process whose numbers another one writes.
        done: the step from which a run goes on: lines of later steps are dropped, for they will be
            written again. 0 for a run from its start.
        evaluated: whether the evaluation that may follow that step is done; if not, its line is
            dropped, too.
    """

    def __init__(self, folder: Path | None, done: int = 0, evaluated: bool = True) -> None:
        self._lines: TextIO | None = None
        if folder is None:
            return
        path = folder / _LINES
        kept = [
            line
            for line in (read(folder) if path.exists() else [])
            if line["step"] < done or (line["step"] == done and (evaluated or not is_eval(line)))
        ]
        # Renamed into place: a kill leaves the old lines or the new ones.
        rewritten = folder / f".{_LINES}"
        rewritten.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        rewritten.rename(path)
        self._lines = path.open("a", encoding="utf-8", buffering=1)
        self._events = tensorboardX.SummaryWriter(str(folder), purge_step=done + 1)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes the metrics of a step, numbers or flat dictionaries of numbers.

        What is not finite becomes null, because JSON has no name for it, and no event.
        """
        if self._lines is None:
            return
        line = {"step": step, **_with_nulls(metrics)}
        self._lines.write(json.dumps(line, allow_nan=False) + "\n")
        for tag, value in _flatten(metrics):
            if math.isfinite(value):
                self._events.add_scalar(tag, value, step)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *error: object) -> None:
        if self._lines is not None:
            self._lines.close()
            self._events.close()


def read(folder: Path) -> list[dict[str, Any]]:
    """Reads the lines of `metrics.jsonl`; a last one that a kill cut off is left out.

    Raises:
        RunError: another line is damaged.
    """
    path = folder / _LINES
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), 1):
        if line.endswith("\n"):
            try:
                found.append(json.loads(line))
            except ValueError as error:
                raise RunError(
                    f"{path} is damaged in line {number} ({error}): take that line out, and go on "
                    "with the same command."
                ) from error
    return found


def is_eval(line: Mapping[str, Any]) -> bool:
    """Whether a line is that of an evaluation."""
    return "test_loss" in line


def _with_nulls(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _with_nulls(value)
        if isinstance(value, Mapping)
        else (value if math.isfinite(value) else None)
        for name, value in metrics.items()
    }


def _flatten(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{layer}", scalar) for layer, scalar in value.items())
        else:
            yield name, value
