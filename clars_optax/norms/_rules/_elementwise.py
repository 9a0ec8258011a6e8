"""Biases and scales: a parameter that is added to, or multiplied with, every position."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from clars_optax.norms._rules._products import kept, squared, sum_of_rows
from clars_optax.norms._rules._ways import Platform, Squares, Way


class Elementwise:
    """A sum, a difference or a product of a parameter and of values that carry the batch.

    Args:
      primitive: "add", "sub" or "mul".
      position: which operand the parameter is, 0 or 1.
      shape: the shape of the parameter, with as many axes as the other operand has; along those
        of length 1 it is the same for all positions.
    """

    def __init__(self, primitive: str, position: int, shape: Sequence[int]):
        self._shape = tuple(shape)
        self._is_product = primitive == "mul"
        self._sign = -1.0 if primitive == "sub" and position == 1 else 1.0
        self._summed = tuple(axis + 2 for axis, size in enumerate(shape) if size == 1)

    def ways(self, x: jax.Array, g: jax.Array, scale: float, device: Platform) -> list[Way]:
        """The only way to the squared norms, Direct, from arrays `[G, b, *axes]`."""
        del device

        def run() -> Squares:
            rows = kept(self._rows(x, g), g)
            gradient = sum_of_rows(rows) * self._sign
            return Squares(squared(rows * scale), gradient.reshape(self._shape))

        moved = float(g.size * g.dtype.itemsize)
        return [Way("Direct", 2.0 * g.size, 0.0, moved, run, saved=2.0 * g.size)]

    def gradient(self, x: jax.Array, g: jax.Array) -> None:
        """None: the operation's own derivative is as good."""

    def _rows(self, x: jax.Array, g: jax.Array) -> jax.Array:
        """The gradients of the groups, up to their sign: float32 `[G, size]`."""
        x, g = x.astype(jnp.float32), g.astype(jnp.float32)
        kept = [axis for axis in range(2, g.ndim) if axis not in self._summed]
        width = math.prod(self._shape)
        if not self._is_product:
            return jnp.sum(g, axis=(1, *self._summed)).reshape(-1, width)
        is_trailing = kept == list(range(g.ndim - len(kept), g.ndim))
        if width > 1 and is_trailing and all(x.shape[axis] == 1 for axis in kept):
            # One number for each position, as in LayerNorm's scale: products of matrices and
            # vectors, which XLA's CPU backend does many times faster than sums of products.
            positions = g.shape[: g.ndim - len(kept)]
            factors = jnp.broadcast_to(x.reshape(x.shape[: len(positions)]), positions)
            return jax.lax.dot_general(
                factors.reshape(g.shape[0], -1),
                g.reshape(g.shape[0], -1, width),
                (((1,), (1,)), ((0,), (0,))),
                precision=jax.lax.Precision.HIGHEST,
            )
        return jnp.sum(x * g, axis=(1, *self._summed)).reshape(-1, width)
