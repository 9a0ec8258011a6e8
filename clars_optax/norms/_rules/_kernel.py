"""The weight gradient with the norms of its parts in one pass: a kernel for GPUs.

A weight gradient is a product over K = groups x uses. A kernel that takes one group after another
holds, when it comes to the end of one, that group's gradient in registers: it squares it and adds
it up, and goes on. Nothing but the sums of squares is written for a group, and a convolution reads
its patches where they lie in the image.

The work is split over tiles of the gradient and over the groups, never within a group. Every
program writes sums of its own, which are then added in a fixed order: the same input gives the same
bits.

Written in Pallas, for its Triton backend. JAX deprecates that since 0.11, and what is to take its
place is for Hopper and later GPUs only. On an H200, tiles wait for operands from the L2 cache,
which gives some 5 TB/s; the two sums of a tile, of the group and of all, leave no registers for a
larger one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clars_optax.norms._rules._geometry import Geometry, padded, row_offsets, starts

# Of a Hopper GPU.
MULTIPROCESSORS = 132


class Sides(NamedTuple):
    """The size of a tile: which kernel it is.

    Attributes:
      rows: those of a tile of the gradient: input channels, of several taps if they are folded.
      columns: output channels of a tile.
      uses: uses of the weights that are multiplied at a time.
    """

    rows: int
    columns: int
    uses: int

    @classmethod
    def of(cls, geometry: Geometry, itemsize: int) -> "Sides":
        """Chooses sizes for arrays of `itemsize` bytes an entry."""
        # What a tile loads for an operation falls with its sides; one for an operand's 32 others.
        rows, columns = (_side(size, 128, 32) for size in (geometry.rows, geometry.outer))
        # A step costs as much as 32 uses more would.
        return cls(rows, columns, _side(geometry.uses, 128 // itemsize, 32))


@dataclass(frozen=True)
class Tiles:
    """How the work is cut.

    Attributes:
      sides: of a tile.
      row_tiles: tiles side by side, for one matrix.
      column_tiles: likewise.
      number: tiles of the gradient.
      parts: runs of groups, each with programs of its own.
      steps: how often so many uses are multiplied, to a group's end.
    """

    sides: Sides
    row_tiles: int
    column_tiles: int
    number: int
    parts: int
    steps: int

    @classmethod
    def of(cls, geometry: Geometry, sides: Sides) -> "Tiles":
        """Cuts it into tiles of a size."""
        rows, columns, uses = sides
        row_tiles = math.ceil(geometry.rows / rows)
        column_tiles = math.ceil(geometry.outer / columns)
        number = geometry.matrices * row_tiles * column_tiles
        # The two sums of the largest tile leave no registers for another program.
        slots = MULTIPROCESSORS if rows * columns == 128**2 else 2 * MULTIPROCESSORS
        parts = min(
            range(1, min(geometry.groups, math.ceil(4 * slots / number)) + 1),
            key=lambda parts: (
                math.ceil(number * parts / slots) * math.ceil(geometry.groups / parts)
            ),
        )
        steps = math.ceil(geometry.uses / uses)
        return cls(sides, row_tiles, column_tiles, number, parts, steps)

    @property
    def entries(self) -> int:
        """Entries of all tiles, those beyond the gradient's edges among them."""
        return self.number * self.sides.rows * self.sides.columns


def _side(size: int, largest: int, overhead: int) -> int:
    """The side of tiles for an axis: a power of two from 16, which products need, to `largest`.

    That for which least is to be done, where a tile costs its side, be it full or not, and
    `overhead`.
    """
    sides = [16]
    while sides[-1] < min(size, largest):
        sides.append(2 * sides[-1])
    return min(reversed(sides), key=lambda side: math.ceil(size / side) * (side + overhead))


def weight_gradient_and_squares(
    geometry: Geometry,
    x: jax.Array,
    g: jax.Array,
    *,
    sides: Sides,
    scale: float,
    precision: Any,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """Runs the kernel.

    Args:
      geometry: where things are.
      x: the images.
      g: the cotangents, of the same dtype.
      sides: the size of a tile.
      scale: a factor for the gradients that are squared.
      precision: that of the products.
      interpret: whether Pallas's interpreter runs it, on any device.

    Returns:
      The weight gradient `[B, taps, D, P]` and the squared norms of the groups' gradients `[G]`,
      both float32.
    """
    # Here, so that the library can be imported where Pallas cannot.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    if geometry.folded:
        geometry, x = padded(geometry, x)
    tiles = Tiles.of(geometry, sides)
    size, length = geometry.groups, math.ceil(geometry.groups / tiles.parts)

    def kernel(x_ref: Any, g_ref: Any, total_ref: Any, squares_ref: Any) -> None:
        tile, part = pl.program_id(0), pl.program_id(1)
        rest, column_tile = jnp.divmod(tile, tiles.column_tiles)
        rest, row_tile = jnp.divmod(rest, tiles.row_tiles)
        block, tap = jnp.divmod(rest, geometry.matrices // geometry.blocks)
        rows = row_tile * sides.rows + jnp.arange(sides.rows, dtype=jnp.int32)
        columns = column_tile * sides.columns + jnp.arange(sides.columns, dtype=jnp.int32)
        offsets = row_offsets(geometry, rows)

        def gradient(group: jax.Array, step: jax.Array) -> jax.Array:
            uses = step * sides.uses + jnp.arange(sides.uses, dtype=jnp.int32)
            x_starts, g_starts, is_inside = starts(geometry, group, block, tap, uses)
            a = triton.load(
                x_ref.at[x_starts[:, None] + offsets[None, :]],
                mask=is_inside[:, None] & (rows < geometry.rows)[None, :],
                other=0,
            )
            c = triton.load(
                g_ref.at[g_starts[:, None] + columns[None, :]],
                mask=(uses < geometry.uses)[:, None] & (columns < geometry.outer)[None, :],
                other=0,
            )
            return triton.dot(a, c, trans_a=True, precision=precision)

        zeros = jnp.zeros((sides.rows, sides.columns), jnp.float32)

        # One loop over all groups: a loop for each would wait for its first loads every time.
        def add(index: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            total, made = sums
            group, step = jnp.divmod(index, tiles.steps)
            made += gradient(group, step)

            def end_of_group() -> tuple[jax.Array, jax.Array]:
                # Scaled first: the square of a cotangent that holds 1 / N may underflow.
                squares_ref[tile * size + group] = jnp.sum(jnp.square(made * scale))
                return total + made, zeros

            if tiles.steps == 1:
                return end_of_group()
            return jax.lax.cond(step == tiles.steps - 1, end_of_group, lambda: (total, made))

        first, last = part * length, jnp.minimum((part + 1) * length, size)
        total, _ = jax.lax.fori_loop(first * tiles.steps, last * tiles.steps, add, (zeros, zeros))
        stored = (part * geometry.matrices + rest) * geometry.rows + rows
        triton.store(
            total_ref.at[stored[:, None] * geometry.outer + columns[None, :]],
            total,
            mask=(rows < geometry.rows)[:, None] & (columns < geometry.outer)[None, :],
        )

    call = pl.pallas_call(
        kernel,
        out_shape=like(x, [(tiles.parts * geometry.entries,), (tiles.number * size,)]),
        grid=(tiles.number, tiles.parts),
        interpret=interpret,
        compiler_params=triton.CompilerParams(
            # Four warps of a Hopper GPU share a product of 64 rows.
            num_warps=sides.rows // 16 if sides.rows >= 64 else max(1, sides.columns // 32),
            num_stages=4,
        ),
        name="weight_gradient_and_norms",
    )
    total, squares = call(x.reshape(-1), g.reshape(-1))
    shape = (geometry.blocks, geometry.taps, geometry.inner, geometry.outer)
    return total.reshape(tiles.parts, *shape).sum(0), squares.reshape(-1, size).sum(0)


def like(x: jax.Array, shapes: Sequence[tuple[int, ...]]) -> Any:
    """Types of float32 results that vary over the mapped axes over which `x` does."""
    return jax.eval_shape(
        lambda x: [jnp.broadcast_to(x.reshape(-1)[0], s).astype(jnp.float32) for s in shapes], x
    )
