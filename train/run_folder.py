"""The run folder: what is in it, and whether a run may go on in it.

============  ==========================================================================
config.json   the options, what follows from them, devices and versions; written once
metrics.jsonl one line per step and one per evaluation
events.*      the same for TensorBoard
checkpoints/  the last two checkpoints and the best one, each a folder named by its step
curves.png    loss, accuracy, learning rate and trust ratios, at the end of the run
.lock         what the first process of a run has locked as long as it lives
============  ==========================================================================
"""

import contextlib
import dataclasses
import errno
import fcntl
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from train.build import accumulation_of
from train.config import Config
from train.data import Dataset
from train.errors import remedy_of
from train.processes import refusing_together

CHECKPOINTS = "checkpoints"
_CONFIG = "config.json"
_UNFINISHED = f".{_CONFIG}"
_LOCK = ".lock"
_RUNS = Path("runs")
# File systems that have no locks.
_NO_LOCKS = frozenset({errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS})
# The descriptor of the lock that this process holds: one, for it trains in one folder at a time.
# Nothing closes it at the end of a run, so that it is held until the process ends, in any way.
_held: list[int] = []
# What follows from the options, the data and the devices, and may not change either.
_CONSEQUENCES = {
    "dataset_version": "the data set",
    "num_train": "a number of training examples of",
    "norm_batch_size": "a number of examples in a BatchNorm batch of",
}
# What may change between the parts of a run.
_MAY_CHANGE = frozenset(
    {
        *("workdir", "data_dir", "resume", "coordinator", "num_processes", "process_id"),
        *("join_seconds", "checkpoint_steps", "max_bad_examples"),
        *("on_nonfinite", "max_nonfinite_steps"),
    }
)


def open_run_folder(
    config: Config, dataset: Dataset, num_train: int, devices: Sequence[jax.Device]
) -> Path:
    """Makes the run folder, or finds that the run in it may go on.

    Every process calls it, and where one of them finds something wrong, all raise. The first one
    keeps other runs out of the folder until it ends or opens another one.

    Args:
        config: the options.
        dataset: the data set.
        num_train: examples of the training split.
        devices: those of all processes.

    Returns:
        The folder, which holds the configuration's record.

    Raises:
        ValueError: the folder holds something else, or a run with other options, or one that
            another process trains now; or it cannot be written to; or a process has other options
            than the first one, or does not see its folder.
    """
    record = _record(config, dataset, num_train, devices)
    workdir = config.workdir
    with contextlib.ExitStack() as refused:
        refused.callback(_unlock)
        # The others look when it is there: a network's file system may remember that it was not.
        with refusing_together(), _refusing_what_cannot_be_written(workdir or _RUNS):
            # Several processes have been told one.
            workdir = workdir or _new_folder(config.config)
            if jax.process_index() == 0:
                _make(config, workdir, record)
        with refusing_together():
            _check(workdir, record)
        refused.pop_all()
    return workdir


@contextlib.contextmanager
def _refusing_what_cannot_be_written(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"the run folder, {folder}, cannot be made or written to ({error.strerror}): "
            f"{remedy_of(error.errno)}, or name another one with --workdir."
        ) from error


def _new_folder(name: str) -> Path:
    """Makes a folder that no other run has, not even one that starts in the same second."""
    name = f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    for number in itertools.count(1):
        folder = _RUNS / (name if number == 1 else f"{name}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            break
    return folder


def _make(config: Config, workdir: Path, record: dict[str, Any]) -> None:
    """Locks the folder and makes it with its record, unless a run can go on in it."""
    is_new = not workdir.exists() or all(
        path.name in (_UNFINISHED, _LOCK) for path in workdir.iterdir()
    )
    if not is_new and config.resume == "never":
        raise ValueError(
            f"--workdir is {workdir}, but that folder is not empty: name a new one, remove it, or "
            "let the run in it go on with --resume auto."
        )
    if not is_new and not (workdir / _CONFIG).exists():
        raise ValueError(
            f"--workdir is {workdir}, but that folder is not empty and holds no {_CONFIG} of a "
            "run: name a new one, or remove it."
        )
    workdir.mkdir(parents=True, exist_ok=True)
    _lock(workdir)
    if not (workdir / _CONFIG).exists():
        # Renamed into place: a kill leaves the whole record or none.
        unfinished = workdir / _UNFINISHED
        unfinished.write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")
        unfinished.rename(workdir / _CONFIG)


def _lock(workdir: Path) -> None:
    """Keeps other processes from training in the folder as long as this one lives."""
    _unlock()
    file = os.open(workdir / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    _held.append(file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"--workdir is {workdir}, but another process is training in it: wait until it ends, "
            "end it, or name another folder."
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def _unlock() -> None:
    while _held:
        os.close(_held.pop())


def _check(workdir: Path, record: dict[str, Any]) -> None:
    """Checks that the run is the one that is on record in its folder."""
    if not (workdir / _CONFIG).exists():
        raise ValueError(
            f"--workdir is {workdir}, but the {_CONFIG} that process 0 has written is not there: "
            "name a folder on a file system that all processes see."
        )
    try:
        before = json.loads((workdir / _CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{workdir / _CONFIG} is damaged ({error}): name a new --workdir, or put it back."
        ) from error
    now = json.loads(json.dumps(record, default=str))
    for name in [field.name for field in dataclasses.fields(Config)] + list(_CONSEQUENCES):
        if name not in _MAY_CHANGE and before.get(name) != now[name]:
            what = _CONSEQUENCES.get(name, "--" + name.replace("_", "-"))
            raise ValueError(
                f"--workdir is {workdir}, which holds a run with {what} {before.get(name)}, but "
                f"now it is {now[name]}: name a new folder, or let the run go on as it began."
            )


def _record(
    config: Config, dataset: Dataset, num_train: int, devices: Sequence[jax.Device]
) -> dict[str, Any]:
    at_a_time = accumulation_of(config, len(devices)).at_a_time
    return {
        **dataclasses.asdict(config),
        "learning_rate": config.base_learning_rate,
        "peak_learning_rate": config.peak_learning_rate,
        "dataset_version": dataset.version,
        "num_train": num_train,
        "num_steps": config.num_steps(num_train),
        "norm_batch_size": at_a_time * (config.bn_group or len(devices)),
        "devices": [str(device) for device in devices],
        "versions": {
            package: metadata.version(package)
            for package in ("jax", "jaxlib", "flax", "optax", "numpy")
        },
    }
