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
from benchmarks.timing import time_pairs
from train.body import Batch
from train.build import image_shape_of, network_of, training_of
from train.config import Config
from train.configs import CONFIGS
from train.data import dataset_of
from train.step import shard
from train.validation import validate

BASE = "lars"


class Steps:
    """A training that takes one step after another with the same batch.

    Args:
        config: the options.
    """

    def __init__(self, config: Config) -> None:
        devices = jax.devices()
        dataset = dataset_of(config.dataset, config.data_dir)
        network = network_of(config, dataset, len(devices))
        self._state, self._step = training_of(config, dataset, network, NUM_TRAIN, devices)
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


def configs_of(config: Config, num_norm_examples: int) -> dict[str, Config]:
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
        "clars, all norms": clars,
        f"clars, {num_norm_examples:,} norms": dataclasses.replace(
            clars, num_norm_examples=num_norm_examples
        ),
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
    configs = configs_of(config, options.num_norm_examples)
    for other in configs.values():
        validate(other, dataset_of(other.dataset, other.data_dir), len(jax.devices()))
    base = Steps(configs[BASE])
    lines = []
    for name, other in configs.items():
        print(f"{name} ...", file=sys.stderr, flush=True)
        steps = base if name == BASE else Steps(other)
        pairs = time_pairs(base.run, steps.run, options.pairs)
        low, high = pairs.interval
        speed = config.batch_size / float(np.median(pairs.other))
        lines.append((name, f"{speed:,.0f}", f"{pairs.ratio:.2f}", f"{low:.2f}-{high:.2f}"))
    print(
        f"{machine()}; {options.config}, {options.batch_size:,} images a step, "
        f"{options.microbatch_size:,} at a time; medians of {options.pairs} pairs\n"
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
    number("--num-norm-examples", 32, "of each step")
    number("--pairs", 10, "steps of each")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
