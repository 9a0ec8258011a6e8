"""What a training step needs of a device's memory, by the compiler's plan; nothing is run.

`python -m benchmarks.memory` prints one table; `benchmarks/README.md` says what is in it.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.report import machine
from train.build import image_shape_of, network_of, training_of
from train.config import Config
from train.configs import CONFIGS
from train.data import dataset_of
from train.validation import validate

# Photos in ImageNet's training split, on which the length of the schedule depends.
NUM_TRAIN = 1_281_167


@dataclasses.dataclass(frozen=True)
class Plan:
    """The memory plan of a program, in bytes on one device.

    Attributes:
        arguments: what goes in, state and images.
        results: what comes out, without what takes the place of arguments that are used up.
        temporary: the peak of what is needed in between.
    """

    arguments: int
    results: int
    temporary: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.arguments + self.results + self.temporary


def plans_of(config: Config) -> tuple[int, dict[str, Plan]]:
    """Compiles a training step for one device.

    Args:
        config: the options.

    Returns:
        The bytes of the parameters, and the plan of each program that makes up a step.
    """
    devices = jax.local_devices()[:1]
    dataset = dataset_of(config.dataset, config.data_dir)
    validate(config, dataset, len(devices))
    network = network_of(config, dataset, 1)
    state, step = training_of(config, dataset, network, NUM_TRAIN, devices)
    size = config.transfer_size or config.batch_size
    piece = {
        "image": jax.ShapeDtypeStruct((1, size, *image_shape_of(config, dataset)), jnp.uint8),
        "label": jax.ShapeDtypeStruct((1, size), jnp.int32),
    }
    plans = {}
    for name, lowered in step.lower(state, piece).items():
        memory: Any = lowered.compile().memory_analysis()
        plans[name] = Plan(
            memory.argument_size_in_bytes,
            memory.output_size_in_bytes - memory.alias_size_in_bytes,
            memory.temp_size_in_bytes,
        )
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state.params)), plans


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    options = _parse(arguments)
    size = options.microbatch_size
    config = dataclasses.replace(
        CONFIGS[options.config], image_size=options.image_size, microbatch_size=size
    )
    rows = {
        f"a batch of {size:,}": dataclasses.replace(config, batch_size=size),
        f"a batch of {options.batch_size:,} in transfers of {size:,}": dataclasses.replace(
            config, batch_size=options.batch_size, transfer_size=size
        ),
    }
    print(machine(), end="\n\n")
    print("| step | program | arguments | results | temporary | total |")
    print("| --- | --- | --- | --- | --- | --- |")
    peaks = []
    for title, row in rows.items():
        print(f"{title} ...", file=sys.stderr, flush=True)
        params, plans = plans_of(row)
        peaks.append(max(plan.total for plan in plans.values()))
        for name, plan in plans.items():
            numbers = (plan.arguments, plan.results, plan.temporary, plan.total)
            print(f"| {title} | {name} | {' | '.join(f'{n / 1e6:,.0f} MB' for n in numbers)} |")
    more = (peaks[1] - peaks[0]) / params
    print(f"\nThe parameters take {params / 1e6:,.0f} MB, the large batch {more:+.2f} times that.")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--config", default="imagenet-resnet50", choices=CONFIGS)
    parser.add_argument("--image-size", type=int, default=224, help="pixels")
    parser.add_argument("--batch-size", type=int, default=65_536, help="of the large batch")
    parser.add_argument("--microbatch-size", type=int, default=128, help="examples at a time")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
