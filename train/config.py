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

    All sizes count examples over all devices together: each device takes an equal share.
    """

    config: Positional[Literal["digits"]] = "digits"
    """Named configuration that gives every option below its default: train/configs/NAME.py says
    what to expect of it."""

    optimizer: OptimizerName = "clars"
    """clars: layer-wise rates from the mean norm of the per-example gradients. lars: from the norm
    of the mean gradient (plus decay). sgd: SGD with momentum, the same rate for every layer."""

    learning_rate: float | None = None
    """Base learning rate, for a batch of 256 examples: the peak is this times batch-size / 256.
    None: what the configuration names for the optimizer."""

    warmup_epochs: float = 0.0
    """Epochs of linear warm-up to the peak; after it the rate falls with power 2 to zero."""

    batch_size: int = 256
    """Examples per step. The devices must divide it."""

    epochs: float = 10.0
    """Length of the run, in passes over the training split."""

    weight_decay: float = 1e-4
    """Coefficient of the decay that is added to the gradient. Biases and BatchNorm scales have
    none."""

    momentum: float = 0.9
    """Decay rate of the heavy-ball momentum buffer."""

    group_size: int = 1
    """clars only: consecutive examples whose mean gradient counts as one example's. 1 is the
    paper's formula, 8 what its authors' code does. A group lies on one device."""

    num_norm_examples: int | None = None
    """clars only: examples of each step's batch whose gradient norms are taken; the gradient is
    always that of the whole batch. None: all. The devices must divide it."""

    microbatch_size: int | None = None
    """Examples that go through the network at a time, to save memory; BatchNorm takes its
    statistics over these. None: the whole batch. It must divide the batch, and the devices it."""

    seed: int = 0
    """Seed of the initial parameters and of the order of the examples. Same seed, same numbers."""

    workdir: Path | None = None
    """Run folder: configuration, metrics, curves and checkpoint go there. It must be empty or not
    there yet. None: runs/CONFIG-TIME."""

    data_dir: Path | None = None
    """Folder of tensorflow-datasets, where the data set is prepared once. None: $TFDS_DATA_DIR, or
    ~/tensorflow_datasets."""

    # What follows makes a named configuration and is no option.

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
        if not 0 <= self.momentum < 1:
            raise ValueError(
                f"--momentum is {self.momentum}, but must be at least 0 and less than 1; "
                "0.9 is usual."
            )
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
        _divides_over_devices("batch_size", self.batch_size, num_devices, maximum=num_train)
        through_at_once = self.batch_size
        if self.microbatch_size is not None:
            through_at_once = self.microbatch_size
            _divides_over_devices(
                "microbatch_size", self.microbatch_size, num_devices, maximum=self.batch_size
            )
            if self.batch_size % self.microbatch_size:
                raise ValueError(
                    f"--microbatch-size is {self.microbatch_size}, but must divide --batch-size, "
                    f"{self.batch_size}: {_multiples_that_divide(self.batch_size, num_devices)} do."
                )
        share = through_at_once // num_devices
        if share % self.group_size:
            raise ValueError(
                f"--group-size is {self.group_size}, but must divide the {share} examples that go "
                f"through a device at a time: {_multiples_that_divide(share, 1)} do."
            )
        if self.num_norm_examples is not None:
            _divides_over_devices(
                "num_norm_examples",
                self.num_norm_examples,
                num_devices * self.group_size,
                maximum=self.batch_size,
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
            raise ValueError(f"{_option(name)} is {value:g}, but must be more than 0: raise it.")


def _divides_over_devices(name: str, value: int, parts: int, maximum: int) -> None:
    """Checks that each device gets the same whole number of groups."""
    if value % parts == 0 and value <= maximum:
        return
    below = min(value, maximum) // parts * parts
    fitting = [size for size in (below, below + parts) if 0 < size <= maximum]
    raise ValueError(
        f"{_option(name)} is {value}, but must be a multiple of {parts} (devices times group "
        f"size, where groups count) and at most {maximum}: "
        f"{' or '.join(map(str, fitting)) or 'nothing smaller'} would do."
    )


def _multiples_that_divide(total: int, unit: int) -> str:
    sizes = [size for size in range(unit, total + 1, unit) if total % size == 0]
    return ", ".join(map(str, sizes))
