"""Times readers of data that read ahead."""

import time
from collections.abc import Iterator
from typing import Any

# More than any of the readers holds ready, or in the making, when a round begins.
READ_AHEAD = 4


def time_round(batches: Iterator[Any], num_batches: int) -> float:
    """Returns the seconds that so many batches take, those that lay ready not counted."""
    for _ in range(READ_AHEAD):
        next(batches)
    started = time.perf_counter()
    for _ in range(num_batches):
        next(batches)
    return time.perf_counter() - started
