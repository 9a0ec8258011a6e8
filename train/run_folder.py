"""The run folder: what is in it, and whether a run may go on in it.

============  ==========================================================================
config.json   the options, what follows from them, devices and versions; written once
metrics.jsonl one line per step and one per evaluation
events.*      the same for TensorBoard
checkpoints/  the last and the best checkpoint, each a folder named by its step
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
from jax.experimental import multihost_utils

from train.config import Config

CHECKPOINTS = "checkpoints"
_CONFIG = "config.json"
# What may change between the parts of a run: nothing that its numbers depend on.
_MAY_CHANGE = frozenset(
    {"workdir", "data_dir", "resume", "coordinator", "num_processes", "process_id"}
)


def open_run_folder(config: Config, num_train: int, devices: Sequence[jax.Device]) -> Path:
    """Makes the run folder, or finds that the run in it may go on.

    Args:
        config: the options.
        num_train: examples of the training split.
        devices: those of all processes, for the record.

    Returns:
        The folder, which holds the configuration's record.

    Raises:
        ValueError: the folder holds something else, or a run with other options.
    """
    record = _record(config, num_train, devices)
    workdir = config.workdir
    if workdir is None:
        workdir = Path("runs") / f"{config.config}-{datetime.now():%Y%m%d-%H%M%S}"
    unfinished = workdir / f".{_CONFIG}"
    is_new = not (workdir.exists() and any(path != unfinished for path in workdir.iterdir()))
    if not is_new:
        _refuse_other_run(config, workdir, record)
    if jax.process_count() > 1:
        # All processes look before one of them writes, so that they come to the same conclusion.
        multihost_utils.sync_global_devices("run folder")
    if is_new and jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        # Renamed into place: a kill leaves the whole record or none.
        unfinished.write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")
        unfinished.rename(workdir / _CONFIG)
    return workdir


def _refuse_other_run(config: Config, workdir: Path, record: dict[str, Any]) -> None:
    if config.resume == "never":
        raise ValueError(
            f"--workdir is {workdir}, but that folder is not empty: name a new one, remove it, or "
            "let the run in it go on with --resume auto."
        )
    if not (workdir / _CONFIG).exists():
        raise ValueError(
            f"--workdir is {workdir}, but that folder is not empty and holds no {_CONFIG} of a "
            "run: name a new one, or remove it."
        )
    before = json.loads((workdir / _CONFIG).read_text(encoding="utf-8"))
    now = json.loads(json.dumps(record, default=str))
    for field in dataclasses.fields(config):
        name = field.name
        if name not in _MAY_CHANGE and before.get(name) != now[name]:
            raise ValueError(
                f"--workdir is {workdir}, which holds a run with --{name.replace('_', '-')} "
                f"{before.get(name)}, but now it is {now[name]}: name a new folder, or let the "
                "run go on with the options that it began with."
            )


def _record(config: Config, num_train: int, devices: Sequence[jax.Device]) -> dict[str, Any]:
    return {
        **dataclasses.asdict(config),
        "learning_rate": config.base_learning_rate,
        "peak_learning_rate": config.peak_learning_rate,
        "num_train": num_train,
        "num_steps": config.num_steps(num_train),
        "devices": [str(device) for device in devices],
        "versions": {
            package: metadata.version(package)
            for package in ("jax", "jaxlib", "flax", "optax", "numpy")
        },
    }
