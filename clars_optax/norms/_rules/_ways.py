"""Which way to the squared norms is the cheapest: one function, one table."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax


class Squares(NamedTuple):
    """What a rule finds.

    Attributes:
      squares: the squared norms of the groups' gradients, float32 `[G]`.
      gradient: the sum of the groups' gradients, float32, shaped as the parameter is, where it came
        for free.
    """

    squares: jax.Array
    gradient: jax.Array | None


@dataclass(frozen=True)
class Way:
    """A way to the squared norms.

    Attributes:
      flops: floating-point operations.
      moved: bytes that are written to or read from memory.
      run: does it.
      saved: operations of the ordinary weight gradient, where that is a by-product.
    """

    flops: float
    moved: float
    run: Callable[[], Squares]
    saved: float = 0.0


_FLOPS_PER_BYTE = {"cpu": 40.0, "gpu": 200.0, "tpu": 200.0}
"""How many operations a large product does while memory moves one byte, by platform."""


def cheapest(ways: Sequence[Way], platform: str, *, needs_gradient: bool) -> Way:
    """The way that costs least.

    Args:
      ways: the ways there are.
      platform: what the program will run on: "cpu", "gpu" or "tpu".
      needs_gradient: whether a gradient that comes as a by-product is of use.
    """
    per_byte = _FLOPS_PER_BYTE.get(platform, _FLOPS_PER_BYTE["gpu"])

    def cost(way: Way) -> float:
        return way.flops - (way.saved if needs_gradient else 0.0) + per_byte * way.moved

    return min(ways, key=cost)
