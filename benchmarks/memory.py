"""What a training step needs of a device's memory, by the compiler's plan; nothing is run.

The device may be one that is not there: a GPU, or a TPU among its neighbours.

`python -m benchmarks.memory` prints one table; `benchmarks/README.md` says what is in it.
"""

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.plan import cells
from benchmarks.report import machine, table
from benchmarks.targets import TARGETS, Plan, Target
from train.build import image_shape_of, network_of, training_of
from train.config import Config
from train.configs import CONFIGS
from train.data import dataset_of
from train.validation import validate

# Photos in ImageNet's training split, on which the length of the schedule depends.
NUM_TRAIN = 1_281_167


@dataclasses.dataclass(frozen=True)
class Memory:
    """What a program needs of one device.

    Attributes:
        arguments: bytes that go in, state and images.
        results: bytes that come out, without what takes the place of arguments that are used up.
        temporary: bytes that are needed in between, at most.
        work: what else there is to say of a device that is not there.
    """

    arguments: int
    results: int
    temporary: int
    work: Plan

    @property
    def total(self) -> int:
        """All of it."""
        return self.arguments + self.results + self.temporary


def memory_of(config: Config, target: Target | None = None) -> tuple[int, dict[str, Memory]]:
    """Compiles a training step, for one device or for all of a target.

    Args:
        config: the options.
        target: a kind of device that is not there.

    Returns:
        The bytes of the parameters, and what each program needs that makes up a step.
    """
    devices = target.devices() if target else jax.local_devices()[:1]
    dataset = dataset_of(config.dataset, config.data_dir)
    validate(config, dataset, len(devices))
    network = network_of(config, dataset, len(devices))
    draw, step = training_of(config, dataset, network, NUM_TRAIN, devices)
    # Its shapes alone: there may be no device to hold it.
    state = jax.eval_shape(draw, jax.random.key(config.seed))
    size = (config.transfer_size or config.batch_size) // len(devices)
    piece = {
        "image": jax.ShapeDtypeStruct(
            (len(devices), size, *image_shape_of(config, dataset)), jnp.uint8
        ),
        "label": jax.ShapeDtypeStruct((len(devices), size), jnp.int32),
    }
    found = {}
    with target.pretended() if target else contextlib.nullcontext():
        for name, lowered in step.lower(state, piece).items():
            compiled = lowered.compile(compiler_options=target.options if target else None)
            memory: Any = compiled.memory_analysis()
            found[name] = Memory(
                memory.argument_size_in_bytes,
                memory.output_size_in_bytes - memory.alias_size_in_bytes,
                memory.temp_size_in_bytes,
                target.read(compiled) if target else {},
            )
    params = jax.tree.leaves(state.params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in params), found


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    options = _parse(arguments)
    target = TARGETS.get(options.device)
    num_devices = len(target.devices_or_exit()) if target else 1
    size = options.microbatch_size
    config = dataclasses.replace(
        CONFIGS[options.config], image_size=options.image_size, microbatch_size=size
    )
    piece = size * num_devices
    rows = {
        f"a batch of {piece:,}": dataclasses.replace(config, batch_size=piece),
        f"a batch of {options.batch_size:,} in transfers of {piece:,}": dataclasses.replace(
            config, batch_size=options.batch_size, transfer_size=piece
        ),
    }
    lines: list[tuple[str, ...]] = []
    peaks = []
    work: Plan = {}
    for title, row in rows.items():
        print(f"{title} ...", file=sys.stderr, flush=True)
        params, programs = memory_of(row, target)
        peaks.append(max(program.total for program in programs.values()))
        for name, program in programs.items():
            numbers = (program.arguments, program.results, program.temporary, program.total)
            # It is the temporary memory once more.
            work = {key: number for key, number in program.work.items() if key != "memory"}
            lines.append((title, name, *(f"{n / 1e6:,.0f} MB" for n in numbers), *cells(work)))
    where = f"; compiled for {num_devices} x {options.device}" if target else ""
    print(f"{machine()}{where}\n")
    header = ("step", "program", "arguments", "results", "temporary", "total", *work)
    print(table(header, lines))
    more = (peaks[1] - peaks[0]) / params
    print(f"\nThe parameters take {params / 1e6:,.0f} MB, the large batch {more:+.2f} times that.")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--config", default="imagenet-resnet50", choices=CONFIGS)
    parser.add_argument("--device", choices=TARGETS, help="one that is not there; default: ours")
    parser.add_argument("--image-size", type=int, help="pixels; default: those of the data set")
    parser.add_argument("--batch-size", type=int, default=65_536, help="of the large batch")
    parser.add_argument("--microbatch-size", type=int, default=128, help="examples at a time")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
