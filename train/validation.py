"""Which options make sense, alone, with one another and with the devices and the data."""

import math
import re

import numpy as np

from train.build import network_of, optimizer_of, schedule_of
from train.config import Config
from train.data import Dataset
from train.text import listed

# More than anybody's; it keeps the number of steps in range.
MOST_EPOCHS = 1_000_000
# In float32, in which steps are taken.
_LARGEST = float(np.finfo(np.float32).max)


def validate(config: Config, dataset: Dataset, num_devices: int, num_processes: int = 1) -> None:
    """Checks the options before a split is opened or anything is written.

    Args:
        config: the options.
        dataset: the data set.
        num_devices: the devices that share the batch, over all processes.
        num_processes: the processes that share the devices.

    Raises:
        ValueError: names the option, what came, what is allowed and what to do.
    """
    _at_least(
        1,
        image_size=config.image_size,
        bn_group=config.bn_group,
        batch_size=config.batch_size,
        group_size=config.group_size,
        num_norm_examples=config.num_norm_examples,
        microbatch_size=config.microbatch_size,
        transfer_size=config.transfer_size,
        checkpoint_steps=config.checkpoint_steps,
        max_nonfinite_steps=config.max_nonfinite_steps,
    )
    _at_least(
        0,
        max_bad_examples=config.max_bad_examples,
        seed=config.seed,
        weight_decay=config.weight_decay,
        warmup_epochs=config.warmup_epochs,
        end_learning_rate=config.end_learning_rate,
    )
    _positive(
        epochs=config.epochs,
        eval_epochs=config.eval_epochs,
        learning_rate=config.learning_rate,
        trust_coefficient=config.trust_coefficient,
        max_trust_ratio=config.max_trust_ratio,
    )
    for epoch in config.decay_epochs:
        _positive(decay_epochs=epoch)
    for name in ("workdir", "data_dir"):
        path = getattr(config, name)
        if path is not None and re.match(r"[a-z][a-z0-9+.-]+:/", str(path)):
            raise ValueError(
                f"{_option(name)} is {path}, but must be a path, not an address: mount a file "
                "system that has it."
            )
    if config.epochs > MOST_EPOCHS:
        raise ValueError(
            f"--epochs is {config.epochs:g}, but must be at most {MOST_EPOCHS:,}: lower it."
        )
    _below_one(
        "0.9 is usual",
        momentum=config.momentum,
        norm_momentum=config.norm_momentum,
    )
    _below_one("0.999 is usual", ema_decay=config.ema_decay)
    _below_one(
        "0.1 is usual",
        dropout_rate=config.dropout_rate,
        label_smoothing=config.label_smoothing,
    )
    if config.seed >= 2**32:
        raise ValueError(f"--seed is {config.seed}, but must be less than 2^32: lower it.")
    if config.learning_rate is None and config.optimizer not in config.learning_rates:
        raise ValueError(
            f"--learning-rate is missing: the configuration {config.config} names none for "
            f"{config.optimizer}, only for {listed(config.learning_rates, 'or')}. Give one, for a "
            "batch of 256 examples."
        )
    if config.peak_learning_rate > _LARGEST:
        raise ValueError(
            f"--learning-rate is {config.base_learning_rate:g}, which for a batch of "
            f"{config.batch_size} is infinite in float32: lower it."
        )
    _validate_warmup(config)
    _validate_sizes(config, num_devices)
    # The makers of network and optimizer say themselves what they do not take.
    network_of(config, dataset, num_devices)
    optimizer = optimizer_of(config, config.peak_learning_rate, num_steps=1)
    for name, is_given in {
        "group_size": config.group_size > 1,
        "num_norm_examples": config.num_norm_examples is not None,
    }.items():
        if is_given and not optimizer.needs_norms:
            raise ValueError(
                f"{_option(name)} is {getattr(config, name)}, but {config.optimizer} needs no "
                "norms of per-example gradients: leave it out."
            )
    _validate_processes(config, num_processes)


def validate_with_data(config: Config, num_train: int) -> None:
    """Checks the options against the training split, once it is open.

    Args:
        config: the options.
        num_train: examples of the training split.

    Raises:
        ValueError: as `validate`.
    """
    if config.batch_size > num_train:
        raise ValueError(
            f"--batch-size is {config.batch_size}, but the training split of {config.dataset} has "
            f"{num_train} examples: choose at most as many."
        )
    if config.num_steps(num_train) < 1:
        raise ValueError(
            f"--epochs is {config.epochs:g}, which is no step of {config.batch_size} examples: "
            "train for longer."
        )
    schedule_of(config, num_train)


def _validate_warmup(config: Config) -> None:
    if config.warmup_epochs >= config.epochs:
        raise ValueError(
            f"--warmup-epochs is {config.warmup_epochs:g}, but must be less than --epochs, "
            f"{config.epochs:g}: warm up for less, or train for longer."
        )
    if config.optimizer in ("lena", "tvlars") and config.warmup_epochs > 0:
        raise ValueError(
            f"--warmup-epochs is {config.warmup_epochs:g}, but {config.optimizer} brings what "
            "takes the place of warm-up: set it to 0."
        )
    if config.optimizer == "tvlars" and config.schedule != "constant":
        raise ValueError(
            f"--schedule is {config.schedule}, but tvlars has one of its own: choose constant, "
            "with --end-learning-rate 0."
        )


def _validate_sizes(config: Config, num_devices: int) -> None:
    """Checks the sizes that divide one another."""
    devices = "the number of devices"
    _multiple_of(num_devices, devices, "batch_size", config.batch_size)
    if config.bn_group is not None:
        _divides("bn_group", config.bn_group, devices, num_devices)
    piece_size = config.batch_size
    if config.transfer_size is not None:
        piece_size = config.transfer_size
        _at_most_the_batch(config, "transfer_size", piece_size)
        _multiple_of(num_devices, devices, "transfer_size", piece_size, config.batch_size)
        _divides("transfer_size", piece_size, "--batch-size", config.batch_size, num_devices)
    share = piece_size // num_devices
    if config.microbatch_size is not None and config.microbatch_size < share:
        name = "the share of a device" + ("" if config.transfer_size is None else " in a transfer")
        _divides("microbatch_size", config.microbatch_size, name, share)
        share = config.microbatch_size
    if share % config.group_size:
        raise ValueError(
            f"--group-size is {config.group_size}, but must divide the {share} examples that go "
            f"through a device at a time: {_divisors(share)} would do."
        )
    if config.num_norm_examples is not None:
        _at_most_the_batch(config, "num_norm_examples", config.num_norm_examples)
        _multiple_of(
            num_devices * config.group_size,
            devices if config.group_size == 1 else f"{devices} times --group-size",
            "num_norm_examples",
            config.num_norm_examples,
            config.batch_size,
        )


def _validate_processes(config: Config, num_processes: int) -> None:
    if num_processes > 1 and config.workdir is None:
        raise ValueError(
            "--workdir is missing: several processes need to be told one run folder, on a file "
            "system that all of them see."
        )
    if config.workdir is not None and config.workdir.exists() and not config.workdir.is_dir():
        raise ValueError(f"--workdir is {config.workdir}, but that is a file: name a folder.")


def validate_cluster(config: Config) -> None:
    """Checks the options that say where the other processes are, before they are looked for.

    Raises:
        ValueError: as `validate`.
    """
    count, index = config.num_processes, config.process_id
    _at_least(1, join_seconds=config.join_seconds)
    given = {"num_processes": count, "process_id": index}
    if config.coordinator in (None, "auto"):
        for name, value in given.items():
            if value is not None:
                raise ValueError(
                    f"{_option(name)} is {value}, but --coordinator is {config.coordinator}: "
                    "give the coordinator's HOST:PORT with it, or leave it out."
                )
        return
    if count is None or index is None:
        missing = _option("num_processes" if count is None else "process_id")
        raise ValueError(f"{missing} is missing: --coordinator HOST:PORT needs it.")
    _at_least(1, num_processes=count)
    _at_least(0, process_id=index)
    if index >= count:
        raise ValueError(
            f"--process-id is {index}, but must be less than --num-processes, {count}: they count "
            "from 0."
        )
    host, _, port = config.coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(
            f"--coordinator is {config.coordinator!r}, but must be HOST:PORT or auto: name the "
            "host of process 0 and a free port there."
        )


def _at_most_the_batch(config: Config, name: str, value: int) -> None:
    if value > config.batch_size:
        raise ValueError(
            f"{_option(name)} is {value}, but must be at most --batch-size, "
            f"{config.batch_size}: lower it."
        )


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _at_least(minimum: int, **options: float | None) -> None:
    for name, value in options.items():
        if value is not None and not minimum <= value <= _LARGEST:
            raise ValueError(
                f"{_option(name)} is {value:g}, but must be from {minimum} to "
                f"{_LARGEST:.1e}: change it."
            )


def _positive(**options: float | None) -> None:
    for name, value in options.items():
        if value is not None and not 0 < value <= _LARGEST:
            raise ValueError(
                f"{_option(name)} is {value:g}, but must be above 0 and at most "
                f"{_LARGEST:.1e}: change it."
            )


def _below_one(remedy: str, **options: float | None) -> None:
    for name, value in options.items():
        if value is not None and not 0 <= value < 1:
            raise ValueError(
                f"{_option(name)} is {value:g}, but must be at least 0 and less than 1: {remedy}."
            )


def _multiple_of(
    unit: int, unit_name: str, name: str, value: int, largest: float = math.inf
) -> None:
    """Checks that each device gets the same whole number of groups."""
    if value % unit == 0:
        return
    below = value // unit * unit
    sizes = [size for size in (below, below + unit) if 0 < size <= largest]
    raise ValueError(
        f"{_option(name)} is {value}, but must be a multiple of {unit}, {unit_name}: "
        f"{listed(sizes, 'or')} would do."
    )


def _divides(name: str, value: int, total_name: str, total: int, unit: int = 1) -> None:
    if total % value:
        raise ValueError(
            f"{_option(name)} is {value}, but must divide {total_name}, {total}: "
            f"{_divisors(total, unit)} would do."
        )


def _divisors(total: int, unit: int = 1) -> str:
    return listed((size for size in range(unit, total + 1, unit) if total % size == 0), "or")
