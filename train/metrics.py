"""The record of a run: JSON lines for scripts, TensorBoard events for eyes."""

import contextlib
import json
import math
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

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

    Raises:
        OSError: names the file that cannot be written; every method raises it, too.
    """

    def __init__(self, folder: Path | None, done: int = 0, evaluated: bool = True) -> None:
        self._lines: _File | None = None
        if folder is None:
            return
        path = folder / _LINES
        if done and not path.exists():
            print(f"{path} is missing: the record of the run begins after step {done}.", flush=True)
        kept = [
            line
            for line in (read(folder) if path.exists() else [])
            if line["step"] < done or (line["step"] == done and (evaluated or not is_eval(line)))
        ]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        # Renamed into place: a kill leaves the old lines or the new ones.
        rewritten = folder / f".{_LINES}"
        with _naming(path):
            rewritten.write_text(text, encoding="utf-8")
            rewritten.rename(path)
        self._lines = _File(path)
        self._events = _Events(folder, done)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes the metrics of a step, numbers or flat dictionaries of numbers.

        What is not finite becomes null, because JSON has no name for it, and no event.
        """
        if self._lines is None:
            return
        line = {"step": step, **_with_nulls(metrics)}
        self._lines.write((json.dumps(line, allow_nan=False) + "\n").encode())
        self._events.write(
            step, {tag: value for tag, value in _flatten(metrics) if math.isfinite(value)}
        )

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *error: object) -> None:
        if self._lines is not None:
            try:
                self._lines.close()
            finally:
                self._events.close()


class _Events:
    """A file of events for TensorBoard: a new one for each part of a run.

    tensorboardX has a writer, too, but its thread keeps an error of the disk to itself, and then
    the run waits for it for ever.
    """

    def __init__(self, folder: Path, done: int) -> None:
        # TensorBoard reads those with this in their name, in alphabetical order.
        self._file = _File(folder / f"events.out.tfevents.{time.time_ns()}")
        self._append(file_version="brain.Event:2")
        # What an earlier part has written of later steps is not shown.
        self._append(step=done + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._append(step=step, summary=Summary(value=values))

    def close(self) -> None:
        self._file.close()

    def _append(self, **contents: Any) -> None:
        """Appends an event in TFRecord's frame: length and contents, each with its checksum."""
        event = Event(wall_time=time.time(), **contents).SerializeToString()
        length = struct.pack("<Q", len(event))
        checksums = (struct.pack("<I", masked_crc32c(part)) for part in (length, event))
        self._file.write(length + next(checksums) + event + next(checksums))


class _File:
    """A file that grows by whole records."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # Without a buffer the system refuses at once what it has no room for, and only once.
        with _naming(path):
            self._file = path.open("ab", buffering=0)

    def write(self, record: bytes) -> None:
        with _naming(self._path):
            while record:
                record = record[self._file.write(record) :]

    def close(self) -> None:
        with _naming(self._path):
            self._file.close()


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Has an error name the file, as one that comes from writing does not."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


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
