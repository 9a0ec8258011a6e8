"""The gradients of all groups for a kernel that sees one channel at a time: a kernel for TPUs.

A register holds a pixel of eight examples for 128 channels, or of eight channels for 128 examples:
XLA keeps innermost what leaves fewer lanes empty, and both are the same to a kernel that has
nothing to do but multiply and add. Images come in parts, rows of pixels that overlap where taps
reach over their ends, and margins are left out, so that nothing is copied.

In Pallas, like `_kernel_tpu`, of which all else holds here.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from clars_optax.norms._rules._blocks import LANES, ROWS, filled
from clars_optax.norms._rules._geometry import Geometry, Window
from clars_optax.norms._rules._kernel import like
from clars_optax.norms._rules._operands import loop

# Taps of a row whose sums are in registers at a time.
_TAPS = 9

# Positions of a row that a step of a loop goes through, about.
_POSITIONS = 12


@dataclass(frozen=True)
class Bands:
    """How the work is cut.

    Attributes:
      rows: how the rows of an image meet those of a kernel.
      columns: likewise of the columns.
      itemsize: bytes of an entry.
      has_examples_inside: whether the examples lie in the lanes, and not the channels.
      number: parts of an image, one step each.
    """

    rows: Window
    columns: Window
    itemsize: int
    has_examples_inside: bool
    number: int

    @classmethod
    def of(cls, geometry: Geometry, itemsize: int, chip_bytes: int) -> "Bands | None":
        """Cuts it so that a step fits into so many bytes on the chip; None if none does."""
        windows = geometry.windows
        if geometry.outer > 1 or len(windows) > 2 or any(window.spread > 1 for window in windows):
            return None
        *rows, columns = windows
        (row,) = rows or [Window(1, 1, 1)]
        examples, channels = geometry.groups * geometry.images, geometry.blocks
        # As far as its compiler shows, for arrays in two bytes and in four.
        is_inside = filled(examples, LANES) * filled(channels, ROWS) < (
            filled(channels, LANES) * filled(examples, ROWS)
        )
        found = (
            cls(row, columns, itemsize, is_inside, number) for number in range(1, row.positions + 1)
        )
        return next((bands for bands in found if bands.bytes <= chip_bytes), None)

    @property
    def entries_of_word(self) -> int:
        """Entries that share a word of 32 bits, one above the other."""
        return 4 // self.itemsize

    @property
    def side(self) -> int:
        """Examples of a step, or channels where examples lie inside."""
        return ROWS * self.entries_of_word

    @property
    def positions(self) -> int:
        """Rows of positions of a step."""
        return math.ceil(self.rows.positions / self.number)

    @property
    def pixels(self) -> int:
        """Rows of pixels of a step."""
        return min(self.rows.pixels, replace(self.rows, positions=self.positions).span)

    @property
    def bytes(self) -> int:
        """What a step needs on the chip: this one's, and what is loaded for the next one."""
        pixels = self.pixels * self.columns.pixels + self.positions * self.columns.positions
        sums = 4 * self.rows.taps * self.columns.taps * self.entries_of_word
        return 2 * ROWS * LANES * (4 * pixels + sums)

    def first_pixel(self, step: Any) -> Any:
        """The first row of pixels of a step."""
        first = step * (self.positions * self.rows.stride) - self.rows.padding
        return jnp.clip(first, 0, self.rows.pixels - self.pixels)


# A network has the same convolution many times: the kernel is traced for it once.
@functools.partial(jax.jit, static_argnames=("geometry", "bands", "interpret"))
def gradients_of_groups(
    geometry: Geometry, x: jax.Array, g: jax.Array, *, bands: Bands, interpret: bool
) -> tuple[jax.Array]:
    """Runs the kernel.

    Args:
      geometry: where things are; one input channel and one output channel for a block.
      x: the images, float32 or bfloat16.
      g: the cotangents, of the same dtype.
      bands: how the work is cut.
      interpret: whether Pallas's interpreter runs it, on any device.

    Returns:
      The gradients `[G, taps, B]`, float32, in a tuple.
    """
    # Here, so that the library can be imported where Pallas cannot.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu

    rows, columns, per_word = bands.rows, bands.columns, bands.entries_of_word

    def turned(z: jax.Array, height: int, width: int) -> jax.Array:
        z = z.reshape(-1, height, width, geometry.blocks)
        return z.transpose((1, 2, 3, 0) if bands.has_examples_inside else (1, 2, 0, 3))

    x = turned(x, rows.pixels, columns.pixels)
    g = turned(g, rows.positions, columns.positions)
    side, lanes = x.shape[2:]

    def kernel(x_ref: Any, g_ref: Any, sums_ref: Any) -> None:
        step = pl.program_id(2)
        if per_word > 1:
            x_ref, g_ref = (ref.bitcast(jnp.uint32) for ref in (x_ref, g_ref))

        @pl.when(step == 0)
        def _() -> None:
            sums_ref[...] = jnp.zeros_like(sums_ref)

        def of_row_of_taps(tap: Any, _: None) -> None:
            # From here on, positions are those of the step.
            start = step * bands.positions
            shift = rows.pixel(start, tap)

            def add_row(taps: range, row: Any, sums: list[jax.Array]) -> list[jax.Array]:
                pixel = row * rows.stride + shift
                is_inside = (pixel >= 0) & (pixel < rows.pixels)
                is_inside &= start + row < rows.positions
                here = x_ref.at[pixel - bands.first_pixel(step)]
                return jax.lax.cond(
                    is_inside,
                    lambda sums: _of_row(columns, taps, here, g_ref.at[row], sums),
                    lambda sums: sums,
                    sums,
                )

            for first in range(0, columns.taps, _TAPS):
                taps = range(first, min(first + _TAPS, columns.taps))
                zeros = [jnp.zeros((ROWS, LANES), jnp.float32)] * (per_word * len(taps))
                sums = loop(bands.positions, functools.partial(add_row, taps), zeros)
                for index, (of_tap, part) in enumerate(itertools.product(taps, range(per_word))):
                    sums_ref[tap * columns.taps + of_tap, part] += sums[index]

        loop(rows.taps, of_row_of_taps, None)

    grid = math.ceil(lanes / LANES), math.ceil(side / bands.side), bands.number
    # An array need not end where a step does.
    whole = pl.Element(bands.side, (0, -side % bands.side)), pl.Element(LANES, (0, -lanes % LANES))
    call = pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[
            pl.BlockSpec(
                (pl.Element(bands.pixels), pl.Element(columns.pixels), *whole),
                lambda lane, row, step: (
                    *(bands.first_pixel(step), 0),
                    *(row * bands.side, lane * LANES),
                ),
            ),
            pl.BlockSpec(
                (bands.positions, columns.positions, bands.side, LANES),
                lambda lane, row, step: (step, 0, row, lane),
            ),
        ],
        out_specs=[
            pl.BlockSpec(
                (geometry.taps, per_word, ROWS, LANES),
                lambda lane, row, step: (0, 0, row, lane),
            )
        ],
        out_shape=like(x, [(geometry.taps, per_word, grid[1] * ROWS, lanes)]),
        interpret=interpret,
        cost_estimate=pl.CostEstimate(
            flops=2 * geometry.groups * geometry.uses * geometry.entries,
            bytes_accessed=x.nbytes + g.nbytes,
            transcendentals=0,
        ),
        compiler_params=tpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=bands.bytes + 2**22,
        ),
        name="depthwise_gradients",
    )
    (sums,) = call(x, g)
    # Those of a word are neighbours.
    sums = sums.swapaxes(1, 2).reshape(geometry.taps, -1, lanes)[:, :side]
    order = (2, 0, 1) if bands.has_examples_inside else (1, 0, 2)
    sums = sums.transpose(order).reshape(geometry.groups, -1, geometry.taps, geometry.blocks)
    return (sums.sum(1),)


def _of_row(
    columns: Window, taps: range, x: Any, g: Any, sums: Sequence[jax.Array]
) -> list[jax.Array]:
    """Adds a row of cotangents times what some taps of a row meet of a row of pixels.

    Args:
      columns: how the columns of the image meet those of the kernel.
      taps: which ones.
      x: the pixels, words `[columns, rows of a register, LANES]`.
      g: the cotangents, likewise.
      sums: what has been added up, for each tap and part of a word.
    """

    def is_met(position: int, tap: int) -> bool:
        return 0 <= columns.pixel(position, tap) < columns.pixels

    def add(
        position: Any, number: int, sums: Sequence[jax.Array], met: Sequence[int]
    ) -> list[jax.Array]:
        """Some positions, and the taps that each of them has."""
        sums = list(sums)
        load = functools.cache(lambda pixel: _entries(x[position * columns.stride + pixel]))
        for index in range(number):
            cotangents = _entries(g[position + index])
            for tap in met:
                pixels = load(columns.pixel(index, tap))
                place = (tap - taps[0]) * len(cotangents)
                for part, (a, c) in enumerate(zip(pixels, cotangents, strict=True)):
                    sums[place + part] += a * c
        return sums

    whole = [p for p in range(columns.positions) if all(is_met(p, tap) for tap in taps)]
    ends = sorted({*range(columns.positions)} - {*whole})
    for position in ends:
        sums = add(position, 1, sums, [tap for tap in taps if is_met(position, tap)])
    if not whole:
        return list(sums)
    number = math.ceil(len(whole) / _POSITIONS)
    size = len(whole) // number
    sums = loop(
        number, lambda index, sums: add(whole[0] + index * size, size, sums, taps), list(sums)
    )
    return add(whole[0] + number * size, len(whole) - number * size, sums, taps)


def _entries(words: jax.Array) -> list[jax.Array]:
    """Those in words of one float32, or of two bfloat16."""
    if words.dtype == jnp.float32:
        return [words]
    high = words & jnp.uint32(0xFFFF0000)
    return [jax.lax.bitcast_convert_type(bits, jnp.float32) for bits in (words << 16, high)]
