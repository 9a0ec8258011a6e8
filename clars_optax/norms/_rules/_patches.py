"""The pixels of images `[..., *pixels, channels]` that the taps of a kernel meet."""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from clars_optax.norms._rules._geometry import Window


def padded(windows: Sequence[Window], x: jax.Array) -> jax.Array:
    """The image with its padding and holes as zeros, as far as the taps reach or further."""
    # What no tap meets stays: to cut it off would be to copy the rest.
    margins = [(low, max(high, 0), holes) for low, high, holes in (w.margins for w in windows)]
    margins = [(0, 0, 0)] * _first(windows, x) + margins + [(0, 0, 0)]
    return jax.lax.pad(x, jnp.zeros((), x.dtype), margins)


def met(
    windows: Sequence[Window],
    x: jax.Array,
    starts: Sequence[int] = (),
    whole: int | None = None,
) -> list[jax.Array]:
    """For each tap, the pixels that it meets, one for each position.

    Args:
      windows: how the axes of image and kernel meet.
      x: a padded image, or what has axes like its own in several places.
      starts: the first axes of these places; of an image by default.
      whole: an axis of the kernel that is not cut.
    """
    cuts = []
    for axis, window in enumerate(windows):
        taps, length = window.taps, (window.positions - 1) * window.stride + 1
        if axis == whole:
            taps, length = 1, window.span
        steps = [k * window.dilation for k in range(taps)]
        cuts.append([(step, step + length, window.stride) for step in steps])
    parts = []
    for chosen in itertools.product(*cuts):
        limits = [(0, size, 1) for size in x.shape]
        for start in starts or [_first(windows, x)]:
            limits[start : start + len(chosen)] = chosen
        parts.append(jax.lax.slice(x, *zip(*limits, strict=True)))
    return parts


def unfolded(
    windows: Sequence[Window], x: jax.Array, blocks: int, whole: int | None = None
) -> jax.Array:
    """The patches, `[..., *positions, taps * channels]`, blocks of channels on the outside."""
    if blocks == 1 and whole is None and all(window.is_tiled for window in windows):
        return _tiled(windows, x)
    parts = met(windows, padded(windows, x), whole=whole)
    if len(parts) == 1:
        return parts[0]
    if blocks == 1:
        return jnp.concatenate(parts, axis=-1)
    parts = [part.reshape(*part.shape[:-1], blocks, -1) for part in parts]
    return jnp.concatenate(parts, axis=-1).reshape(*parts[0].shape[:-2], -1)


def _tiled(windows: Sequence[Window], x: jax.Array) -> jax.Array:
    """The patches of an image that they tile: nothing is copied for them but once."""
    first = _first(windows, x)
    limits = [*x.shape[:first], *(w.positions * w.taps for w in windows), x.shape[-1]]
    x = jax.lax.slice(x, [0] * x.ndim, limits)
    sizes = itertools.chain.from_iterable((w.positions, w.taps) for w in windows)
    x = x.reshape(*x.shape[:first], *sizes, x.shape[-1])
    positions = range(first, x.ndim - 1, 2)
    taps = range(first + 1, x.ndim - 1, 2)
    x = x.transpose(*range(first), *positions, *taps, x.ndim - 1)
    return x.reshape(*x.shape[: first + len(windows)], -1)


def unfolded_bytes(windows: Sequence[Window], x: jax.Array) -> float:
    """The size of the patches; 0 where each is a pixel."""
    growth = math.prod(window.taps * window.positions for window in windows)
    if all(window.taps == 1 for window in windows):
        return 0.0
    return x.nbytes / math.prod(window.pixels for window in windows) * growth


def _first(windows: Sequence[Window], x: jax.Array) -> int:
    return x.ndim - len(windows) - 1
