"""The record of a run: JSON lines for scripts, TensorBoard events for eyes."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import tensorboardX


class MetricsWriter:
    """Writes scalars to `metrics.jsonl` and to TensorBoard events in the same folder.

    Each line of the file is one call of `write`: the step and the scalars by name. What has one
    scalar per layer, such as the trust ratio, is an object by the layer's path.
    """

    def __init__(self, folder: Path) -> None:
        self._lines = (folder / "metrics.jsonl").open("w", encoding="utf-8", buffering=1)
        self._events = tensorboardX.SummaryWriter(str(folder))

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes the metrics of a step, numbers or flat dictionaries of numbers."""
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
        self._lines.close()
        self._events.close()


def read(folder: Path) -> list[dict[str, Any]]:
    """Reads the lines of `metrics.jsonl`."""
    with (folder / "metrics.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _flatten(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{layer}", scalar) for layer, scalar in value.items())
        else:
            yield name, value
