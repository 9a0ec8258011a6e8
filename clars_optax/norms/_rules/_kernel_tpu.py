"""The weight gradient with the norms of its parts in one pass: a kernel for TPUs.

As the one for GPUs (`_kernel`), it makes the gradient of one group after another, adds up its
squares, and the gradients of all groups. A TPU does one thing after another, on large tiles: a tile
of the sum stays on the chip while all groups go by.

Written in Pallas. Nothing of it ran on a TPU yet: its results are known from Pallas's interpreter,
its speed from the compiler's schedule.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from clars_optax.norms._rules._blocks import LANES, ROWS, SIDE, Blocks
from clars_optax.norms._rules._geometry import Geometry
from clars_optax.norms._rules._kernel import like
from clars_optax.norms._rules._operands import Apart, Operand, Tile, Together, loop


# A network has the same convolution many times: the kernel is traced for it once.
@functools.partial(
    jax.jit, static_argnames=("geometry", "chip_bytes", "scale", "precision", "interpret")
)
def weight_gradient_and_squares(
    geometry: Geometry,
    x: jax.Array,
    g: jax.Array,
    *,
    chip_bytes: int,
    scale: float,
    precision: Any,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """Runs the kernel.

    Args:
      geometry: where things are.
      x: the images, float32 or bfloat16.
      g: the cotangents, of the same dtype.
      chip_bytes: how many bytes a step may take on the chip.
      scale: a factor for the gradients that are squared.
      precision: that of the products.
      interpret: whether Pallas's interpreter runs it, on any device.

    Returns:
      The weight gradient `[1, taps, D, P]` and the squared norms of the groups' gradients `[G]`,
      both float32.

    Raises:
      ValueError: no step fits into so many bytes.
    """
    # Here, so that the library can be imported where Pallas cannot.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu

    blocks = Blocks.of(geometry, x.dtype.itemsize, chip_bytes)
    if blocks is None:
        raise ValueError(f"No step for {geometry} fits into {chip_bytes} bytes.")
    if blocks.is_swapped:
        x, g = g, x
    if x.dtype == jnp.bfloat16:
        # Its products are exact, and the compiler does not take that they shall be.
        precision = None
    images, cotangents = _operands(blocks, x.dtype)
    views = images.views(x), cotangents.views(g)
    row_parts, column_parts = blocks.rows // blocks.width, blocks.columns // blocks.height
    groups_of_word, num_taps = blocks.groups_of_word, geometry.taps

    def kernel(
        offsets: Any, x_views: Any, g_views: Any, total: Any, squares: Any, scratch: Any
    ) -> None:
        x_stages, g_stages, turned, sums = scratch

        @pl.when(pl.program_id(2) == 0)
        def _() -> None:
            total[...] = jnp.zeros_like(total)

        x_rows = images.prepared(x_views, x_stages)
        g_rows = cotangents.prepared(g_views, g_stages)

        def turn(word: Any, chunk: Any, part: Any) -> None:
            """Once for all taps and input channels."""
            for index, rows in enumerate(g_rows(word, _first(chunk, blocks), part, blocks.height)):
                turned[chunk, part, index] = rows.T

        def products(word: Any, tap: Any, parts: Any, chunk: Any) -> list[jax.Array]:
            row_part, column_part = parts
            start = _first(chunk, blocks)
            if blocks.is_apart:
                start += offsets[tap]
            rows = x_rows(word, start, row_part, blocks.width)
            return [
                jax.lax.dot_general(
                    turned[chunk, column_part, index],
                    some,
                    (((1,), (0,)), ((), ())),
                    precision=precision,
                    preferred_element_type=jnp.float32,
                )
                for index, some in enumerate(rows)
            ]

        def gradients(word: Any, tap: Any, parts: Any) -> list[jax.Array]:
            made = products(word, tap, parts, 0)
            if blocks.chunks == 1:
                return made
            for index, one in enumerate(made):
                sums[index] = one

            def add(chunk: Any, _: None) -> None:
                for index, one in enumerate(products(word, tap, parts, chunk + 1)):
                    sums[index] += one

            loop(blocks.chunks - 1, add, None)
            return [sums[index] for index in range(groups_of_word)]

        def of_word(word: Any, _: None) -> None:
            loop(
                blocks.chunks * column_parts,
                lambda index, _: turn(word, *_divided(index, column_parts)),
                None,
            )

            def add(index: Any, found: list[jax.Array]) -> list[jax.Array]:
                rest, column_part = _divided(index, column_parts)
                tap, row_part = _divided(rest, row_parts)
                made = gradients(word, tap, (row_part, column_part))
                total[tap, row_part, column_part] += sum(made)
                # Scaled first: the square of a cotangent that holds 1 / N may underflow.
                more = [jnp.square(one * scale).reshape(-1, ROWS, blocks.width) for one in made]
                return [sum_ + jnp.sum(one, axis=0) for sum_, one in zip(found, more, strict=True)]

            zeros = [jnp.zeros((ROWS, blocks.width), jnp.float32)] * groups_of_word
            for index, found in enumerate(loop(num_taps * row_parts * column_parts, add, zeros)):
                lanes = range(0, blocks.width, LANES)
                squares[0, 0, word * groups_of_word + index] = sum(
                    found[:, first : first + LANES] for first in lanes
                )

        loop(blocks.words, of_word, None)

    grid = blocks.column_tiles, blocks.row_tiles, blocks.groups // SIDE
    tile = row_parts, column_parts, blocks.height, blocks.width
    total_shape = num_taps, grid[1] * row_parts, grid[0] * column_parts, *tile[2:]
    squares_shape = *grid[:2], blocks.groups, ROWS, LANES
    call = pl.pallas_call(
        kernel,
        grid_spec=tpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[images.specs(), cotangents.specs()],
            out_specs=[
                pl.BlockSpec(
                    (num_taps, *tile),
                    lambda column_tile, row_tile, *_: (0, row_tile, column_tile, 0, 0),
                ),
                pl.BlockSpec(
                    (1, 1, SIDE, ROWS, LANES),
                    lambda column_tile, row_tile, step, _: (column_tile, row_tile, step, 0, 0),
                ),
            ],
            scratch_shapes=[
                (
                    images.stages(),
                    cotangents.stages(),
                    tpu.VMEM(
                        (blocks.chunks, column_parts, groups_of_word, blocks.height, blocks.chunk),
                        x.dtype,
                    ),
                    tpu.VMEM((groups_of_word, *tile[2:]), jnp.float32),
                )
            ],
        ),
        out_shape=like(x, [total_shape, squares_shape]),
        interpret=interpret,
        cost_estimate=pl.CostEstimate(
            flops=2 * blocks.groups * geometry.uses * geometry.entries,
            bytes_accessed=blocks.groups * blocks.loaded * x.dtype.itemsize
            + 4 * (math.prod(total_shape) + math.prod(squares_shape)),
            transcendentals=0,
        ),
        compiler_params=tpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=blocks.bytes * 5 // 4 + 2**20,
        ),
        name="weight_gradient_and_norms",
    )
    total, squares = call(jnp.asarray(blocks.offsets, jnp.int32), *views)
    total = total.transpose(0, 1, 4, 2, 3).reshape(1, num_taps, blocks.inner, blocks.outer)
    total = total[:, :, : blocks.geometry.inner, : blocks.geometry.outer]
    if blocks.is_swapped:
        total = total.swapaxes(2, 3)
    return total, jnp.sum(squares, axis=(0, 1, 3, 4))[: geometry.groups]


def _operands(blocks: Blocks, dtype: Any) -> tuple[Operand, Operand]:
    """Those of the images and of the cotangents."""
    x_tile = Tile(blocks.geometry.inner, blocks.rows, axis=1)
    g_tile = Tile(blocks.geometry.outer, blocks.columns, axis=0)
    if not blocks.is_apart:
        return Together(blocks, x_tile), Together(blocks, g_tile)
    return (
        Apart(blocks, x_tile, dtype, blocks.pixels, blocks.image_rows, blocks.image_runs),
        Apart(blocks, g_tile, dtype, blocks.uses, blocks.cotangent_rows, blocks.cotangent_runs),
    )


def _first(chunk: Any, blocks: Blocks) -> Any:
    """The first row of a chunk."""
    from jax.experimental import pallas as pl

    if blocks.chunks == 1:
        return 0
    return pl.multiple_of(chunk * blocks.chunk, math.gcd(blocks.chunk, LANES))


def _divided(index: Any, number: int) -> tuple[Any, Any]:
    """Quotient and remainder, which a TPU works out one by one."""
    return (index, 0) if number == 1 else (jax.lax.div(index, number), jax.lax.rem(index, number))
