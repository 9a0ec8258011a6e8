"""Where the time of a gradient with norms goes: kernels by kind, and the longest with their layers.

`python -m benchmarks.profile` prints the tables; `benchmarks/README.md` says what is in them.
"""

import argparse
import csv
import dataclasses
import functools
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from benchmarks.hlo import sources_of
from benchmarks.models import MODELS, PRESETS, problem_of
from benchmarks.report import machine, table
from benchmarks.timing import Compiled
from benchmarks.variants import VARIANTS, Variant, plain

COLUMNS = ("model", "variant", "kernel", "times", "microseconds")
"""Of `kernels.csv`: what a kernel did in one run, on average."""

_PLAIN = "plain"

_KINDS = ("products", "our kernels", "the rest")
# Pallas names a kernel after its function; the last number tells its shapes apart.
_OURS = re.compile("weight_gradient_and_norms|depthwise_gradients")
# How cuBLAS, cuDNN and what they are made of name their kernels, and XLA its own products.
_PRODUCT = re.compile(
    r"gemm|xmma|cutlass|cudnn|cublas|nvjet|cask|nhwc|dot|conv(?!ert)|ynn_fusion", re.IGNORECASE
)
# On a CPU, these last as long as what is in them, which is there as well.
_NESTS = re.compile(r"(while|call|conditional)(\.\d+)?$")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel that ran.

    Attributes:
        name: what its code is called.
        instruction: of the compiled program, where the profiler knows it. Of a CUDA graph it knows
            the graph's.
        seconds: how long it ran.
    """

    name: str
    instruction: str
    seconds: float

    @property
    def kind(self) -> str:
        """Of `_KINDS`."""
        if _OURS.match(self.name):
            return "our kernels"
        return "products" if _PRODUCT.search(self.name) else "the rest"


@dataclasses.dataclass(frozen=True)
class Profile:
    """What a program did, each time.

    Attributes:
        wall: seconds from its start until all results were there; median, without the profiler.
        kernels: those of all runs together.
        num_runs: how many.
        sources: of the instructions, the operations that they come from.
    """

    wall: float
    kernels: Sequence[Kernel]
    num_runs: int
    sources: dict[str, str]

    def cells(self) -> list[str]:
        """Milliseconds of each kind and of all, the number of kernels, and the wall time."""
        seconds = dict.fromkeys(_KINDS, 0.0)
        for kernel in self.kernels:
            seconds[kernel.kind] += kernel.seconds
        times = [*seconds.values(), sum(seconds.values())]
        return [
            *(f"{1e3 * time / self.num_runs:.1f}" for time in times),
            f"{len(self.kernels) / self.num_runs:,.0f}",
            f"{1e3 * self.wall:.1f}",
        ]

    def rows(self) -> list[tuple[str, str, str]]:
        """Of each name, the longest first: the name, how often it ran, and microseconds."""
        seconds: dict[str, list[float]] = defaultdict(list)
        for kernel in self.kernels:
            seconds[kernel.name].append(kernel.seconds)
        return [
            (name, f"{len(times) / self.num_runs:g}", f"{1e6 * sum(times) / self.num_runs:.1f}")
            for name, times in sorted(seconds.items(), key=lambda item: -sum(item[1]))
        ]

    def longest(self, number: int) -> list[tuple[str, ...]]:
        """Rows of those that took most: microseconds, kind, name, and the operation."""
        seconds: dict[tuple[str, str, str], float] = defaultdict(float)
        for kernel in self.kernels:
            source = self.sources.get(kernel.instruction, kernel.instruction)
            seconds[kernel.kind, _short(kernel.name), source] += kernel.seconds
        longest = sorted(seconds, key=seconds.__getitem__, reverse=True)[:number]
        return [(f"{1e6 * seconds[key] / self.num_runs:,.0f}", *key) for key in longest]


def profile(make: Variant, model: str, batch_size: int | None, num_runs: int) -> Profile:
    """Runs a variant of a model under the profiler.

    Raises:
        RuntimeError: the profiler saw no kernel.
    """
    problem = problem_of(model, batch_size)
    compiled = Compiled.of(make(problem), problem.args)
    run = functools.partial(compiled.run, problem.args)
    run()
    wall = float(np.median([run() for _ in range(num_runs)]))
    # Calls of Python are not asked for, and fill the profiler's memory.
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            for _ in range(num_runs):
                run()
        (path,) = Path(folder).rglob("*.xplane.pb")
        kernels = list(kernels_in(jax.profiler.ProfileData.from_file(str(path))))
    if not kernels:
        raise RuntimeError(f"The profiler saw no kernel on {jax.devices()[0].device_kind}.")
    return Profile(wall, kernels, num_runs, sources_of(str(compiled.function.as_text())))


def kernels_in(data: jax.profiler.ProfileData) -> Iterator[Kernel]:
    """What ran on a GPU, or in the threads of a CPU."""
    for plane in data.planes:
        is_gpu = plane.name.startswith("/device:GPU:")
        for line in plane.lines:
            # Other lines of a GPU sum up what is in its streams.
            if is_gpu and not line.name.startswith("Stream"):
                continue
            for event in line.events:
                # Of one without a value, the name may be missing.
                stats = {str(name): value for name, value in event.stats if name}
                instruction = str(stats.get("hlo_op", ""))
                is_work = is_gpu or (instruction and event.name == instruction)
                if is_work and not _NESTS.match(event.name):
                    yield Kernel(event.name, instruction, event.duration_ns / 1e9)


def _short(name: str) -> str:
    """A name without the template arguments of C++, and no longer than a table bears."""
    return re.sub(r"^void ", "", name).partition("<")[0][:48]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    options = _parse(arguments)
    header = machine()
    lines: list[tuple[str, ...]] = []
    rows: list[tuple[str, ...]] = [COLUMNS]
    details: list[str] = []
    variants: dict[str, Variant] = {_PLAIN: plain}
    variants.update((name, VARIANTS[name]) for name in options.variants)
    for model in options.models or PRESETS[options.preset]:
        for name, make in variants.items():
            print(f"{model}: {name} ...", file=sys.stderr, flush=True)
            found = profile(make, model, options.batch_size, options.runs)
            lines.append((f"**{model}**" if name == _PLAIN else "", name, *found.cells()))
            rows.extend((model, name, *row) for row in found.rows())
            if options.top:
                longest = table(("us", "kind", "kernel", "operation"), found.longest(options.top))
                details.append(f"\n**{model}**, {name}\n\n{longest}")
            if options.output:
                # After each, so that an interrupted run leaves what it has measured.
                options.output.mkdir(parents=True, exist_ok=True)
                with (options.output / "kernels.csv").open("w", newline="") as file:
                    csv.writer(file, lineterminator="\n").writerows(rows)
    print(f"{header}; means of {options.runs} runs, milliseconds\n")
    print(table(("model", "variant", *_KINDS, "all", "kernels", "wall"), lines))
    for text in details:
        print(text)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.profile",
        description="Where the time of a gradient with norms goes, by kernel.",
    )
    parser.add_argument("--preset", choices=PRESETS, default="cpu", help="models; default: cpu")
    parser.add_argument("--models", nargs="+", choices=MODELS, metavar="NAME")
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=["exact"], metavar="NAME"
    )
    parser.add_argument("--batch-size", type=int, help="default: the model's")
    parser.add_argument("--runs", type=int, default=5, help="runs of each; default: 5")
    parser.add_argument("--top", type=int, default=0, help="of the longest kernels; default: none")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="gets kernels.csv")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
