"""Whether the kernels can be run, and find on the device at hand what NumPy finds."""

import concurrent.futures
import functools
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clars_optax.norms._rules import _depthwise, _depthwise_tpu, _kernel, _kernel_tpu
from clars_optax.norms._rules._depthwise_tpu import Bands
from clars_optax.norms._rules._geometry import Geometry, Window

# More than a kernel for products has parts here, so that its programs have several groups.
_NUM_GROUPS = 150

# Compilers at a time, most of whose work is on one core.
_THREADS = 16


def can_run() -> bool:
    """Whether a kernel can be run where the program that is being traced will run.

    On a GPU or a TPU. Where the compiler shares out the program among several devices, on GPUs
    only, for others cannot be told how to cut a kernel; not where that is left to it for some axes
    of a `jax.shard_map`, nor where its partitioner is not Shardy. Where the environment variable
    CLARS_OPTAX_KERNEL is "off", none is used.
    """
    backend = jax.default_backend()
    if backend not in ("gpu", "tpu") or os.environ.get("CLARS_OPTAX_KERNEL") == "off":
        return False
    mesh = jax.sharding.get_abstract_mesh()
    if jax.device_count() == 1 or mesh.are_all_axes_manual:
        return True
    # An option that JAX has while there is another one.
    is_shardy = getattr(jax.config, "jax_use_shardy_partitioner", True)
    return backend == "gpu" and not mesh.manual_axes and is_shardy


@contextmanager
def all_at_once() -> Iterator[None]:
    """Tries the kinds that are asked for inside when it ends, and keeps what is found.

    Each takes a second or two to compile, and a network has some twenty.
    """
    kinds: dict[tuple[Any, ...], None] = {}
    before = _asked.set(kinds)
    try:
        yield
    finally:
        _asked.reset(before)
    if kinds:
        with concurrent.futures.ThreadPoolExecutor(min(len(kinds), _THREADS)) as pool:
            list(pool.map(lambda kind: _error_of(*kind), kinds))


_asked: ContextVar[dict[tuple[Any, ...], None] | None] = ContextVar("kinds", default=None)


def is_right(trial: Callable[..., None], *kind: Any) -> bool:
    """Tries a kind of kernel on the device; where it fails, warns that XLA does its work, but once.

    Inside of `all_at_once` it is not known yet.

    Args:
      trial: one of those below.
      *kind: its arguments.
    """
    asked = _asked.get()
    if asked is not None:
        asked[trial, *kind] = None
        return True
    error = _error_of(trial, *kind)
    if error is not None:
        _warn_once(error)
    return error is None


def _warn_once(error: str) -> None:
    global _has_warned
    if not _has_warned:
        _has_warned = True
        warnings.warn(
            "A kernel for per-example gradient norms does not run on this device, so XLA computes "
            f"them, with more memory traffic. {error}",
            RuntimeWarning,
            stacklevel=3,
        )


_has_warned = False


@functools.cache
def _error_of(trial: Callable[..., None], *kind: Any) -> str | None:
    """Says what is wrong with a kind of kernel; None if nothing is."""
    # Another thread is in the middle of no trace and on no mesh.
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        try:
            pool.submit(trial, *kind).result()
        except Exception as error:  # Whatever the reason, the other ways are as exact.
            return f"{type(error).__name__}: {error}"
    return None


def try_products(
    rows: int,
    columns: int,
    uses: int,
    is_one_step: bool,
    is_folded: bool,
    dtype: str,
    precision: Any,
) -> None:
    """Tries `weight_gradient_and_squares` on a convolution that has such tiles.

    Args:
      rows: those of a tile.
      columns: those of a tile.
      uses: as many as are multiplied at a time.
      is_one_step: whether that is a group's end.
      is_folded: whether a tile has several taps.
      dtype: that of the arrays.
      precision: that of the products.

    Raises:
      RuntimeError: NumPy finds something else.
    """
    geometry = geometry_of(rows, columns, uses, is_one_step, is_folded)
    (window,), blocks, inner = geometry.windows, geometry.blocks, geometry.inner
    x, g = _draw(_NUM_GROUPS, (window.pixels, blocks * inner), (window.positions, blocks * columns))
    cotangents = g.reshape(*g.shape[:2], blocks, columns).swapaxes(1, 2)
    gradients = np.stack(
        [
            a.reshape(*g.shape[:2], blocks, inner).transpose(0, 2, 3, 1) @ cotangents
            for a in _met(x, window)
        ],
        axis=2,
    )
    run = functools.partial(
        _kernel.weight_gradient_and_squares,
        geometry,
        sides=_kernel.Sides(rows, columns, uses),
        scale=1.0,
        precision=precision,
        interpret=False,
    )
    if not _finds(gradients, *_run(run, dtype, x, g)):
        raise RuntimeError(f"Its results in {dtype} are wrong.")


def geometry_of(rows: int, columns: int, uses: int, is_one_step: bool, is_folded: bool) -> Geometry:
    """A convolution that has such tiles; arguments as those of `try_products`."""
    # One less than a multiple would have: the last step is not full.
    positions = uses if is_one_step else 3 * uses - 1
    window = Window(2 * positions, positions, taps=2, stride=2, padding=1)
    inner, blocks = (rows // 2, 2) if is_folded else (rows, 1)
    return Geometry(
        *(_NUM_GROUPS, blocks, 1, (window,), inner, columns), blocks_first=False, folded=is_folded
    )


def try_depthwise(channels: int, taps: int, dtype: str) -> None:
    """Tries `gradients_of_groups`.

    Args:
      channels: those of a program.
      taps: entries of the kernel, for a program.
      dtype: that of the arrays.

    Raises:
      RuntimeError: NumPy finds something else.
    """
    # More uses than a program takes at a time, and not all of its channels.
    positions, channels = 67, channels - 8
    window = Window(2 * positions + taps - 3, positions, taps, stride=2, padding=1)
    geometry = Geometry(_NUM_GROUPS, channels, 1, (window,), 1, 1, blocks_first=False)
    x, g = _draw(_NUM_GROUPS, (window.pixels, channels), (positions, channels))
    gradients = np.stack([np.sum(a * g, axis=1) for a in _met(x, window)], axis=1)
    run = functools.partial(_depthwise.gradients_of_groups, geometry, interpret=False)
    (found,) = _run(run, dtype, x, g)
    if not np.array_equal(found, gradients):
        raise RuntimeError(f"Its results for depthwise kernels in {dtype} are wrong.")


def try_on_tpu(geometry: Geometry, dtype: str, precision: Any, chip_bytes: int) -> None:
    """Tries `_kernel_tpu.weight_gradient_and_squares`.

    Args:
      geometry: where things are.
      dtype: that of the arrays.
      precision: that of the products.
      chip_bytes: how many bytes a step may take on the chip.

    Raises:
      RuntimeError: NumPy finds something else.
    """
    windows, groups, images = geometry.windows, geometry.groups, geometry.images
    x, g = _draw(
        groups,
        (images, *(window.pixels for window in windows), geometry.inner),
        (images, *(window.positions for window in windows), geometry.outer),
    )
    patches = [
        some.reshape(groups, geometry.uses, geometry.inner) for some in _patches(x, windows, 2)
    ]
    a = np.stack(patches, axis=1)
    gradients = a.swapaxes(2, 3) @ g.reshape(groups, 1, geometry.uses, geometry.outer)
    run = functools.partial(
        _kernel_tpu.weight_gradient_and_squares,
        geometry,
        chip_bytes=chip_bytes,
        scale=1.0,
        precision=precision,
        interpret=False,
    )
    if not _finds(gradients[:, None], *_run(run, dtype, x, g)):
        raise RuntimeError(f"Its results for {geometry} in {dtype} are wrong.")


def try_depthwise_on_tpu(geometry: Geometry, dtype: str, bands: Bands) -> None:
    """Tries `_depthwise_tpu.gradients_of_groups`.

    Args:
      geometry: where things are.
      dtype: that of the arrays.
      bands: how the work is cut.

    Raises:
      RuntimeError: NumPy finds something else.
    """
    windows, groups, channels = geometry.windows, geometry.groups, geometry.blocks
    x, g = _draw(
        groups,
        (*(window.pixels for window in windows), channels),
        (*(window.positions for window in windows), channels),
    )
    axes = tuple(range(1, g.ndim - 1))
    gradients = np.stack([np.sum(some * g, axis=axes) for some in _patches(x, windows, 1)], axis=1)
    run = functools.partial(
        _depthwise_tpu.gradients_of_groups, geometry, bands=bands, interpret=False
    )
    (found,) = _run(run, dtype, x, g)
    if not np.array_equal(found, gradients):
        raise RuntimeError(f"Its results for the depthwise {geometry} in {dtype} are wrong.")


def _patches(x: np.ndarray, windows: Sequence[Window], axis: int) -> Iterator[np.ndarray]:
    """For each tap, what it meets along some axes from one on; all at a time need much memory."""
    if not windows:
        yield x
        return
    for some in _met(x, windows[0], axis):
        yield from _patches(some, windows[1:], axis + 1)


def _finds(gradients: np.ndarray, total: np.ndarray, squares: np.ndarray) -> bool:
    """Whether these are the sum of the gradients `[G, B, taps, D, P]`, and their squared norms."""
    norms = np.sum(gradients**2, axis=(1, 2, 3, 4))
    return np.array_equal(total, gradients.sum(0)) and np.allclose(squares, norms)


def _draw(number: int, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    """Small integers, which are exact in all dtypes and precisions, for each group."""
    rng = np.random.default_rng(0)
    return [rng.integers(-3, 4, (number, *shape)).astype(np.float32) for shape in shapes]


def _met(x: np.ndarray, window: Window, axis: int = 1) -> list[np.ndarray]:
    """For each tap, the pixels that it meets along an axis, or zeros."""
    shape = [1] * x.ndim
    shape[axis] = window.positions
    parts = []
    for tap in range(window.taps):
        places = np.arange(window.positions) * window.stride + tap * window.dilation
        pixels, holes = np.divmod(places - window.padding, window.spread)
        is_inside = (holes == 0) & (pixels >= 0) & (pixels < window.pixels)
        part = np.take(x, np.where(is_inside, pixels, 0), axis)
        parts.append(part * is_inside.reshape(shape))
    return parts


def _run(function: Callable[..., Any], dtype: str, *arrays: np.ndarray) -> list[np.ndarray]:
    """Compiles and runs a function on the device."""
    with jax.transfer_guard("allow"):
        device = jax.local_devices()[0]
        placed = jax.device_put([x.astype(jnp.dtype(dtype)) for x in arrays], device)
        return [np.asarray(x) for x in jax.jit(function)(*placed)]
