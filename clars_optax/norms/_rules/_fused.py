"""Fused: the weight gradient and the norms of its parts in one pass, by a kernel for GPUs."""

import concurrent.futures
import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clars_optax.norms._rules._kernel import Geometry, Tiles, weight_gradient_and_squares
from clars_optax.norms._rules._ways import Platform, Squares, Way


def fused(
    geometry: Geometry,
    x: jax.Array,
    g: jax.Array,
    scale: float,
    place: Callable[[jax.Array], jax.Array],
    *,
    precision: Any,
    device: Platform,
) -> list[Way]:
    """The way through the kernel, where there is one.

    Args:
      geometry: where things are.
      x: the images.
      g: the cotangents.
      scale: a factor for the gradients of which the norms are wanted.
      place: brings the sum of gradients, `[B, taps, D, P]`, into the parameter's shape.
      precision: that of the products.
      device: what the program will run on.
    """
    if device.kernels == "none" or not _fits(x, g):
        return []
    tiles = Tiles.of(geometry, x.dtype.itemsize)

    def run() -> Squares:
        total, squares = weight_gradient_and_squares(
            geometry,
            x,
            g,
            scale=scale,
            precision=precision,
            interpret=device.kernels == "interpreted",
        )
        return Squares(squares, place(total))

    multiplied = 2.0 * geometry.groups * tiles.uses * math.ceil(geometry.uses / tiles.uses)
    written = 4.0 * (tiles.parts * geometry.entries + geometry.groups * tiles.number)
    return [
        Way(
            "Fused",
            device.kernel_factor * multiplied * tiles.entries,
            0.0,
            2 * written,
            run,
            saved=2.0 * geometry.groups * geometry.uses * geometry.entries,
        )
    ]


def _fits(x: jax.Array, g: jax.Array) -> bool:
    """Whether the kernel takes such arrays: one floating-point dtype, 32-bit offsets."""
    floating = x.dtype in (jnp.float32, jnp.bfloat16, jnp.float16)
    return floating and x.dtype == g.dtype and max(x.size, g.size) < 2**31


def can_run() -> bool:
    """Whether the kernel can be run where the program that is being traced will run.

    On a GPU, unless the compiler is to share the program out among several devices, which it cannot
    do with a kernel: under `jit` on a mesh. Inside `pmap` and `jax.shard_map` each device has its
    own.
    """
    if jax.default_backend() != "gpu":
        return False
    is_alone = jax.device_count() == 1 or jax.sharding.get_abstract_mesh().are_all_axes_manual
    return is_alone and _works()


@functools.cache
def _works() -> bool:
    """Tries the kernel on the GPU; where it fails, warns once that XLA does its work."""
    # Another thread is in the middle of no trace and on no mesh.
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        try:
            pool.submit(_try).result()
        except Exception as error:  # Whatever the reason, the other ways are as exact.
            warnings.warn(
                "The kernel for per-example gradient norms does not run on this GPU, so XLA "
                f"computes them, with more memory traffic: {type(error).__name__}: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
            return False
    return True


def _try() -> None:
    """Compares the kernel with NumPy.

    Raises:
      RuntimeError: they differ.
    """
    rng = np.random.default_rng(0)
    x, g = (rng.integers(-3, 4, (5, 150, width)).astype(np.float32) for width in (80, 150))
    rows = np.einsum("gti,gto->gio", x, g)
    geometry = Geometry(5, 1, 150, (), 80, 150, blocks_first=True)
    run = jax.jit(
        functools.partial(
            weight_gradient_and_squares, geometry, scale=1.0, precision=None, interpret=False
        )
    )
    device = jax.local_devices()[0]
    # Small integers are exact in all of them.
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        total, squares = run(*jax.device_put((x.astype(dtype), g.astype(dtype)), device))
        is_right = np.array_equal(total[0, 0], rows.sum(0))
        if not (is_right and np.allclose(squares, np.sum(rows**2, axis=(1, 2)))):
            raise RuntimeError(f"its results in {np.dtype(dtype)} are wrong.")
