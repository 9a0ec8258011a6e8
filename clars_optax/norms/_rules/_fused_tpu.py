"""Fused on a TPU."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from clars_optax.norms._rules._blocks import LANES, SIDE, Blocks, filled
from clars_optax.norms._rules._depthwise_tpu import Bands, gradients_of_groups
from clars_optax.norms._rules._geometry import Geometry
from clars_optax.norms._rules._guarded import Direct, guarded, guarded_rows
from clars_optax.norms._rules._kernel_tpu import weight_gradient_and_squares
from clars_optax.norms._rules._shares import Kernel
from clars_optax.norms._rules._trial import is_right, try_depthwise_on_tpu, try_on_tpu
from clars_optax.norms._rules._ways import Platform, Squares, Way

_DTYPES = (jnp.float32, jnp.bfloat16)

# Higher ones are not made.
_PRECISIONS = (None, jax.lax.Precision.DEFAULT, jax.lax.Precision.HIGHEST)


def fused_on_tpu(
    geometry: Geometry,
    x: jax.Array,
    g: jax.Array,
    scale: float,
    place: Callable[[jax.Array], jax.Array],
    *,
    precision: Any,
    device: Platform,
    direct: Direct,
) -> list[Way]:
    """The way through a TPU's kernel, where there is one; arguments as those of `fused`."""
    if x.dtype not in _DTYPES or x.dtype != g.dtype:
        return []
    if precision not in _PRECISIONS:
        return []
    blocks = Blocks.of(geometry, x.dtype.itemsize, device.chip_bytes)
    if blocks is None:
        return []
    if not (
        device.interprets
        or is_right(try_on_tpu, _few(geometry), x.dtype.name, precision, device.chip_bytes)
    ):
        return []
    run = functools.partial(
        weight_gradient_and_squares,
        chip_bytes=device.chip_bytes,
        scale=scale,
        precision=precision,
        interpret=device.interprets,
    )

    def placed(total: jax.Array, squares: jax.Array) -> Squares:
        return Squares(squares, place(total))

    way = guarded(Kernel(run, ("btdp", "n"), lambda _: 0), placed, geometry, direct, device)
    entries = geometry.taps * blocks.inner * blocks.outer
    # The unit for products takes as long for fewer.
    uses = blocks.chunks * filled(blocks.chunk, LANES)

    def read(entries: int) -> float:
        return device.flops_per_byte * x.dtype.itemsize * blocks.groups * entries

    # Products go on while operands are loaded. The ordinary weight gradient waits for them as well.
    flops = max(device.kernel_factor * 2.0 * blocks.groups * uses * entries, read(blocks.loaded))
    written = 4.0 * (entries + 8 * LANES * blocks.groups * blocks.row_tiles * blocks.column_tiles)
    saved = max(
        2.0 * geometry.groups * geometry.uses * geometry.entries,
        read(blocks.pixels * blocks.inner + blocks.uses * blocks.outer),
    )
    return [Way("Fused", flops, 0.0, 2 * written, lambda: way(x, g), saved=saved)]


def fused_depthwise_on_tpu(
    geometry: Geometry,
    x: jax.Array,
    g: jax.Array,
    scale: float,
    place: Callable[[jax.Array], jax.Array],
    *,
    device: Platform,
    direct: Direct,
) -> list[Way]:
    """Likewise for depthwise convolutions; arguments as those of `fused_depthwise`."""
    if x.dtype not in _DTYPES or x.dtype != g.dtype:
        return []
    bands = Bands.of(geometry, x.dtype.itemsize, device.chip_bytes)
    if bands is None:
        return []
    few = _few_registers(geometry, bands)
    if not (device.interprets or is_right(try_depthwise_on_tpu, few, x.dtype.name, bands)):
        return []
    run = functools.partial(gradients_of_groups, bands=bands, interpret=device.interprets)
    kernel = Kernel(run, ("ntc",), lambda _: 0)
    way = guarded_rows(kernel, scale, place, geometry, direct, device)
    made = device.vector_factor * 2.0 * geometry.groups * geometry.uses * geometry.entries
    read = device.flops_per_byte * (x.nbytes + g.nbytes)
    flops = max(device.kernel_factor * made, read)
    rows_bytes = 4.0 * geometry.groups * geometry.entries
    # XLA's own derivative has no product, either.
    return [Way("Fused", flops, 0.0, 4 * rows_bytes, lambda: way(x, g), saved=max(made, read))]


def _few(geometry: Geometry) -> Geometry:
    """The same with two steps' groups: what becomes of one does not depend on their number."""
    return replace(geometry, groups=2 * SIDE)


def _few_registers(geometry: Geometry, bands: Bands) -> Geometry:
    """The same with as many examples and channels as a register has."""
    groups, blocks = bands.side, LANES
    if bands.has_examples_inside:
        groups, blocks = blocks, groups
    return replace(geometry, groups=groups, images=1, blocks=blocks)
