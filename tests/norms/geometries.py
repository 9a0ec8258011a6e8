"""Products and convolutions for the kernel for TPUs, and their gradients by definition."""

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
    x = rng.integers(-3, 4, (geometry.groups, *images, *pixels, geometry.inner))
    g = rng.integers(-3, 4, (geometry.groups, *images, *positions, geometry.outer))
    rows = np.pad(x.reshape(geometry.groups, -1, geometry.inner), ((0, 0), (0, 1), (0, 0)))
    patches = rows[:, pixels_met(geometry)]
    gradients = patches.swapaxes(2, 3) @ g.reshape(geometry.groups, 1, -1, geometry.outer)
    return jnp.asarray(x, dtype), jnp.asarray(g, dtype), gradients


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
