"""Compiles functions and times them side by side."""

import dataclasses
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

    function: Callable[..., Any]
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

    def run(self, args: tuple[Any, ...]) -> float:
        """Runs it once; returns the seconds until all results are there."""
        start = time.perf_counter()
        jax.block_until_ready(self.function(*args))
        return time.perf_counter() - start

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


def time_pairs(base: Compiled, other: Compiled, args: tuple[Any, ...], num_pairs: int) -> Pairs:
    """Runs two functions in turn, the first of a pair being now the one, now the other."""
    base.run(args)
    other.run(args)
    pairs = Pairs([], [])
    for index in range(num_pairs):
        runs = [(base, pairs.base), (other, pairs.other)]
        for compiled, seconds in runs if index % 2 == 0 else reversed(runs):
            seconds.append(compiled.run(args))
    return pairs
