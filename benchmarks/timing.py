"""Compiles functions and times them side by side."""

import dataclasses
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

_RESAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A function compiled for its arguments, and what the compiler says of it.

    Attributes:
        function: takes the arguments.
        trace_seconds: time until XLA gets the program.
        compile_seconds: time that XLA takes.
        temp_bytes: peak of the temporary memory, which is neither arguments nor results.
        flops: floating-point operations, the body of a loop counted once; None on GPUs, where the
            count leaves out what is done by libraries.
    """

    function: jax.stages.Compiled
    trace_seconds: float
    compile_seconds: float
    temp_bytes: int
    flops: float | None

    @classmethod
    def of(cls, function: Callable[..., Any], args: tuple[Any, ...]) -> "Compiled":
        """Compiles `function` for arguments like `args`."""
        start = time.perf_counter()
        lowered = jax.jit(function).lower(*args)
        traced = time.perf_counter()
        compiled = lowered.compile()
        done = time.perf_counter()
        memory: Any = compiled.memory_analysis()
        cost: Any = compiled.cost_analysis()
        return cls(
            compiled,
            trace_seconds=traced - start,
            compile_seconds=done - traced,
            temp_bytes=memory.temp_size_in_bytes,
            flops=cost["flops"] if jax.default_backend() != "gpu" else None,
        )

    @property
    def needs_too_much(self) -> bool:
        """Whether it had better not be run, for want of memory.

        Other devices refuse; where a CPU's memory ends, the operating system ends a process. There,
        half of it is for arguments, results and others.
        """
        return jax.default_backend() == "cpu" and self.temp_bytes > _physical_memory() / 2

    def run(self, args: tuple[Any, ...], repeats: int = 1) -> float:
        """Runs it; returns the seconds until all results are there, per run.

        Args:
            args: its arguments.
            repeats: runs that are sent to the device at once, which hides the time of sending.
        """
        start = time.perf_counter()
        jax.block_until_ready([self.function(*args) for _ in range(repeats)])
        return (time.perf_counter() - start) / repeats

    def numbers(self) -> dict[str, Any]:
        """Everything but the function, as JSON takes it."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "function"
        }


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Times of two functions that ran in turn, in seconds.

    Attributes:
        base: of the function that the other is compared with.
        other: of the other function, in the same order.
    """

    base: list[float]
    other: list[float]

    @property
    def base_median(self) -> float:
        """The median of `base`."""
        return float(np.median(self.base))

    @property
    def ratio(self) -> float:
        """The median over the pairs of other / base."""
        return float(np.median(self._ratios))

    @property
    def interval(self) -> tuple[float, float]:
        """From the 5 % to the 95 % quantile of that median, by bootstrap over the pairs."""
        rng = np.random.default_rng(0)
        drawn = rng.choice(self._ratios, (_RESAMPLES, len(self._ratios)))
        low, high = np.quantile(np.median(drawn, axis=1), (0.05, 0.95))
        return float(low), float(high)

    def numbers(self) -> dict[str, Any]:
        """The times and what is made of them, as JSON takes it."""
        return {
            "time_ratio": self.ratio,
            "time_ratio_interval": self.interval,
            "plain_seconds": self.base,
            "seconds": self.other,
        }

    @property
    def _ratios(self) -> np.ndarray:
        return np.asarray(self.other) / np.asarray(self.base)


def time_pairs(base: Callable[[], float], other: Callable[[], float], num_pairs: int) -> Pairs:
    """Runs two functions in turn, the first of a pair being now the one, now the other.

    Args:
        base: runs once, and returns the seconds that it took.
        other: likewise.
        num_pairs: runs of each, besides one to warm up.
    """
    base()
    other()
    pairs = Pairs([], [])
    for index in range(num_pairs):
        runs = [(base, pairs.base), (other, pairs.other)]
        for run, seconds in runs if index % 2 == 0 else reversed(runs):
            seconds.append(run())
    return pairs


def _physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
