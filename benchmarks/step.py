"""Images per second of whole training steps, optimizers side by side in one run.

`python -m benchmarks.step` prints one table; `benchmarks/README.md` says what is in it.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np

from benchmarks.memory import NUM_TRAIN
from benchmarks.report import machine, table
from benchmarks.timing import Pairs
from train.body import Batch
from train.build import image_shape_of, network_of, training_of
from train.config import Config
from train.configs import CONFIGS
from train.data import dataset_of
from train.step import init_state, shard
from train.validation import validate

BASE = "lars"
AGAIN = "lars, again"


class Steps:
    """A training that takes one step after another with the same batch.

    Args:
        config: the options.
    """

    def __init__(self, config: Config) -> None:
        devices = jax.devices()
        dataset = dataset_of(config.dataset, config.data_dir)
        network = network_of(config, dataset, len(devices))
        draw, self._step = training_of(config, dataset, network, NUM_TRAIN, devices)
        self._state = init_state(draw, config.seed, devices)
        size = config.transfer_size or config.batch_size
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (size, *image_shape_of(config, dataset)), np.uint8)
        labels = rng.integers(0, dataset.num_classes, size, np.int32)
        self._piece = shard({"image": images, "label": labels}, devices)

    def take(self) -> Batch:
        """Returns the same piece whenever one is wanted."""
        return self._piece

    def prefetch(self) -> None:
        """Does nothing: data has a benchmark of its own."""

    def run(self) -> float:
        """Takes a step; returns the seconds until it is done."""
        start = time.perf_counter()
        self._state, metrics = self._step(self._state, self)
        jax.block_until_ready((self._state, metrics))
        return time.perf_counter() - start


def configs_of(config: Config, norm_examples: Sequence[int]) -> dict[str, Config]:
    """Makes the options of the steps that are compared, from those that they have in common."""

    def plain(optimizer: Literal["lars", "clars"]) -> Config:
        return dataclasses.replace(
            config,
            optimizer=optimizer,
            learning_rates={optimizer: 0.1},
            group_size=1,
            num_norm_examples=None,
        )

    clars = plain("clars")
    return {
        BASE: plain("lars"),
        **{
            f"clars, {number:,} norms": dataclasses.replace(clars, num_norm_examples=number)
            for number in norm_examples
        },
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    options = _parse(arguments)
    config = dataclasses.replace(
        CONFIGS[options.config],
        image_size=options.image_size,
        batch_size=options.batch_size,
        microbatch_size=options.microbatch_size,
        transfer_size=options.transfer_size,
    )
    numbers = options.num_norm_examples or [config.batch_size, max(1, config.batch_size // 32)]
    configs = configs_of(config, numbers)
    for other in configs.values():
        validate(other, dataset_of(other.dataset, other.data_dir), len(jax.devices()))
    steps: dict[str, Steps] = {}
    for name, other in configs.items():
        print(f"{name} ...", end=" ", file=sys.stderr, flush=True)
        steps[name] = Steps(other)
        print(f"{steps[name].run():.0f} s to compile", file=sys.stderr, flush=True)
    steps[AGAIN] = steps[BASE]
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(options.rounds):
        for name in list(steps)[:: -1 if index % 2 else 1]:
            seconds[name].append(steps[name].run())
        latest = ", ".join(f"{name}: {times[-1]:.3f} s" for name, times in seconds.items())
        print(f"round {index + 1}: {latest}", file=sys.stderr, flush=True)
    lines = []
    for name, times in seconds.items():
        pairs = Pairs(seconds[BASE], times)
        low, high = pairs.interval
        ratio = ("", "") if name == BASE else (f"{pairs.ratio:.3f}", f"{low:.3f}-{high:.3f}")
        lines.append((name, f"{config.batch_size / float(np.median(times)):,.0f}", *ratio))
    print(
        f"{machine()}; {options.config}, {options.batch_size:,} images a step, "
        f"{options.microbatch_size:,} at a time; medians of {options.rounds} rounds\n"
    )
    print(table(("step", "images/s", "time", "5-95 %"), lines))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step",
        description="Speed of whole training steps with CLARS, as ratios to LARS.",
    )

    def number(option: str, default: Any, text: str) -> None:
        parser.add_argument(option, type=int, default=default, help=f"{text}; default: {default}")

    parser.add_argument("--config", default="imagenet-resnet50", choices=CONFIGS)
    number("--image-size", None, "pixels")
    number("--batch-size", 1024, "images per step")
    number("--microbatch-size", 128, "images that go through the network at a time")
    number("--transfer-size", None, "images that come to the devices at a time")
    number("--rounds", 10, "steps of each")
    parser.add_argument(
        "--num-norm-examples",
        type=int,
        nargs="+",
        metavar="K",
        help="of each step, for a row each; default: all, and a part in 32",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
