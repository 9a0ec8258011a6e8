"""Matrix products: `dot_general` with the parameter on either side."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clars_optax.norms._rules._fused import fused
from clars_optax.norms._rules._geometry import Geometry
from clars_optax.norms._rules._products import Sizes, by_gram, direct, gradients, merged
from clars_optax.norms._rules._ways import Platform, Way


class Dense:
    """A product of a parameter and of values whose free axes carry the batch.

    Args:
      side: which operand the parameter is, 0 or 1.
      dimension_numbers: those of `dot_general`.
      precision: that of `dot_general`.
      shapes: those of its operands.
    """

    def __init__(
        self, side: int, dimension_numbers: Any, precision: Any, shapes: Sequence[Sequence[int]]
    ):
        contracted, blocks = dimension_numbers
        other = 1 - side
        self._precision = precision
        self._shape = tuple(shapes[side])
        self._w = _Axes(blocks[side], contracted[side], len(shapes[side]))
        self._x = _Axes(blocks[other], contracted[other], len(shapes[other]))
        # In the result, the free axes of the left operand come before those of the right one.
        start = len(self._x.blocks)
        widths = len(self._x.free), len(self._w.free)
        uses, outer = (start + widths[1], start) if side == 0 else (start, start + widths[0])
        self._uses = range(uses, uses + widths[0])
        self._outer = range(outer, outer + widths[1])

    def ways(self, x: jax.Array, g: jax.Array, scale: float, device: Platform) -> list[Way]:
        """The ways to the squared norms, from arrays `[G, b, *axes]`."""
        a, c = self._canonical(x, g)
        num_groups, num_blocks, uses, inner = a.shape
        sizes = Sizes(num_groups, num_blocks, uses, inner, outer=c.shape[-1])

        def rows(a: jax.Array, c: jax.Array) -> jax.Array:
            return gradients(a, c, self._precision)

        geometry = Geometry(num_groups, num_blocks, uses, (), inner, sizes.outer, blocks_first=True)

        def by_direct(a: jax.Array, c: jax.Array) -> Way:
            chunk_bytes = device.chunk_bytes
            return direct(sizes, rows, self._place, [a, c], scale, chunk_bytes=chunk_bytes)

        return [
            by_direct(a, c),
            by_gram(sizes, lambda: (a, c), scale, self._precision, a.nbytes + c.nbytes),
            *fused(
                geometry,
                a,
                c,
                scale,
                self._place,
                precision=self._precision,
                device=device,
                direct=lambda a, c: by_direct(a, c).run(),
            ),
        ]

    def gradient(self, x: jax.Array, g: jax.Array) -> jax.Array:
        """The weight gradient, from arrays `[N, 1, *axes]`."""
        a, c = (x.swapaxes(0, 1).reshape(x.shape[1], -1, x.shape[3]) for x in self._canonical(x, g))
        # With one axis to add up XLA's CPU backend needs no transposed copy of an operand.
        numbers: Any = (((1,), (1,)), ((0,), (0,)))
        if len(a) == 1:
            a, c, numbers = a[0], c[0], (((0,), (0,)), ((), ()))
        total = jax.lax.dot_general(
            a, c, numbers, precision=self._precision, preferred_element_type=jnp.float32
        )
        return self._place(total)

    def _canonical(self, x: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`[G, blocks, uses, inner]` and `[G, blocks, uses, outer]`."""
        blocks = range(len(self._x.blocks))
        return (
            merged(
                x, [0], _later(self._x.blocks), [1, *_later(self._x.free)], _later(self._x.inner)
            ),
            merged(g, [0], _later(blocks), [1, *_later(self._uses)], _later(self._outer)),
        )

    def _place(self, gradient: jax.Array) -> jax.Array:
        order = (*self._w.blocks, *self._w.inner, *self._w.free)
        return gradient.reshape([self._shape[i] for i in order]).transpose(np.argsort(order))


class _Axes:
    """The axes of an operand: those of the blocks, those that are summed over, and the others."""

    def __init__(self, blocks: Sequence[int], inner: Sequence[int], rank: int):
        self.blocks = tuple(blocks)
        self.inner = tuple(inner)
        self.free = tuple(i for i in range(rank) if i not in {*blocks, *inner})


def _later(axes: Sequence[int]) -> list[int]:
    """The axes after two more have come first."""
    return [axis + 2 for axis in axes]
