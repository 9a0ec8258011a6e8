"""Fused: the norms, and the weight gradient with them, in one pass, by kernels for GPUs."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from clars_optax.norms._rules._depthwise import Cuts, gradients_of_groups
from clars_optax.norms._rules._fused_tpu import fused_depthwise_on_tpu, fused_on_tpu
from clars_optax.norms._rules._geometry import Geometry
from clars_optax.norms._rules._guarded import Direct, guarded, guarded_rows
from clars_optax.norms._rules._kernel import Sides, Tiles, weight_gradient_and_squares
from clars_optax.norms._rules._shares import Kernel
from clars_optax.norms._rules._trial import is_right, try_depthwise, try_products
from clars_optax.norms._rules._ways import Platform, Squares, Way

Place = Callable[[jax.Array], jax.Array]


def fused(
    geometry: Geometry,
    x: jax.Array,
    g: jax.Array,
    scale: float,
    place: Place,
    *,
    precision: Any,
    device: Platform,
    direct: Direct,
) -> list[Way]:
    """The way through the kernel for products, where there is one.

    Args:
      geometry: where things are.
      x: the images.
      g: the cotangents.
      scale: a factor for the gradients of which the norms are wanted.
      place: brings the sum of gradients, `[B, taps, D, P]`, into the parameter's shape.
      precision: that of the products.
      device: what the program will run on.
      direct: the same from images and cotangents by other means: for derivatives, and where the
        program turns out to be for another kind of device.
    """
    if device.kernels == "none":
        return []
    precision = _one(precision)
    if device.kernels == "tpu":
        options = {"precision": precision, "device": device, "direct": direct}
        return fused_on_tpu(geometry, x, g, scale, place, **options)
    sides = Sides.of(geometry, x.dtype.itemsize)
    interpret = device.interprets

    run = functools.partial(
        weight_gradient_and_squares,
        sides=sides,
        scale=scale,
        precision=precision,
        interpret=interpret,
    )

    def largest(geometry: Geometry) -> int:
        tiles = Tiles.of(geometry, sides)
        sizes = tiles.parts * geometry.entries, tiles.number * geometry.groups
        return max(geometry.image_entries, geometry.cotangent_entries, *sizes)

    kernel = Kernel(run, ("btdp", "n"), largest)
    # Narrower loads than of four bytes are not made ahead of time; those of a few channels cannot
    # be wider.
    widths = [geometry.outer] if geometry.folded else [geometry.outer, geometry.inner]
    if not (
        _fits(x, g)
        and kernel.takes(geometry)
        and not any(width * x.dtype.itemsize % 4 for width in widths)
        and (precision is None or isinstance(precision, jax.lax.Precision))
    ):
        return []
    tiles = Tiles.of(geometry, sides)
    kind = (*sides, tiles.steps == 1, geometry.folded)
    if not (interpret or is_right(try_products, *kind, x.dtype.name, precision)):
        return []

    def placed(total: jax.Array, squares: jax.Array) -> Squares:
        return Squares(squares, place(total))

    way = guarded(kernel, placed, geometry, direct, device)
    uses = 1.0 * geometry.groups * tiles.steps * sides.uses
    loaded = x.dtype.itemsize * uses * tiles.number * (sides.rows + sides.columns)
    # Products go on while operands are loaded, and both while memory gives them; the ordinary
    # weight gradient waits for memory as well.
    image_bytes = x.dtype.itemsize * geometry.image_entries
    read = device.flops_per_byte * (image_bytes + g.nbytes)
    flops = max(
        device.kernel_factor * 2 * uses * tiles.entries,
        device.flops_per_byte * loaded / device.cache_factor,
        read,
    )
    written = 4.0 * (tiles.parts * geometry.entries + geometry.groups * tiles.number)
    if geometry.folded:
        written += image_bytes
    saved = max(2.0 * geometry.groups * geometry.uses * geometry.entries, read)
    return [Way("Fused", flops, 0.0, 2 * written, lambda: way(x, g), saved=saved)]


def fused_depthwise(
    geometry: Geometry,
    x: jax.Array,
    g: jax.Array,
    scale: float,
    place: Place,
    *,
    device: Platform,
    direct: Direct,
) -> list[Way]:
    """The way through the kernel for depthwise convolutions, where there is one.

    Args:
      geometry: where things are; one input channel for a block.
      x: the images.
      g: the cotangents.
      scale: a factor for the gradients of which the norms are wanted.
      place: brings the sum of gradients, `[taps, B * P]`, into the parameter's shape.
      device: what the program will run on.
      direct: as for `fused`.
    """
    if device.kernels == "none":
        return []
    if device.kernels == "tpu":
        return fused_depthwise_on_tpu(geometry, x, g, scale, place, device=device, direct=direct)
    interpret = device.interprets

    run = functools.partial(gradients_of_groups, interpret=interpret)

    def largest(geometry: Geometry) -> int:
        rows = Cuts.of(geometry).parts * geometry.groups * geometry.entries
        return max(geometry.image_entries, geometry.cotangent_entries, rows)

    kernel = Kernel(run, ("ntc",), largest)
    if not (_fits(x, g) and kernel.takes(geometry)):
        return []
    cuts = Cuts.of(geometry)
    if not (interpret or is_right(try_depthwise, cuts.channels, cuts.taps, x.dtype.name)):
        return []

    way = guarded_rows(kernel, scale, place, geometry, direct, device)
    rows_bytes = 4.0 * geometry.groups * geometry.entries
    flops = 2.0 * geometry.groups * geometry.uses * geometry.entries
    return [
        Way(
            "Fused",
            device.kernel_factor * flops,
            0.0,
            (2 * cuts.parts + 3) * rows_bytes,
            lambda: way(x, g),
            saved=flops,
        )
    ]


def _fits(x: jax.Array, g: jax.Array) -> bool:
    """Whether the kernels take such arrays."""
    return x.dtype in (jnp.float32, jnp.bfloat16, jnp.float16) and x.dtype == g.dtype


def _one(precision: Any) -> Any:
    """The precision of both operands, where it is the same."""
    if isinstance(precision, tuple) and len(set(precision)) == 1:
        return precision[0]
    return precision
