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

# An operand of a Gram matrix is read and written for a copy of it, without its mean or scaled, and
# read for the mean or sum, the matrix, and the products along the mean or sum.
GRAM_PASSES = 5


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


def without_underflow(g: jax.Array, scale: float) -> tuple[jax.Array, float]:
    """The cotangent times about `scale`, and the factor that is left over.

    Gram needs it before the product, which would underflow.
    """
    # A power of two is exact in bfloat16; float16 has not the range for it.
    factor = 2.0 ** round(math.log2(scale))
    if g.dtype == jnp.float16:
        g = g.astype(jnp.float32)
    return g * factor, scale / factor


def paired(
    of_inputs: jax.Array,
    of_cotangents: jax.Array,
    along_mean: jax.Array,
    mean_square: jax.Array,
    g: jax.Array,
) -> jax.Array:
    """The squared norms from two Gram matrices, that of the inputs being that of `A - 1 m'`.

    Where inputs have a large mean m, the sum over all pairs of uses would be a small difference of
    large numbers. The gradient is `(A - 1 m')' G + m s'` with `s = G' 1`, whose squared norm is
    taken term by term.

    Args:
      of_inputs: `[G, B, T, T]`, of the inputs less their mean over the uses.
      of_cotangents: `[G, B, T, T]`.
      along_mean: the products of these inputs and the mean, `[G, B, T]`.
      mean_square: the squared length of the mean, `[G, B]`.
      g: the cotangents, `[G, B, T, P]`.
    """
    g = g.astype(jnp.float32)
    total = jnp.sum(g, axis=2)
    mixed = jnp.sum(along_mean * along(g, total), axis=2)
    alone = mean_square * jnp.sum(jnp.square(total), axis=2)
    pairs = jnp.sum(of_inputs * of_cotangents, axis=(2, 3))
    # Where a gradient is zero, rounding may leave less than nothing.
    return jnp.maximum(jnp.sum(pairs + 2 * mixed + alone, axis=1), 0)


def along(x: jax.Array, vector: jax.Array) -> jax.Array:
    """The products of the uses `[G, B, T, D]` with a vector `[G, B, D]`, float32 `[G, B, T]`."""
    return jax.lax.dot_general(
        x.astype(jnp.float32),
        vector,
        (((3,), (2,)), ((0, 1), (0, 1))),
        precision=jax.lax.Precision.HIGHEST,
    )


def centred(x: jax.Array, mean: jax.Array) -> jax.Array:
    """The inputs less their mean, in the inputs' dtype."""
    return (x.astype(jnp.float32) - mean).astype(x.dtype)


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


def _lengths(x: jax.Array) -> jax.Array:
    """The squared lengths along the last axis, `[G, B]` of `[G, B, 1, D]`."""
    x = x[:, :, 0].astype(jnp.float32)
    return jax.lax.dot_general(
        x, x, (((2,), (2,)), ((0, 1), (0, 1))), precision=jax.lax.Precision.HIGHEST
    )


def direct(
    sizes: Sizes,
    rows: Callable[..., jax.Array],
    place: Callable[[jax.Array], jax.Array],
    arrays: Sequence[jax.Array],
    scale: float,
    *,
    chunk_bytes: int,
    unfolded_bytes: float = 0.0,
    name: str = "Direct",
) -> Way:
    """Direct, a chunk of the groups at a time.

    Args:
      sizes: those of the product.
      rows: makes the gradients of some groups, float32, from their part of `arrays`.
      place: brings the sum of gradients into the parameter's shape.
      arrays: what `rows` needs, with the groups on the first axis.
      scale: a factor for the gradients of which the norms are wanted.
      chunk_bytes: how much may be made at a time.
      unfolded_bytes: the patches that `rows` makes, for all groups.
      name: of the way.
    """
    made_bytes = sizes.rows_bytes + unfolded_bytes
    num_chunks = min(sizes.groups, math.ceil(made_bytes / chunk_bytes))
    size = math.ceil(sizes.groups / num_chunks)

    def some(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        made = rows(*arrays)
        return sum_of_rows(made), squared(made * scale)

    def add(total: jax.Array, arrays: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
        added, squares = some(*arrays)
        return total + added, squares

    def run() -> Squares:
        if num_chunks == 1:
            total, squares = some(*arrays)
            return Squares(squares, place(total))
        # In a loop: chunks that stand side by side would all be in memory at once.
        looped = sizes.groups // size * size
        parts = [x[:looped].reshape(-1, size, *x.shape[1:]) for x in arrays]
        # Like the results, so that it varies over the same mapped axes as they do.
        zeros = jnp.zeros_like(some(*(x[0] for x in parts))[0])
        total, squares = jax.lax.scan(add, zeros, parts)
        found = [squares.reshape(-1)]
        if looped < sizes.groups:
            total, squares = add(total, [x[looped:] for x in arrays])
            found.append(squares)
        return Squares(jnp.concatenate(found), place(total))

    # A loop copies what a step of it takes.
    reread = 2.0 * sum(x.nbytes for x in arrays) if num_chunks > 1 else 0.0
    flops = sizes.gradient_flops
    return Way(
        name,
        flops,
        0.0,
        3 * sizes.rows_bytes,
        run,
        saved=flops,
        reread=reread,
        unfolded=2 * unfolded_bytes,
    )


def by_gram(
    sizes: Sizes,
    make: Callable[[], tuple[jax.Array, jax.Array]],
    scale: float,
    precision: Any,
    operand_bytes: float,
    unfolded_bytes: float = 0.0,
) -> Way:
    """Gram.

    Args:
      sizes: those of the product.
      make: the arrays `a` and `g`.
      scale: a factor for the gradients of which the norms are wanted.
      precision: that of the products.
      operand_bytes: the size of `a` and `g`.
      unfolded_bytes: the patches that `make` makes.
    """

    def run() -> Squares:
        a, g = make()
        if sizes.uses == 1:
            lengths = _lengths(a) * _lengths(g.astype(jnp.float32) * scale)
            return Squares(jnp.sum(lengths, axis=1), None)
        g, rest = without_underflow(g, scale)
        mean = jnp.mean(a, axis=2, dtype=jnp.float32)
        a = centred(a, mean[:, :, None])
        mean_square = jnp.sum(jnp.square(mean), axis=2)
        squares = paired(gram(a, precision), gram(g, precision), along(a, mean), mean_square, g)
        return Squares(squares * rest**2, None)

    return Way(
        "Gram",
        0.0,
        sizes.pairs_flops,
        4 * sizes.pairs_bytes,
        run,
        reread=GRAM_PASSES * operand_bytes if sizes.uses > 1 else 0.0,
        unfolded=2 * unfolded_bytes,
    )
