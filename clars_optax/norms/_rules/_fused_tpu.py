"""Fused on a TPU."""

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from clars_optax.norms._rules._blocks import LANES, SIDE, Blocks
from clars_optax.norms._rules._geometry import Geometry
from clars_optax.norms._rules._guarded import Direct, guarded
from clars_optax.norms._rules._kernel_tpu import weight_gradient_and_squares
from clars_optax.norms._rules._shares import Kernel
from clars_optax.norms._rules._trial import is_right, try_on_tpu
from clars_optax.norms._rules._ways import Platform, Squares, Way

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
    if x.dtype not in (jnp.float32, jnp.bfloat16) or x.dtype != g.dtype:
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
    uses = blocks.chunks * math.ceil(blocks.chunk / LANES) * LANES

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


def _few(geometry: Geometry) -> Geometry:
    """The same with two steps' groups: what becomes of one does not depend on their number."""
    return replace(geometry, groups=2 * SIDE)
