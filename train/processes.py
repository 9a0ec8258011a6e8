"""Several processes, each with devices of its own, that train together."""

import collections
import contextlib
import json
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from train.config import Config
from train.text import first_line

# Codes of errors that no other process is to blame for.
_DEFECTS = frozenset({"INVALID_ARGUMENT", "UNIMPLEMENTED"})


def join(config: Config) -> None:
    """Finds the other processes, where the options or the platform name any.

    It must come before anything else that asks JAX for its devices. Where the others do not come in
    time, it ends the process with a line of its own.

    Raises:
        ValueError: "auto" on a platform that says nothing of other processes; or the processes
            have different numbers of devices.
    """
    if config.coordinator is None:
        return
    _connect(config)
    counts = collections.Counter(device.process_index for device in jax.devices())
    (usual, _), *_ = collections.Counter(counts.values()).most_common()
    for index, count in counts.items():
        if count != usual:
            raise ValueError(
                f"process {index} has {count} devices, but others have {usual}: give each as many."
            )


def _connect(config: Config) -> None:
    # JAX would end the process with a stack trace, so it gets more time than it needs.
    time_out = config.join_seconds + 60
    with _giving_up(config):
        if config.coordinator != "auto":
            jax.distributed.initialize(
                config.coordinator,
                config.num_processes,
                config.process_id,
                initialization_timeout=time_out,
            )
            return
        try:
            jax.distributed.initialize(initialization_timeout=time_out)
        except ValueError as error:
            raise ValueError(
                "--coordinator is auto, but this platform does not tell where the other processes "
                "are (a TPU pod slice, Slurm, Open MPI and Kubernetes do): name --coordinator "
                "HOST:PORT, --num-processes and --process-id."
            ) from error


def leave() -> None:
    """Ends the connection with the others, who all must do so now, too."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def describe(error: Exception) -> str | None:
    """Says what an error of JAX means, if it is no defect: None if it is.

    Args:
        error: what a step or an agreement with the other processes raised.
    """
    code, _, _ = str(error).partition(":")
    if code == "RESOURCE_EXHAUSTED":
        return (
            f"the memory of a device is not enough ({first_line(error)}). A smaller "
            "--microbatch-size or --transfer-size needs less."
        )
    if jax.process_count() == 1 or code in _DEFECTS:
        return None
    return (
        f"process {jax.process_index()} cannot go on without the other processes, of which one has "
        f"ended or cannot be reached ({first_line(error)}). Its own message says why. Start all of "
        "them again with the same commands: the run goes on from its last checkpoint."
    )


@contextlib.contextmanager
def refusing_together() -> Iterator[None]:
    """Raises on every process if one of them raises a ValueError or an OSError inside.

    Raises:
        ValueError: it was raised elsewhere.
    """
    try:
        yield
    except (ValueError, OSError):
        _is_refused(True)
        raise
    if refused := _is_refused(False):
        raise ValueError(refused)


def _is_refused(is_refused: bool) -> str | None:
    """Says which process refuses to start, once all have said whether they do."""
    if jax.process_count() == 1:
        return None
    found = multihost_utils.process_allgather(np.asarray(is_refused))
    if not found.any():
        return None
    return f"process {int(np.argmax(found))} refuses to start: its message says why."


def from_first_process(value: Any) -> Any:
    """Returns what the first process has, which JSON can hold, on every process."""
    if jax.process_count() == 1:
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    # Of the others only the shape counts.
    text = np.resize(text, length)
    return json.loads(multihost_utils.broadcast_one_to_all(text).tobytes())


@contextlib.contextmanager
def _giving_up(config: Config) -> Iterator[None]:
    def give_up() -> None:
        print(f"python -m train: {_absence(config)}", file=sys.stderr, flush=True)
        os._exit(2)

    timer = threading.Timer(config.join_seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _absence(config: Config) -> str:
    if config.num_processes is None:
        missing = "the other processes"
    else:
        others = [str(i) for i in range(config.num_processes) if i != config.process_id]
        missing = f"process {others[0]}" if len(others) == 1 else f"processes {', '.join(others)}"
    return (
        f"--join-seconds is {config.join_seconds}, and in that time {missing} did not come, or not "
        f"all of them, to --coordinator {config.coordinator}: start what is missing, with the same "
        "address, or wait longer."
    )
