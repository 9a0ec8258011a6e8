"""The weight gradient with the norms of its parts in one pass: a kernel for GPUs.

A weight gradient is a product over K = groups x uses. A kernel that takes one group after another
holds, when it comes to the end of one, that group's gradient in registers: it squares it and adds
it up, and goes on. Nothing but the sums of squares is written for a group, and a convolution reads
its patches where they lie in the image.

The work is split over tiles of the gradient and over the groups, never within a group. Every
program writes sums of its own, which are then added in a fixed order: the same input gives the same
bits.

Written in Pallas, for its Triton backend. JAX deprecates that since 0.11, and what is to take its
place is for Hopper and later GPUs only. It has been run in Pallas's interpreter and compiled, not
yet on a GPU.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

# Programs to keep a GPU busy: two for each of a Hopper GPU's 132 multiprocessors.
_PROGRAMS = 264


@dataclass(frozen=True)
class Window:
    """How an axis of an image meets an axis of a kernel; positions are those of the result.

    Attributes:
      pixels: size of the image.
      positions: size of the result.
      taps: size of the kernel.
      stride: pixels from position to position.
      dilation: pixels from tap to tap.
      padding: pixels before the image.
      spread: what the pixels are apart, 1 for an image without holes.
    """

    pixels: int
    positions: int
    taps: int
    stride: int = 1
    dilation: int = 1
    padding: int = 0
    spread: int = 1

    @property
    def is_plain(self) -> bool:
        """Whether position and pixel are the same."""
        return self == Window(self.pixels, self.pixels, 1)


@dataclass(frozen=True)
class Geometry:
    """Where the entries of `A` and of the cotangent lie; letters as in `_products`.

    The image is `[G, images, *pixels, B * D]` or `[G, B, images, *pixels, D]`, the cotangent has
    the same order of axes, with positions and P.

    Attributes:
      groups: number of groups G.
      blocks: number of blocks B.
      images: examples of a group, and what else shares their axis.
      windows: one for each axis of the images.
      inner: number of input channels of a block, D.
      outer: number of output channels of a block, P.
      blocks_first: which of the two orders it is.
    """

    groups: int
    blocks: int
    images: int
    windows: tuple[Window, ...]
    inner: int
    outer: int
    blocks_first: bool

    @property
    def taps(self) -> int:
        """Entries of a kernel."""
        return math.prod(window.taps for window in self.windows)

    @property
    def uses(self) -> int:
        """Uses of the weights by a group, T."""
        return self.images * math.prod(window.positions for window in self.windows)

    @property
    def entries(self) -> int:
        """Entries of the gradient."""
        return self.blocks * self.taps * self.inner * self.outer


@dataclass(frozen=True)
class Tiles:
    """How the work is cut.

    Attributes:
      rows: input channels of a tile of the gradient.
      columns: output channels of a tile.
      uses: uses of the weights that are multiplied at a time.
      row_tiles: tiles side by side, for one block and tap.
      column_tiles: likewise.
      number: tiles of the gradient.
      parts: runs of groups, each with programs of its own.
      steps: how often so many uses are multiplied, to a group's end.
    """

    rows: int
    columns: int
    uses: int
    row_tiles: int
    column_tiles: int
    number: int
    parts: int
    steps: int

    @classmethod
    def of(cls, geometry: Geometry, itemsize: int) -> "Tiles":
        """Chooses sizes for arrays of `itemsize` bytes an entry."""
        rows = _power_of_two(geometry.inner, 64)
        columns = _power_of_two(geometry.outer, 128)
        row_tiles = math.ceil(geometry.inner / rows)
        column_tiles = math.ceil(geometry.outer / columns)
        number = geometry.blocks * geometry.taps * row_tiles * column_tiles
        parts = min(geometry.groups, math.ceil(_PROGRAMS / number))
        uses = _power_of_two(geometry.uses, 128 // itemsize)
        steps = math.ceil(geometry.uses / uses)
        return cls(rows, columns, uses, row_tiles, column_tiles, number, parts, steps)

    @property
    def entries(self) -> int:
        """Entries of all tiles, those beyond the gradient's edges among them."""
        return self.number * self.rows * self.columns


def _power_of_two(size: int, largest: int) -> int:
    """The next power of two, but at least 16, which products need, and at most `largest`."""
    return max(16, min(largest, 1 << (size - 1).bit_length()))


def weight_gradient_and_squares(
    geometry: Geometry,
    x: jax.Array,
    g: jax.Array,
    *,
    scale: float,
    precision: Any,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """Runs the kernel.

    Args:
      geometry: where things are.
      x: the images.
      g: the cotangents, of the same dtype.
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

    tiles = Tiles.of(geometry, x.dtype.itemsize)
    size, length = geometry.groups, math.ceil(geometry.groups / tiles.parts)

    def kernel(x_ref: Any, g_ref: Any, total_ref: Any, squares_ref: Any) -> None:
        tile, part = pl.program_id(0), pl.program_id(1)
        rest, column_tile = jnp.divmod(tile, tiles.column_tiles)
        rest, row_tile = jnp.divmod(rest, tiles.row_tiles)
        block, tap = jnp.divmod(rest, geometry.taps)
        rows = row_tile * tiles.rows + jnp.arange(tiles.rows, dtype=jnp.int32)
        columns = column_tile * tiles.columns + jnp.arange(tiles.columns, dtype=jnp.int32)

        def gradient(group: jax.Array, step: jax.Array) -> jax.Array:
            uses = step * tiles.uses + jnp.arange(tiles.uses, dtype=jnp.int32)
            x_starts, g_starts, is_inside = _starts(geometry, group, block, tap, uses)
            a = triton.load(
                x_ref.at[x_starts[:, None] + rows[None, :]],
                mask=is_inside[:, None] & (rows < geometry.inner)[None, :],
                other=0,
            )
            c = triton.load(
                g_ref.at[g_starts[:, None] + columns[None, :]],
                mask=(uses < geometry.uses)[:, None] & (columns < geometry.outer)[None, :],
                other=0,
            )
            return triton.dot(a, c, trans_a=True, precision=precision)

        zeros = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)

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
        starts = (part * geometry.blocks * geometry.taps + rest) * geometry.inner + rows
        triton.store(
            total_ref.at[starts[:, None] * geometry.outer + columns[None, :]],
            total,
            mask=(rows < geometry.inner)[:, None] & (columns < geometry.outer)[None, :],
        )

    call = pl.pallas_call(
        kernel,
        out_shape=_like(x, [(tiles.parts * geometry.entries,), (tiles.number * size,)]),
        grid=(tiles.number, tiles.parts),
        interpret=interpret,
        compiler_params=triton.CompilerParams(
            # More would compute the same for so small a tile.
            num_warps=min(8, max(1, tiles.rows * tiles.columns // 1024)),
            num_stages=3,
        ),
        name="weight_gradient_and_norms",
    )
    total, squares = call(x.reshape(-1), g.reshape(-1))
    shape = (geometry.blocks, geometry.taps, geometry.inner, geometry.outer)
    return total.reshape(tiles.parts, *shape).sum(0), squares.reshape(-1, size).sum(0)


def _like(x: jax.Array, shapes: Sequence[tuple[int, ...]]) -> Any:
    """Types of float32 results that vary over the mapped axes over which `x` does."""
    return jax.eval_shape(
        lambda x: [jnp.broadcast_to(x.reshape(-1)[0], s).astype(jnp.float32) for s in shapes], x
    )


def _starts(
    geometry: Geometry, group: jax.Array, block: jax.Array, tap: jax.Array, uses: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Offsets of the first channel in image and cotangent for some uses; whether in the image."""
    windows = geometry.windows
    # From the last axis to the first one, as numbers are divided.
    image, indices = uses, []
    for window in reversed(windows):
        image, position = jnp.divmod(image, window.positions)
        tap, of_tap = jnp.divmod(tap, window.taps)
        indices.append((position, of_tap))
    is_inside = uses < geometry.uses
    if geometry.blocks_first:
        x_starts = g_starts = (group * geometry.blocks + block) * geometry.images + image
        x_width, g_width = geometry.inner, geometry.outer
    else:
        x_starts = g_starts = group * geometry.images + image
        x_width, g_width = geometry.blocks * geometry.inner, geometry.blocks * geometry.outer
    for window, (position, of_tap) in zip(windows, reversed(indices), strict=True):
        pixel = position
        if not window.is_plain:
            pixel = position * window.stride + of_tap * window.dilation - window.padding
            is_inside &= (pixel >= 0) & (pixel < window.pixels * window.spread)
            if window.spread > 1:
                pixel, hole = jnp.divmod(pixel, window.spread)
                is_inside &= hole == 0
        x_starts = x_starts * window.pixels + pixel
        g_starts = g_starts * window.positions + position
    x_starts, g_starts = x_starts * x_width, g_starts * g_width
    if not geometry.blocks_first:
        x_starts, g_starts = x_starts + block * geometry.inner, g_starts + block * geometry.outer
    return x_starts, g_starts, is_inside
