"""The grid: every network, optimizer, batch size, learning rate and seed of the study.

Nothing is tuned outside it. At every batch size an optimizer gets six runs to find its learning
rate in: six rates, a factor of 2 apart, or, with a warm-up, every second of these at two lengths.
The rates are peaks for the whole batch, whatever its size: no scaling rule is assumed.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.convergence import clars_variants
from train.models import make_model
from train.models.densenet import DenseNet
from train.models.resnet import ResNet
from train.optimizers import Optimizer, make_optimizer
from train.schedules import ScheduleName, make_schedule

COMMON: dict[str, Any] = {
    "momentum": 0.9,
    "nesterov": False,
    "weight_decay": 1e-4,
    "trust_coefficient": None,
    "max_trust_ratio": None,
}

# Shares of the run. Goyal et al. (2017) take 5 of 90 epochs, MLPerf's entries for large batches up
# to two fifths.
WARMUPS = (0.1, 0.3)

# Per step: a run at the largest batch size has few.
NORM_MOMENTUM = 0.5


@dataclasses.dataclass(frozen=True)
class Contender:
    """An optimizer with its options and its grid.

    Attributes:
        make: takes a schedule and, by name, batch_size, group_size and num_steps.
        learning_rates: peaks of the schedule, from small to large.
        warmups: shares of the run in which the rate rises to the peak; 0 for none.
        group_size: examples per norm.
        num_norm_examples: examples of each batch, from the first, whose norms are taken; None for
            all.
        schedule: what follows the warm-up.
    """

    make: Callable[..., Optimizer]
    learning_rates: tuple[float, ...]
    warmups: tuple[float, ...] = (0.0,)
    group_size: int = 1
    num_norm_examples: int | None = None
    schedule: ScheduleName = "polynomial"

    @property
    def grid(self) -> list[tuple[float, float]]:
        """Learning rates and warm-ups to choose from."""
        return list(itertools.product(self.learning_rates, self.warmups))

    def rates(self, learning_rate: float, warmup: float, num_steps: int) -> np.ndarray:
        """Computes the learning rate of each step."""
        schedule = make_schedule(
            self.schedule,
            peak=learning_rate,
            end=0.0,
            warmup_steps=round(warmup * num_steps),
            num_steps=num_steps,
        )
        return np.asarray(jax.vmap(schedule)(jnp.arange(num_steps)))


def _named(name: str, **options: Any) -> Callable[..., Optimizer]:
    return functools.partial(make_optimizer, name, **(COMMON | options))


def _rates(largest: float, warmup: bool = False) -> tuple[float, ...]:
    return tuple(largest / 2**i for i in range(5 - warmup, -1, -1 - warmup))


# The same steps for the weights at a tenth of the learning rate, which is what biases and scales
# get, without a ratio.
_CLARS_X_10 = {"trust_coefficient": 0.1, "max_trust_ratio": 1.0}

CONTENDERS: Mapping[str, Contender] = {
    "sgd": Contender(_named("sgd"), _rates(6.4)),
    "sgd, warm-up": Contender(_named("sgd"), _rates(6.4, True), WARMUPS),
    "nesterov": Contender(_named("sgd", nesterov=True), _rates(6.4)),
    "nesterov, warm-up": Contender(_named("sgd", nesterov=True), _rates(6.4, True), WARMUPS),
    "lars": Contender(_named("lars"), _rates(64.0)),
    "lars, warm-up": Contender(_named("lars"), _rates(64.0, True), WARMUPS),
    "lamb": Contender(_named("lamb"), _rates(0.16)),
    # The workers of its authors have 128 examples.
    "lena": Contender(_named("lena"), _rates(12.8), group_size=128),
    # Its factor is a schedule already.
    "tvlars": Contender(_named("tvlars"), _rates(64.0), schedule="constant"),
    "clars": Contender(_named("clars"), _rates(64.0)),
    "clars, groups of 8": Contender(_named("clars"), _rates(64.0), group_size=8),
    "clars, 256 norms": Contender(_named("clars"), _rates(64.0), num_norm_examples=256),
    # What of CLARS matters: these differ from "clars" in one thing or two.
    "clars, warm-up": Contender(_named("clars"), _rates(64.0, True), WARMUPS),
    "clars, no cap": Contender(_named("clars", max_trust_ratio=math.inf), _rates(64.0)),
    "clars, ratio x 10": Contender(_named("clars", **_CLARS_X_10), _rates(6.4)),
    "clars, ratio x 10, warm-up": Contender(
        _named("clars", **_CLARS_X_10), _rates(6.4, True), WARMUPS
    ),
    "lars, ratio x 10": Contender(_named("lars", trust_coefficient=0.01), _rates(6.4)),
    "clars, ratio inside momentum": Contender(
        functools.partial(clars_variants.ratio_inside_momentum, **COMMON), _rates(64.0)
    ),
    "clars, decay outside": Contender(
        functools.partial(clars_variants.decay_outside, **COMMON), _rates(64.0)
    ),
}

NETWORKS: Mapping[str, Callable[[], nn.Module]] = {
    "resnet8_narrow": lambda: ResNet(
        stage_sizes=(1, 1, 1), width=8, num_classes=10, norm_momentum=NORM_MOMENTUM
    ),
    "densenet16_narrow": lambda: DenseNet(
        block_sizes=(2, 2, 2), growth_rate=4, num_classes=10, norm_momentum=NORM_MOMENTUM
    ),
    **{
        name: functools.partial(make_model, name, num_classes=10, norm_momentum=NORM_MOMENTUM)
        for name in ("resnet20", "densenet_bc40", "mobilenet_v2_small")
    },
}


@dataclasses.dataclass(frozen=True)
class Study:
    """What is trained, and on which part of the data.

    Attributes:
        networks: keys of `NETWORKS`.
        contenders: keys of `CONTENDERS`.
        batch_sizes: multiples of `microbatch_size` that divide `num_train`.
        num_train: images to train on.
        num_valid: further ones, by which the learning rate is chosen.
        image_size: height and width to which the images are shrunk.
        epochs: length of every run.
        microbatch_size: images that go through the network, and BatchNorm, at a time: as many at
            every batch size.
        tuning_seeds: seeds for every point of a grid.
        seeds: seeds for the best point of a grid, the former among them.
        side_by_side: whether a program trains many runs at once, or a single one.
    """

    networks: Sequence[str]
    contenders: Sequence[str]
    batch_sizes: Sequence[int]
    num_train: int
    num_valid: int
    image_size: int
    epochs: int
    microbatch_size: int
    tuning_seeds: Sequence[int]
    seeds: Sequence[int]
    side_by_side: bool

    @property
    def num_rows(self) -> int:
        """Counts the rows: optimizers at each batch size, for each network."""
        return len(self.networks) * len(self.batch_sizes) * len(self.contenders)

    @property
    def num_runs(self) -> int:
        """Counts the runs."""
        further = len(set(self.seeds) - set(self.tuning_seeds))
        runs = sum(
            len(CONTENDERS[name].grid) * len(self.tuning_seeds) + further
            for name in self.contenders
        )
        return len(self.networks) * len(self.batch_sizes) * runs


_CPU = Study(
    networks=("resnet8_narrow",),
    contenders=("sgd", "sgd, warm-up", "lars", "lars, warm-up", "clars", "clars, groups of 8"),
    batch_sizes=(512, 2048, 4096),
    num_train=4096,
    num_valid=2000,
    image_size=14,
    epochs=25,
    microbatch_size=128,
    tuning_seeds=(0,),
    seeds=(0, 1, 2),
    side_by_side=False,
)

PRESETS: Mapping[str, Study] = {
    "cpu": _CPU,
    "cpu-ratio": dataclasses.replace(_CPU, contenders=("lars, ratio x 10", "clars, ratio x 10")),
    "cpu-densenet": dataclasses.replace(
        _CPU,
        networks=("densenet16_narrow",),
        contenders=(
            *("sgd", "sgd, warm-up", "lars, warm-up", "clars"),
            *("lars, ratio x 10", "clars, ratio x 10"),
        ),
    ),
    "cpu-clars": dataclasses.replace(
        _CPU,
        contenders=(
            *("clars", "clars, warm-up", "clars, no cap"),
            *("clars, ratio inside momentum", "clars, decay outside"),
            "clars, ratio x 10, warm-up",
        ),
        batch_sizes=(4096,),
    ),
    "gpu": Study(
        networks=("resnet20", "densenet_bc40", "mobilenet_v2_small"),
        contenders=(
            *("sgd", "sgd, warm-up", "nesterov", "nesterov, warm-up", "lars", "lars, warm-up"),
            *("lamb", "lena", "tvlars", "clars", "clars, groups of 8", "clars, 256 norms"),
            *("clars, ratio x 10", "lars, ratio x 10"),
        ),
        batch_sizes=(512, 4096, 8192),
        num_train=8192,
        num_valid=2000,
        image_size=14,
        epochs=15,
        microbatch_size=256,
        tuning_seeds=(0, 1, 2),
        seeds=(0, 1, 2),
        side_by_side=True,
    ),
    "smoke": dataclasses.replace(
        _CPU,
        contenders=("lars, warm-up", "clars, 256 norms"),
        batch_sizes=(256,),
        num_train=512,
        num_valid=100,
        epochs=4,
        seeds=(0, 1),
    ),
}
