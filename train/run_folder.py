"""The run folder: what is in it, and whether a run may go on in it.

============  ==========================================================================
config.json   the options, what follows from them, devices and versions; written once
metrics.jsonl one line per step and one per evaluation
events.*      the same for TensorBoard
checkpoints/  the last two checkpoints and the best one, each a folder named by its step
curves.png    loss, accuracy, learning rate and trust ratios, at the end of the run
============  ==========================================================================
"""

import dataclasses
import json
from collections.abc import Sequence
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from train.build import accumulation_of
from train.config import Config
from train.data import Dataset
from train.processes import refusing_together

CHECKPOINTS = "checkpoints"
_CONFIG = "config.json"
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

    Every process calls it, and where one of them finds something wrong, all raise.

    Args:
        config: the options.
        dataset: the data set.
        num_train: examples of the training split.
        devices: those of all processes.

    Returns:
        The folder, which holds the configuration's record.

    Raises:
        ValueError: the folder holds something else, or a run with other options; or a process has
            other options than the first one, or does not see its folder.
    """
    record = _record(config, dataset, num_train, devices)
    workdir = config.workdir
    if workdir is None:
        workdir = Path("runs") / f"{config.config}-{datetime.now():%Y%m%d-%H%M%S}"
    # The others look when it is there: a network's file system may remember that it was not.
    with refusing_together():
        if jax.process_index() == 0:
            _make(config, workdir, record)
    with refusing_together():
        _check(workdir, record)
    return workdir


def _make(config: Config, workdir: Path, record: dict[str, Any]) -> None:
    """Makes the folder with its record, unless a run can go on in it."""
    unfinished = workdir / f".{_CONFIG}"
    if not (workdir.exists() and any(path != unfinished for path in workdir.iterdir())):
        workdir.mkdir(parents=True, exist_ok=True)
        # Renamed into place: a kill leaves the whole record or none.
        unfinished.write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")
        unfinished.rename(workdir / _CONFIG)
    elif config.resume == "never":
        raise ValueError(
            f"--workdir is {workdir}, but that folder is not empty: name a new one, remove it, or "
            "let the run in it go on with --resume auto."
        )
    elif not (workdir / _CONFIG).exists():
        raise ValueError(
            f"--workdir is {workdir}, but that folder is not empty and holds no {_CONFIG} of a "
            "run: name a new one, or remove it."
        )


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
