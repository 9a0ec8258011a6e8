"""What was measured, as a table to read and as numbers to work with."""

import dataclasses
import itertools
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jaxlib

from benchmarks.timing import Compiled, Pairs

AGAIN = "A/A"
"""The variant that is the plain gradient once more: how far the same is from the same."""

_HEADER = ("model", "variant", "time", "5-95 %", "memory", "FLOPs", "trace + compile")


@dataclasses.dataclass(frozen=True)
class Row:
    """A variant of a model beside the plain gradient.

    Attributes:
        variant: its name.
        compiled: what the compiler says of it; None where it was not compiled.
        pairs: its times; None where it did not run.
        failure: why something is missing, in a word or two.
        message: the same at length.
    """

    variant: str
    compiled: Compiled | None = None
    pairs: Pairs | None = None
    failure: str = ""
    message: str = ""

    @property
    def time(self) -> tuple[str, str]:
        """The ratio of the times, or why there is none, and the interval of the ratio."""
        if self.pairs is None:
            return self.failure, ""
        low, high = self.pairs.interval
        return f"{self.pairs.ratio:.2f}", f"{low:.2f}-{high:.2f}"


@dataclasses.dataclass(frozen=True)
class ModelRows:
    """All that was measured of a model.

    Attributes:
        model: its name.
        batch_size: number of examples.
        plain: what the compiler says of the plain gradient.
        rows: the variants, as far as they are measured.
    """

    model: str
    batch_size: int
    plain: Compiled
    rows: list[Row] = dataclasses.field(default_factory=list)

    def cells(self) -> list[tuple[str, ...]]:
        """The rows of the table: absolute numbers of the plain gradient, then ratios to it."""
        (again,) = [row for row in self.rows if row.variant == AGAIN]
        time = f"{again.pairs.base_median * 1e3:.1f} ms" if again.pairs else again.failure
        return [
            (
                f"**{self.model}**, N={self.batch_size}",
                "plain",
                time,
                "",
                f"{self.plain.temp_bytes / 1e6:.3g} MB",
                f"{self.plain.flops / 1e9:.3g} G" if self.plain.flops else "",
                _build(self.plain),
            ),
            *(self._ratios(row) for row in self.rows),
        ]

    def _ratios(self, row: Row) -> tuple[str, ...]:
        memory = flops = build = ""
        if row.compiled:
            memory = f"{row.compiled.temp_bytes / self.plain.temp_bytes:.2f}"
            if row.compiled.flops and self.plain.flops:
                flops = f"{row.compiled.flops / self.plain.flops:.2f}"
            build = _build(row.compiled)
        return ("", row.variant, *row.time, memory, flops, build)

    def numbers(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return {
            "model": self.model,
            "batch_size": self.batch_size,
            "plain": self.plain.numbers(),
            "variants": [
                {
                    "variant": row.variant,
                    "failure": row.failure,
                    "message": row.message,
                    **(row.compiled.numbers() if row.compiled else {}),
                    **(row.pairs.numbers() if row.pairs else {}),
                }
                for row in self.rows
            ],
        }


def machine(with_load: bool = True) -> str:
    """The machine and the versions, in one line.

    Args:
        with_load: whether it says how busy the machine is.
    """
    device = jax.devices()[0]
    load = f", load {os.getloadavg()[0]:.1f} at the start" if with_load else ""
    return (
        f"{_processor()}, {os.cpu_count()} cores{load}; "
        f"{device.platform} device: {device.device_kind}; "
        f"Python {platform.python_version()}, jax {jax.__version__}, jaxlib {jaxlib.__version__}"
    )


def markdown(machine: str, num_pairs: int, models: Sequence[ModelRows]) -> str:
    """The table, with what is needed to read it."""
    lines = list(itertools.chain.from_iterable(model.cells() for model in models))
    return f"{machine}; medians of {num_pairs} pairs\n\n{table(_HEADER, lines)}"


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown whose columns line up."""
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    rule = tuple("-" * width for width in widths)
    return "\n".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |"
        for line in (header, rule, *lines)
    )


def _build(compiled: Compiled) -> str:
    return f"{compiled.trace_seconds:.1f} + {compiled.compile_seconds:.1f} s"


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else platform.machine()
