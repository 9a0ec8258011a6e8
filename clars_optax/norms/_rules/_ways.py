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
      flops: floating-point operations in large products.
      small_flops: those in many small products.
      moved: bytes that are written to or read from memory.
      run: does it.
      saved: operations of the ordinary weight gradient, where that is a by-product.
    """

    flops: float
    small_flops: float
    moved: float
    run: Callable[[], Squares]
    saved: float = 0.0


@dataclass(frozen=True)
class Platform:
    """What costs how much on a kind of device.

    Attributes:
      flops_per_byte: operations that a large product does while memory moves one byte.
      small_factor: how many times longer an operation takes in a small product.
      chunk_bytes: about how many bytes of single gradients to make at a time.
    """

    flops_per_byte: float
    small_factor: float
    chunk_bytes: int


_PLATFORMS = {
    # Measured, two cores with AVX-512. What is made at a time stays in the cache.
    "cpu": Platform(8.0, 3.0, 2 * 2**20),
    # From data sheets, bfloat16; not measured. Few large steps keep such a device busy.
    "gpu": Platform(150.0, 2.0, 256 * 2**20),
    "tpu": Platform(230.0, 2.0, 64 * 2**20),
}


def platform() -> Platform:
    """The kind of device that programs run on by default."""
    return _PLATFORMS.get(jax.default_backend(), _PLATFORMS["gpu"])


def cheapest(ways: Sequence[Way], device: Platform, *, needs_gradient: bool) -> Way:
    """The way that costs least.

    Args:
      ways: the ways there are.
      device: what the program will run on.
      needs_gradient: whether a gradient that comes as a by-product is of use.
    """

    def cost(way: Way) -> float:
        return (
            way.flops
            + device.small_factor * way.small_flops
            + device.flops_per_byte * way.moved
            - (way.saved if needs_gradient else 0.0)
        )

    return min(ways, key=cost)
