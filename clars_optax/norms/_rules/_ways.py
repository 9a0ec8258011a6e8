"""Which way to the squared norms is the cheapest."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

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
      name: of the way, as `docs/engine.md` has it.
      flops: floating-point operations in large products, or more where these wait for memory.
      small_flops: those in many small products.
      moved: bytes that are written to or read from memory.
      run: does it.
      saved: likewise of the ordinary weight gradient, where that is a by-product.
      reread: bytes of the operands and of copies of them, as often as they are read or written
        besides.
      unfolded: bytes of patches, and of what else is put together from shifted copies, as often as
        they are read or written.
    """

    name: str
    flops: float
    small_flops: float
    moved: float
    run: Callable[[], Squares]
    saved: float = 0.0
    reread: float = 0.0
    unfolded: float = 0.0


@dataclass(frozen=True)
class Platform:
    """What costs how much on a kind of device.

    Attributes:
      flops_per_byte: operations that a large product does while memory moves one byte.
      small_factor: how many times longer an operation takes in a small product.
      chunk_bytes: about how many bytes of single gradients to make at a time.
      reread_factor: how much of another byte moved one counts that was just read or written.
      unfold_factor: how much such a byte of patches counts.
      kernel_factor: how many times longer an operation takes in the kernels.
      vector_factor: likewise in a TPU's kernel without products.
      cache_factor: how many bytes a cache moves while memory moves one.
      splits_sums: whether XLA cuts long sums in parts.
      makes_all: whether the norms of all examples cost no more than those of some.
      kernels: the kind of device whose kernels can be run, if any.
      interprets: whether they run in Pallas's interpreter, on any device.
      chip_bytes: how much a step of a TPU's kernel may have on the chip.
    """

    flops_per_byte: float
    small_factor: float
    chunk_bytes: int
    reread_factor: float = 0.0
    unfold_factor: float = 1.0
    kernel_factor: float = 1.0
    vector_factor: float = 1.0
    cache_factor: float = 1.0
    splits_sums: bool = False
    makes_all: bool = False
    kernels: Literal["none", "gpu", "tpu"] = "none"
    interprets: bool = False
    chip_bytes: int = 0


def cost(way: Way, device: Platform, *, needs_gradient: bool) -> float:
    """What a way costs, in operations.

    Args:
      way: the way.
      device: what the program will run on.
      needs_gradient: whether a gradient that comes as a by-product is of use.
    """
    moved = way.moved + device.reread_factor * way.reread + device.unfold_factor * way.unfolded
    return (
        way.flops
        + device.small_factor * way.small_flops
        + device.flops_per_byte * moved
        - (way.saved if needs_gradient else 0.0)
    )


def cheapest(ways: Sequence[Way], device: Platform, *, needs_gradient: bool) -> Way:
    """The way that costs least; arguments as those of `cost`."""
    return min(ways, key=lambda way: cost(way, device, needs_gradient=needs_gradient))
