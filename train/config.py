"""Every option of a training run, and which values make sense together."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from tyro.conf import Positional, Suppress

from train.data import DATASETS

OptimizerName = Literal["clars", "lars", "sgd"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Train a network with a large batch on all local devices.

    All sizes count examples over all devices together; each device takes an equal share.

    Attributes:
        config: Named configuration that gives every option below its default. The file
            train/configs/NAME.py says what to expect of it.
        optimizer: clars: layer-wise rates from the mean norm of the per-example gradients. lars:
            from the norm of the mean gradient (plus decay). sgd: the same rate for every layer.
            All have heavy-ball momentum.
        learning_rate: Base learning rate, for a batch of 256 examples; the peak is this times
            batch-size / 256. None: what the configuration names for the optimizer.
        warmup_epochs: Epochs in which the learning rate rises linearly to the peak; after them it
            falls with power 2 to zero.
        batch_size: Examples per step. The devices must divide it.
        epochs: Length of the run, in passes over the training split.
        weight_decay: Coefficient of the weights in the gradient. Biases and BatchNorm scales do not
            decay.
        momentum: Decay rate of the momentum buffer, per step.
        norm_momentum: Decay rate of BatchNorm's running averages, per step. A run of few steps
            wants a small one, and large batches allow it.
        group_size: Only for clars: consecutive examples of a device whose mean gradient counts as
            one example's. With 1 it is the paper's formula, with 8 what its authors' code does.
        num_norm_examples: Only for clars: examples of each batch whose gradient norms are taken, in
            equal parts on each device; the gradient is that of the whole batch. None: all.
        microbatch_size: Examples that go through the network at a time, to save memory; BatchNorm
            takes its statistics over these. It must divide the batch, and the devices it. None:
            the whole batch.
        seed: Seed of the initial parameters and of the order of the examples. The same seed gives
            the same numbers.
        workdir: Run folder, where configuration, metrics, curves and checkpoint go. It must be
            empty, or not there yet. None: runs/CONFIG-TIME.
        data_dir: Folder of tensorflow-datasets, where the data set is prepared once. None: what
            the variable TFDS_DATA_DIR names, or else ~/tensorflow_datasets.
        dataset: name of the data set; set by the named configuration alone.
        model: name of the network; likewise.
        tuned_learning_rates: `learning_rate` by optimizer where none is given; likewise.
    """

    config: Positional[Literal["digits"]] = "digits"
    optimizer: OptimizerName = "clars"
    learning_rate: float | None = None
    warmup_epochs: float = 0.0
    batch_size: int = 256
    epochs: float = 10.0
    weight_decay: float = 1e-4
    momentum: float = 0.9
    norm_momentum: float = 0.9
    group_size: int = 1
    num_norm_examples: int | None = None
    microbatch_size: int | None = None
    seed: int = 0
    workdir: Path | None = None
    data_dir: Path | None = None
    dataset: Suppress[str] = "digits"
    model: Suppress[str] = "resnet8"
    tuned_learning_rates: Suppress[Mapping[OptimizerName, float]] = dataclasses.field(
        default_factory=dict
    )

    @property
    def base_learning_rate(self) -> float:
        """`learning_rate`, or what the configuration names for the optimizer."""
        if self.learning_rate is None:
            return self.tuned_learning_rates[self.optimizer]
        return self.learning_rate

    @property
    def peak_learning_rate(self) -> float:
        """The largest learning rate of the run, in proportion to the batch."""
        return self.base_learning_rate * self.batch_size / 256

    @property
    def steps_per_epoch(self) -> float:
        """Steps in one pass over the training split; batches run on across its end."""
        return DATASETS[self.dataset].num_train / self.batch_size

    @property
    def num_steps(self) -> int:
        """Steps of the whole run."""
        return math.ceil(self.epochs * self.steps_per_epoch)

    def validate(self, num_devices: int) -> None:
        """Checks the options before anything is written.

        Args:
            num_devices: the devices that share the batch.

        Raises:
            ValueError: names the option, what came, what is allowed and what to do.
        """
        _at_least(
            1,
            batch_size=self.batch_size,
            group_size=self.group_size,
            num_norm_examples=self.num_norm_examples,
            microbatch_size=self.microbatch_size,
        )
        _at_least(
            0, seed=self.seed, weight_decay=self.weight_decay, warmup_epochs=self.warmup_epochs
        )
        _positive(epochs=self.epochs, learning_rate=self.learning_rate)
        _decay_rate(momentum=self.momentum, norm_momentum=self.norm_momentum)
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"--warmup-epochs is {self.warmup_epochs:g}, but must be less than --epochs, "
                f"{self.epochs:g}: warm up for less, or train for longer."
            )
        self._validate_sizes(num_devices)
        if self.workdir is not None:
            refuse_used_workdir(self.workdir)

    def _validate_sizes(self, num_devices: int) -> None:
        """Checks the sizes that divide one another."""
        num_train = DATASETS[self.dataset].num_train
        if self.batch_size > num_train:
            raise ValueError(
                f"--batch-size is {self.batch_size}, but the training split of {self.dataset} has "
                f"{num_train} examples: choose at most {num_train // num_devices * num_devices}."
            )
        devices = "the number of devices"
        _multiple_of(num_devices, devices, "batch_size", self.batch_size, largest=num_train)
        at_a_time = self.batch_size
        if self.microbatch_size is not None:
            at_a_time = self.microbatch_size
            self._at_most_the_batch("microbatch_size", at_a_time)
            _multiple_of(num_devices, devices, "microbatch_size", at_a_time, self.batch_size)
            if self.batch_size % at_a_time:
                raise ValueError(
                    f"--microbatch-size is {at_a_time}, but must divide --batch-size, "
                    f"{self.batch_size}: {_divisors(self.batch_size, num_devices)} would do."
                )
        share = at_a_time // num_devices
        if share % self.group_size:
            raise ValueError(
                f"--group-size is {self.group_size}, but must divide the {share} examples that go "
                f"through a device at a time: {_divisors(share)} would do."
            )
        if self.num_norm_examples is not None:
            self._at_most_the_batch("num_norm_examples", self.num_norm_examples)
            _multiple_of(
                num_devices * self.group_size,
                devices if self.group_size == 1 else f"{devices} times --group-size",
                "num_norm_examples",
                self.num_norm_examples,
                self.batch_size,
            )

    def _at_most_the_batch(self, name: str, value: int) -> None:
        if value > self.batch_size:
            raise ValueError(
                f"{_option(name)} is {value}, but must be at most --batch-size, "
                f"{self.batch_size}: lower it."
            )


def refuse_used_workdir(workdir: Path) -> None:
    """Refuses a run folder that holds something: a run never writes over another."""
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"--workdir is {workdir}, but that is a file: name a folder.")
    if workdir.exists() and any(workdir.iterdir()):
        raise ValueError(
            f"--workdir is {workdir}, but that folder is not empty: name a new one, or remove it."
        )


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _at_least(minimum: int, **options: float | None) -> None:
    for name, value in options.items():
        if value is not None and not (math.isfinite(value) and value >= minimum):
            raise ValueError(
                f"{_option(name)} is {value:g}, but must be at least {minimum}: raise it."
            )


def _positive(**options: float | None) -> None:
    for name, value in options.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(
                f"{_option(name)} is {value:g}, but must be a finite number above 0: change it."
            )


def _decay_rate(**options: float) -> None:
    for name, value in options.items():
        if not 0 <= value < 1:
            raise ValueError(
                f"{_option(name)} is {value:g}, but must be at least 0 and less than 1: "
                "0.9 is usual."
            )


def _multiple_of(unit: int, unit_name: str, name: str, value: int, largest: int) -> None:
    """Checks that each device gets the same whole number of groups."""
    if value % unit == 0:
        return
    below = value // unit * unit
    sizes = [size for size in (below, below + unit) if 0 < size <= largest]
    raise ValueError(
        f"{_option(name)} is {value}, but must be a multiple of {unit}, {unit_name}: "
        f"{_either(sizes)} would do."
    )


def _divisors(total: int, unit: int = 1) -> str:
    return _either([size for size in range(unit, total + 1, unit) if total % size == 0])


def _either(sizes: list[int]) -> str:
    *others, last = map(str, sizes)
    return f"{', '.join(others)} or {last}" if others else last
