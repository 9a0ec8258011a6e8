"""Products y = A W in which every example has its own A: what the rules have in common.

`a` is `[G, B, T, D]` and `g`, the cotangent of y, `[G, B, T, P]`: G groups of examples; B blocks
with weights `[D, P]` of their own (heads, or the groups of a convolution); T uses of the weights by
a group (positions, patches, the examples of the group). The gradient of a group is `A' G`, and its
squared norm is found in one of two ways:

- Direct: form `A' G` and add up its squares. The sum over the groups is the weight gradient, which
  need not be computed otherwise.
- Gram: the sum over all pairs of uses of `A A' * G G'` (Goodfellow, arXiv 1510.01799, for T = 1;
  Rochette, Manoel and Tramel, arXiv 1912.06015, for convolutions).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from clars_optax.norms._rules._ways import Squares, Way

_CHUNK = 8 * 2**20
"""About how many bytes Direct keeps at a time."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of a product, as the module's docstring names them."""

    groups: int
    blocks: int
    uses: int
    inner: int
    outer: int

    @property
    def gradient_flops(self) -> float:
        """Operations of all groups' gradients, or of the weight gradient."""
        return 2.0 * self.groups * self.blocks * self.uses * self.inner * self.outer

    @property
    def pairs_flops(self) -> float:
        """Operations of the two Gram matrices."""
        width = self.inner + self.outer
        return 2.0 * self.groups * self.blocks * self.uses**2 * width

    @property
    def rows_bytes(self) -> float:
        """The size of all groups' gradients."""
        return 4.0 * self.groups * self.blocks * self.inner * self.outer

    @property
    def pairs_bytes(self) -> float:
        """The size of a Gram matrix."""
        return 4.0 * self.groups * self.blocks * self.uses**2


def merged(x: jax.Array, *runs: Sequence[int]) -> jax.Array:
    """Transposes to the given order of axes, each run of which becomes one axis."""
    x = x.transpose([axis for run in runs for axis in run])
    sizes = iter(x.shape)
    return x.reshape([math.prod(next(sizes) for _ in run) for run in runs])


def gradients(a: jax.Array, g: jax.Array, precision: Any) -> jax.Array:
    """The gradients of the groups, float32 `[G, B, D, P]`."""
    return jax.lax.dot_general(
        a,
        g,
        (((2,), (2,)), ((0, 1), (0, 1))),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def gram(a: jax.Array, precision: Any) -> jax.Array:
    """The inner products of all pairs of uses, float32 `[G, B, T, T]`."""
    return jax.lax.dot_general(
        a,
        a,
        (((3,), (3,)), ((0, 1), (0, 1))),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def paired(left: jax.Array, right: jax.Array) -> jax.Array:
    """The squared norms from two Gram matrices."""
    # Where a gradient is zero, rounding may leave less than nothing.
    return jnp.maximum(jnp.sum(left * right, axis=tuple(range(1, left.ndim))), 0)


def squared(rows: jax.Array) -> jax.Array:
    """The sum of the squares of each row, in float32."""
    return jnp.sum(jnp.square(rows.astype(jnp.float32)), axis=tuple(range(1, rows.ndim)))


def sum_of_rows(rows: jax.Array) -> jax.Array:
    """The sum over the first axis."""
    # As a product: XLA's CPU backend takes twenty times as long to add up long rows.
    flat = jax.lax.dot_general(
        jnp.ones(rows.shape[0], rows.dtype),
        rows.reshape(rows.shape[0], -1),
        (((0,), (0,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
    )
    return flat.reshape(rows.shape[1:])


def direct(
    sizes: Sizes,
    rows: Callable[..., jax.Array],
    place: Callable[[jax.Array], jax.Array],
    arrays: Sequence[jax.Array],
    scale: float,
    extra_bytes: float = 0.0,
) -> Way:
    """Direct, a chunk of the groups at a time.

    Args:
      sizes: those of the product.
      rows: makes the gradients of some groups, float32, from their part of `arrays`.
      place: brings the sum of gradients into the parameter's shape.
      arrays: what `rows` needs, with the groups on the first axis.
      scale: a factor for the gradients of which the norms are wanted.
      extra_bytes: what `rows` writes besides the gradients.
    """
    chunk = max(1, int(sizes.groups * _CHUNK / (sizes.rows_bytes + extra_bytes)))

    def run() -> Squares:
        total: Any = None
        squares = []
        for start in range(0, sizes.groups, chunk):
            made = rows(*(x[start : start + chunk] for x in arrays))
            squares.append(squared(made * scale))
            part = sum_of_rows(made)
            total = part if total is None else total + part
        return Squares(jnp.concatenate(squares), place(total))

    moved = 3 * sizes.rows_bytes + 2 * extra_bytes
    return Way(sizes.gradient_flops, moved, run, saved=sizes.gradient_flops)


def by_gram(
    sizes: Sizes,
    make: Callable[[], tuple[jax.Array, jax.Array]],
    scale: float,
    precision: Any,
    extra_bytes: float = 0.0,
) -> Way:
    """Gram.

    Args:
      sizes: those of the product.
      make: the arrays `a` and `g`.
      scale: a factor for the gradients of which the norms are wanted.
      precision: that of the products.
      extra_bytes: what `make` writes.
    """

    def run() -> Squares:
        a, g = make()
        # Scaled first: the square of a cotangent would underflow.
        return Squares(paired(gram(a, precision), gram(g * scale, precision)), None)

    return Way(sizes.pairs_flops, 4 * sizes.pairs_bytes + 2 * extra_bytes, run)
