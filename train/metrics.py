"""The record of a run: JSON lines for scripts, TensorBoard events for eyes."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import tensorboardX

_LINES = "metrics.jsonl"


class MetricsWriter:
    """Writes scalars to `metrics.jsonl` and to TensorBoard events in the same folder.

    Each line of the file is one call of `write`: the step and the scalars by name. What has one
    scalar per layer, such as the trust ratio, is an object by the layer's path.

    Args:
        folder: the run folder; None for a process whose numbers another one writes.
        done: the step from which a run goes on: lines of later steps are dropped, for they will be
            written again. 0 for a run from its start.
    """

    def __init__(self, folder: Path | None, done: int = 0) -> None:
        self._lines: TextIO | None = None
        if folder is None:
            return
        path = folder / _LINES
        kept = [line for line in read(folder) if line["step"] <= done] if path.exists() else []
        # Renamed into place: a kill leaves the old lines or the new ones.
        rewritten = folder / f".{_LINES}"
        rewritten.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        rewritten.rename(path)
        self._lines = path.open("a", encoding="utf-8", buffering=1)
        self._events = tensorboardX.SummaryWriter(str(folder), purge_step=done + 1)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes the metrics of a step, numbers or flat dictionaries of numbers."""
        if self._lines is None:
            return
        self._lines.write(json.dumps({"step": step, **metrics}) + "\n")
        for tag, value in _flatten(metrics):
            self._events.add_scalar(tag, value, step)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._lines is not None:
            self._lines.close()
            self._events.close()


def read(folder: Path) -> list[dict[str, Any]]:
    """Reads the lines of `metrics.jsonl`; a last one that a kill cut off is left out."""
    with (folder / _LINES).open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.endswith("\n")]


def _flatten(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{layer}", scalar) for layer, scalar in value.items())
        else:
            yield name, value
