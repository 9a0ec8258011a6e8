"""Products and convolutions for the kernels for TPUs, and their gradients by definition."""

import jax.numpy as jnp
import numpy as np

from clars_optax.norms._rules._geometry import Geometry, Window

CHIP_BYTES = 2**26


def pixels_met(geometry):
    """For each tap and use, the number of the pixel, of all images of a group; -1 where none is."""
    sizes = [window.pixels for window in geometry.windows]
    met = np.arange(geometry.images * np.prod(sizes, dtype=int)).reshape(1, geometry.images, *sizes)
    for axis, window in enumerate(geometry.windows, 2):
        parts = []
        for tap in range(window.taps):
            places = np.arange(window.positions) * window.stride + tap * window.dilation
            pixels, holes = np.divmod(places - window.padding, window.spread)
            is_inside = (holes == 0) & (pixels >= 0) & (pixels < window.pixels)
            shape = [-1 if i == axis else 1 for i in range(met.ndim)]
            part = np.take(met, np.where(is_inside, pixels, 0), axis)
            parts.append(np.where(is_inside.reshape(shape), part, -1))
        met = np.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:])
    return met.reshape(geometry.taps, geometry.uses)


def draw(geometry, dtype):
    """Small integers, whose sums are exact in any order: images, cotangents, and all gradients."""
    rng = np.random.default_rng(0)
    images = [geometry.images] * (geometry.images > 1 or not geometry.windows)
    pixels, positions = (
        [getattr(w, name) for w in geometry.windows] for name in ("pixels", "positions")
    )
    x = rng.integers(-3, 4, (geometry.groups, *images, *pixels, geometry.blocks * geometry.inner))
    g = rng.integers(
        -3, 4, (geometry.groups, *images, *positions, geometry.blocks * geometry.outer)
    )
    rows = np.pad(x.reshape(geometry.groups, -1, x.shape[-1]), ((0, 0), (0, 1), (0, 0)))
    cotangents = g.reshape(geometry.groups, -1, g.shape[-1])
    if geometry.blocks == 1:
        gradients = [rows[:, met].swapaxes(1, 2) @ cotangents for met in pixels_met(geometry)]
    else:
        gradients = [np.sum(rows[:, met] * cotangents, axis=1) for met in pixels_met(geometry)]
    return jnp.asarray(x, dtype), jnp.asarray(g, dtype), np.stack(gradients, axis=1)


GEOMETRIES = {
    # Channels and groups that fill no register; margins on both sides; two tiles of channels.
    "same": Geometry(9, 1, 1, (Window(4, 4, 3, padding=1),) * 2, 20, 130, False),
    "strided, two images": Geometry(8, 1, 2, (Window(6, 3, 3, 2, 1, 1),), 130, 20, False),
    "transposed": Geometry(8, 1, 1, (Window(4, 7, 3, 1, 2, 2, 2),), 8, 8, False),
    "three dimensions": Geometry(8, 1, 1, (Window(2, 2, 2),) * 3, 8, 8, False),
    # What is larger is not turned: images and cotangents change places.
    "pixels": Geometry(8, 1, 1, (Window(6, 6, 1),) * 2, 20, 300, False),
    "pixels of a stride": Geometry(8, 1, 1, (Window(6, 3, 1, 2),) * 2, 20, 300, False),
    # More uses than are multiplied at a time, and more than are copied at a time.
    "chunks": Geometry(8, 1, 1, (Window(600, 600, 3, padding=1),), 20, 8, False),
    "no positions": Geometry(9, 1, 37, (), 700, 300, True),
    "no positions, chunks": Geometry(8, 1, 1280, (), 20, 8, True),
}

DEPTHWISE = {
    # Examples inside, and channels that fill no register; margins on both sides; several parts.
    "examples inside": Geometry(128, 20, 1, (Window(7, 7, 3, padding=1),) * 2, 1, 1, False),
    # Neither fills one; the last row of an image is met by nothing.
    "channels inside": Geometry(
        9, 130, 1, (Window(12, 6, 3, 2), Window(30, 15, 3, 2, 1, 1)), 1, 1, False
    ),
    "dilated, two images": Geometry(
        8, 16, 2, (Window(9, 5, 3, 1, 2), Window(40, 44, 5, 1, 2, 6)), 1, 1, False
    ),
    # More taps than there are sums at a time, and more columns than taps at both ends.
    "one dimension": Geometry(8, 128, 1, (Window(30, 30, 11, padding=5),), 1, 1, False),
    "causal": Geometry(8, 16, 1, (Window(5, 5, 11, padding=10),), 1, 1, False),
    "outside": Geometry(
        8, 16, 1, (Window(3, 9, 2, padding=4), Window(2, 8, 2, padding=4)), 1, 1, False
    ),
}
