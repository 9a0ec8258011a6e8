"""Fused: the weight gradient and the norms of its parts in one pass, by a kernel for GPUs."""

import concurrent.futures
import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clars_optax.norms._rules._kernel import Geometry, Tiles, Window, weight_gradient_and_squares
from clars_optax.norms._rules._ways import Platform, Squares, Way

# How many loads a cache answers for one that memory has to; a guess.
_CACHED_LOADS = 4


def fused(
    geometry: Geometry,
    x: jax.Array,
    g: jax.Array,
    scale: float,
    place: Callable[[jax.Array], jax.Array],
    *,
    precision: Any,
    device: Platform,
    direct: Callable[[jax.Array, jax.Array], Squares],
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
      direct: the same from images and cotangents by other means: for derivatives, and where the
        program turns out to be for another kind of device.
    """
    tiles = Tiles.of(geometry, x.dtype.itemsize)
    if device.kernels == "none" or not _fits(geometry, tiles, x, g, precision):
        return []
    interpret = device.kernels == "interpreted"
    if not (interpret or _is_right(tiles, x.dtype.name, _one(precision))):
        return []

    def kernel(x: jax.Array, g: jax.Array) -> Squares:
        total, squares = weight_gradient_and_squares(
            geometry, x, g, scale=scale, precision=precision, interpret=interpret
        )
        return Squares(squares, place(total))

    @jax.custom_jvp
    def run(x: jax.Array, g: jax.Array) -> Squares:
        if interpret:
            return kernel(x, g)
        return jax.lax.platform_dependent(x, g, cuda=kernel, rocm=kernel, default=direct)

    run.defjvp(lambda primals, tangents: jax.jvp(direct, primals, tangents))

    uses = 1.0 * geometry.groups * tiles.steps * tiles.uses
    written = 4.0 * (tiles.parts * geometry.entries + geometry.groups * tiles.number)
    loaded = x.dtype.itemsize * uses * tiles.number * (tiles.rows + tiles.columns)
    return [
        Way(
            "Fused",
            device.kernel_factor * 2 * uses * tiles.entries,
            0.0,
            2 * written + max(x.nbytes + g.nbytes, loaded / _CACHED_LOADS),
            lambda: run(x, g),
            saved=2.0 * geometry.groups * geometry.uses * geometry.entries,
        )
    ]


def _fits(geometry: Geometry, tiles: Tiles, x: jax.Array, g: jax.Array, precision: Any) -> bool:
    """Whether the kernel takes such arrays."""
    sizes = (x.size, g.size, tiles.parts * geometry.entries, tiles.number * geometry.groups)
    # Narrower loads than of four bytes are not made ahead of time.
    widths = (geometry.inner * x.dtype.itemsize, geometry.outer * x.dtype.itemsize)
    return (
        x.dtype in (jnp.float32, jnp.bfloat16, jnp.float16)
        and x.dtype == g.dtype
        and max(sizes) < 2**31  # offsets have 32 bits
        and not any(width % 4 for width in widths)
        and (_one(precision) is None or isinstance(_one(precision), jax.lax.Precision))
    )


def _one(precision: Any) -> Any:
    """The precision of both operands, where it is the same."""
    if isinstance(precision, tuple) and len(set(precision)) == 1:
        return precision[0]
    return precision


def can_run() -> bool:
    """Whether the kernel can be run where the program that is being traced will run.

    On a GPU, unless the compiler is to share the program out among several devices, which
    it cannot do with a kernel: under `jit` where there are several. Inside `pmap` and
    `jax.shard_map` each device has its own. Where the environment variable CLARS_OPTAX_KERNEL is
    "off", it is not used.
    """
    if jax.default_backend() != "gpu" or os.environ.get("CLARS_OPTAX_KERNEL") == "off":
        return False
    return jax.device_count() == 1 or jax.sharding.get_abstract_mesh().are_all_axes_manual


_warned: set[str] = set()


def _is_right(tiles: Tiles, dtype: str, precision: Any) -> bool:
    """Tries such a kernel on the GPU; where it fails, warns that XLA does its work, but once."""
    error = _error_of(tiles.rows, tiles.columns, tiles.uses, tiles.steps == 1, dtype, precision)
    if error is not None and not _warned:
        _warned.add(error)
        warnings.warn(
            "The kernel for per-example gradient norms does not run on this GPU, so XLA computes "
            f"them, with more memory traffic. {error}",
            RuntimeWarning,
            stacklevel=2,
        )
    return error is None


@functools.cache
def _error_of(
    rows: int, columns: int, uses: int, is_one_step: bool, dtype: str, precision: Any
) -> str | None:
    """Says what is wrong with the kernel for such tiles; None if nothing is."""
    # Another thread is in the middle of no trace and on no mesh.
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        try:
            pool.submit(_try, rows, columns, uses, is_one_step, dtype, precision).result()
        except Exception as error:  # Whatever the reason, the other ways are as exact.
            return f"{type(error).__name__}: {error}"
    return None


def _try(rows: int, columns: int, uses: int, is_one_step: bool, dtype: str, precision: Any) -> None:
    """Compares the kernel with NumPy, for a convolution that has such tiles.

    Raises:
      RuntimeError: they differ.
    """
    positions = uses if is_one_step else 2 * uses + 3
    window = Window(2 * positions, positions, taps=2, stride=2, padding=1)
    # More groups than parts, so that programs have several.
    number = 150
    geometry = Geometry(number, 1, 1, (window,), rows, columns, blocks_first=False)
    # Small integers are exact in all dtypes and precisions.
    rng = np.random.default_rng(0)
    x = rng.integers(-3, 4, (number, 2 * positions, rows)).astype(np.float32)
    g = rng.integers(-3, 4, (number, positions, columns)).astype(np.float32)
    padded = np.pad(x, ((0, 0), (1, 1), (0, 0)))
    gradients = np.stack(
        [
            np.einsum("gti,gto->gio", padded[:, tap : tap + 2 * positions : 2], g)
            for tap in range(2)
        ],
        axis=1,
    )
    run = functools.partial(
        weight_gradient_and_squares, geometry, scale=1.0, precision=precision, interpret=False
    )
    with jax.transfer_guard("allow"):
        device = jax.local_devices()[0]
        arrays = jax.device_put((x.astype(jnp.dtype(dtype)), g.astype(jnp.dtype(dtype))), device)
        total, squares = map(np.asarray, jax.jit(run)(*arrays))
    is_right = np.array_equal(total[0], gradients.sum(0))
    if not (is_right and np.allclose(squares, np.sum(gradients**2, axis=(1, 2, 3)))):
        raise RuntimeError(f"Its results in {dtype} are wrong.")
