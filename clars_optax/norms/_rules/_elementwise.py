"""Biases and scales: a parameter that is added to, or multiplied with, every position."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from clars_optax.norms._rules._products import squared, sum_of_rows
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

        def run() -> Squares:
            rows = self.rows(x, g, device)
            return Squares(squared(rows * scale), sum_of_rows(rows))

        moved = float(g.size * g.dtype.itemsize)
        return [Way("Direct", 2.0 * g.size, 0.0, moved, run, saved=2.0 * g.size)]

    def gradient(self, x: jax.Array, g: jax.Array) -> None:
        """None: the operation's own derivative is as good."""

    def rows(self, x: jax.Array, g: jax.Array, device: Platform) -> jax.Array:
        """The gradients of the groups, float32 `[G, *shape]`, from arrays `[G, b, *axes]`."""
        rows = self._rows(x, g, device)
        if rows.size < g.size:
            # They are read twice, for their squares and for their sum. XLA would make the sum of
            # the sums one sum, and read all cotangents once more for it.
            rows = jax.lax.optimization_barrier(rows)
        return (rows * self._sign).reshape(-1, *self._shape)

    def _rows(self, x: jax.Array, g: jax.Array, device: Platform) -> jax.Array:
        """The gradients of the groups, up to their sign: float32 `[G, size]`."""
        x, g = x.astype(jnp.float32), g.astype(jnp.float32)
        kept = [axis for axis in range(2, g.ndim) if axis not in self._summed]
        width = math.prod(self._shape)
        positions = g.shape[: g.ndim - len(kept)]
        is_trailing = kept == list(range(len(positions), g.ndim))
        if not self._is_product:
            terms = g
        elif width > 1 and is_trailing and all(x.shape[axis] == 1 for axis in kept):
            # One number for each position, as in LayerNorm's scale: products of matrices and
            # vectors, which XLA's CPU backend does many times faster than sums of products.
            factors = jnp.broadcast_to(x.reshape(x.shape[: len(positions)]), positions)
            return jax.lax.dot_general(
                factors.reshape(g.shape[0], -1),
                g.reshape(g.shape[0], -1, width),
                (((1,), (1,)), ((0,), (0,))),
                precision=jax.lax.Precision.HIGHEST,
            )
        else:
            terms = x * g
        parts = num_parts(g.shape[0], math.prod(positions[1:])) if is_trailing else 1
        if device.splits_sums and parts > 1:
            sums = jnp.sum(terms.reshape(g.shape[0] * parts, -1, width), axis=1)
            # Else they would be one sum again, cut in XLA's way.
            sums = jax.lax.optimization_barrier(sums)
            return jnp.sum(sums.reshape(-1, parts, width), axis=1)
        return jnp.sum(terms, axis=(1, *self._summed)).reshape(-1, width)


def num_parts(num_groups: int, num_positions: int) -> int:
    """In how many parts to add up the cotangents of a group; one if they do not come out even.

    XLA's GPU backend cuts a long sum in as many as the greatest power of two that is not above the
    square root of its length. Only sums that are cut alike share a kernel, and the batch's own
    sums, those of BatchNorm's derivative, are as long as those of all groups.
    """
    number = 2 ** int(math.log2(math.sqrt(num_groups * num_positions)))
    parts = max(1, number // num_groups)
    return parts if num_positions % parts == 0 else 1
