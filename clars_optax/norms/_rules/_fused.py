"""Fused: the norms, and the weight gradient with them, in one pass, by kernels for GPUs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from clars_optax.norms._rules._depthwise import Cuts, gradients_of_groups
from clars_optax.norms._rules._geometry import Geometry, padded
from clars_optax.norms._rules._kernel import Tiles, weight_gradient_and_squares
from clars_optax.norms._rules._products import squared, sum_of_rows
from clars_optax.norms._rules._trial import is_right, try_depthwise, try_products
from clars_optax.norms._rules._ways import Platform, Squares, Way

Place = Callable[[jax.Array], jax.Array]
Direct = Callable[[jax.Array, jax.Array], Squares]


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
    tiles = Tiles.of(geometry, x.dtype.itemsize)
    images = jax.eval_shape(lambda x: padded(geometry, x)[1], x) if geometry.folded else x
    sizes = (images.size, tiles.parts * geometry.entries, tiles.number * geometry.groups)
    # Narrower loads than of four bytes are not made ahead of time; those of a few channels cannot
    # be wider.
    widths = [geometry.outer] if geometry.folded else [geometry.outer, geometry.inner]
    if not (
        _fits(x, g, *sizes)
        and not any(width * x.dtype.itemsize % 4 for width in widths)
        and (precision is None or isinstance(precision, jax.lax.Precision))
    ):
        return []
    interpret = device.kernels == "interpreted"
    kind = (tiles.rows, tiles.columns, tiles.uses, tiles.steps == 1, geometry.folded)
    if not (interpret or is_right(try_products, *kind, x.dtype.name, precision)):
        return []

    def kernel(x: jax.Array, g: jax.Array) -> Squares:
        total, squares = weight_gradient_and_squares(
            geometry, x, g, scale=scale, precision=precision, interpret=interpret
        )
        return Squares(squares, place(total))

    run = _guarded(kernel, direct, interpret)
    uses = 1.0 * geometry.groups * tiles.steps * tiles.uses
    loaded = x.dtype.itemsize * uses * tiles.number * (tiles.rows + tiles.columns)
    # Products go on while operands are loaded, and both while memory gives them; the ordinary
    # weight gradient waits for memory as well.
    read = device.flops_per_byte * (images.size * x.dtype.itemsize + g.nbytes)
    flops = max(
        device.kernel_factor * 2 * uses * tiles.entries,
        device.flops_per_byte * loaded / device.cache_factor,
        read,
    )
    written = 4.0 * (tiles.parts * geometry.entries + geometry.groups * tiles.number)
    if geometry.folded:
        written += images.size * x.dtype.itemsize
    saved = max(2.0 * geometry.groups * geometry.uses * geometry.entries, read)
    return [Way("Fused", flops, 0.0, 2 * written, lambda: run(x, g), saved=saved)]


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
    cuts = Cuts.of(geometry)
    if not _fits(x, g, cuts.parts * geometry.groups * geometry.entries):
        return []
    interpret = device.kernels == "interpreted"
    if not (interpret or is_right(try_depthwise, cuts.channels, cuts.taps, x.dtype.name)):
        return []

    def kernel(x: jax.Array, g: jax.Array) -> Squares:
        rows = gradients_of_groups(geometry, x, g, interpret=interpret)
        return Squares(squared(rows * scale), place(sum_of_rows(rows)))

    run = _guarded(kernel, direct, interpret)
    rows_bytes = 4.0 * geometry.groups * geometry.entries
    flops = 2.0 * geometry.groups * geometry.uses * geometry.entries
    return [
        Way(
            "Fused",
            device.kernel_factor * flops,
            0.0,
            (2 * cuts.parts + 3) * rows_bytes,
            lambda: run(x, g),
            saved=flops,
        )
    ]


def _guarded(kernel: Direct, direct: Direct, interpret: bool) -> Direct:
    """The kernel, but for derivatives and on other kinds of devices `direct`."""

    @jax.custom_jvp
    def run(x: jax.Array, g: jax.Array) -> Squares:
        if interpret:
            return kernel(x, g)
        return jax.lax.platform_dependent(x, g, cuda=kernel, rocm=kernel, default=direct)

    run.defjvp(lambda primals, tangents: jax.jvp(direct, primals, tangents))
    return run


def _fits(x: jax.Array, g: jax.Array, *results: float) -> bool:
    """Whether the kernels take such arrays and results of such sizes."""
    return (
        x.dtype in (jnp.float32, jnp.bfloat16, jnp.float16)
        and x.dtype == g.dtype
        and max(x.size, g.size, *results) < 2**31  # offsets have 32 bits
    )


def _one(precision: Any) -> Any:
    """The precision of both operands, where it is the same."""
    if isinstance(precision, tuple) and len(set(precision)) == 1:
        return precision[0]
    return precision
