"""Where the entries of images and cotangents lie in memory, for the kernels."""

import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Window:
    """How an axis of an image meets an axis of a kernel; positions are those of the result.

    Attributes:
      pixels: size of the image.
      positions: size of the result.
      taps: size of the kernel.
      stride: pixels from position to position.
      dilation: pixels from tap to tap.
      padding: pixels before the image.
      spread: what the pixels are apart, 1 for an image without holes.
    """

    pixels: int
    positions: int
    taps: int
    stride: int = 1
    dilation: int = 1
    padding: int = 0
    spread: int = 1

    @property
    def is_plain(self) -> bool:
        """Whether position and pixel are the same."""
        return self == Window(self.pixels, self.pixels, 1)

    @property
    def is_tiled(self) -> bool:
        """Whether positions meet pixels of their own, that follow on each other."""
        tiled = Window(self.pixels, self.positions, self.taps, stride=self.taps)
        return self == tiled and self.positions * self.taps <= self.pixels

    @property
    def span(self) -> int:
        """Pixels from the first that some tap meets to the last one, in an image padded for it."""
        return (self.positions - 1) * self.stride + (self.taps - 1) * self.dilation + 1

    def pixel(self, position: Any, tap: Any) -> Any:
        """What a tap meets at a position, holes counted; it may lie outside of the image."""
        return position * self.stride + tap * self.dilation - self.padding

    @property
    def margins(self) -> tuple[int, int, int]:
        """What to add before the image, behind it and between its pixels, as `jax.lax.pad` does."""
        held = (self.pixels - 1) * self.spread + 1
        return self.padding, self.span - self.padding - held, self.spread - 1


@dataclass(frozen=True)
class Geometry:
    """Where the entries of `A` and of the cotangent lie; letters as in `_products`.

    The image is `[G, images, *pixels, B * D]` or `[G, B, images, *pixels, D]`, the cotangent has
    the same order of axes, with positions and P.

    Attributes:
      groups: number of groups G.
      blocks: number of blocks B.
      images: examples of a group, and what else shares their axis.
      windows: one for each axis of the images.
      inner: number of input channels of a block, D.
      outer: number of output channels of a block, P.
      blocks_first: which of the two orders it is.
      folded: whether a row of the gradient is a channel of some tap, instead of a channel of the
        tap at hand: for kernels with so few channels that they would leave a product empty. The
        image comes padded then (`padded`).
    """

    groups: int
    blocks: int
    images: int
    windows: tuple[Window, ...]
    inner: int
    outer: int
    blocks_first: bool
    folded: bool = False

    @property
    def taps(self) -> int:
        """Entries of a kernel."""
        return math.prod(window.taps for window in self.windows)

    @property
    def uses(self) -> int:
        """Uses of the weights by a group, T."""
        return self.images * math.prod(window.positions for window in self.windows)

    @property
    def entries(self) -> int:
        """Entries of the gradient."""
        return self.blocks * self.taps * self.inner * self.outer

    @property
    def image_entries(self) -> int:
        """Entries of the images, with their padding if they are padded before."""
        pixels = [window.span if self.folded else window.pixels for window in self.windows]
        return self.groups * self.images * math.prod(pixels) * self.blocks * self.inner

    @property
    def cotangent_entries(self) -> int:
        """Entries of the cotangent."""
        return self.groups * self.uses * self.blocks * self.outer

    @property
    def rows(self) -> int:
        """Rows of one of the matrices that the gradient consists of; their columns are P."""
        return self.taps * self.inner if self.folded else self.inner

    @property
    def matrices(self) -> int:
        """How many of them there are."""
        return self.blocks if self.folded else self.blocks * self.taps


def padded(geometry: Geometry, x: jax.Array) -> tuple[Geometry, jax.Array]:
    """The image with its padding and holes as zeros, so that each use finds its pixels there."""
    windows = tuple(
        replace(window, pixels=window.span, padding=0, spread=1) for window in geometry.windows
    )
    pixels = [window.pixels for window in geometry.windows]
    x = x.reshape(-1, *pixels, geometry.blocks * geometry.inner)
    margins = [window.margins for window in geometry.windows]
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *margins, (0, 0, 0)])
    return replace(geometry, windows=windows), x


def row_offsets(geometry: Geometry, rows: jax.Array) -> jax.Array:
    """How far the entries of `A` for some rows lie behind that for the first one."""
    if not geometry.folded:
        return rows
    tap, offsets = jnp.divmod(rows, geometry.inner)
    width = geometry.blocks * geometry.inner
    for window in reversed(geometry.windows):
        tap, of_tap = jnp.divmod(tap, window.taps)
        offsets += of_tap * window.dilation * width
        width *= window.pixels
    return offsets


def starts(
    geometry: Geometry,
    group: jax.Array,
    block: jax.Array | int,
    tap: jax.Array | int,
    uses: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Offsets of the first channel in image and cotangent for some uses; whether in the image."""
    windows = geometry.windows
    # From the last axis to the first one, as numbers are divided.
    image, indices = uses, []
    for window in reversed(windows):
        image, position = jnp.divmod(image, window.positions)
        tap, of_tap = jnp.divmod(tap, window.taps)
        indices.append((position, of_tap))
    is_inside = uses < geometry.uses
    if geometry.blocks_first:
        x_starts = g_starts = (group * geometry.blocks + block) * geometry.images + image
        x_width, g_width = geometry.inner, geometry.outer
    else:
        x_starts = g_starts = group * geometry.images + image
        x_width, g_width = geometry.blocks * geometry.inner, geometry.blocks * geometry.outer
    for window, (position, of_tap) in zip(windows, reversed(indices), strict=True):
        pixel = position
        if not window.is_plain:
            pixel = window.pixel(position, of_tap)
            is_inside &= (pixel >= 0) & (pixel < window.pixels * window.spread)
            if window.spread > 1:
                pixel, hole = jnp.divmod(pixel, window.spread)
                is_inside &= hole == 0
        x_starts = x_starts * window.pixels + pixel
        g_starts = g_starts * window.positions + position
    x_starts, g_starts = x_starts * x_width, g_starts * g_width
    if not geometry.blocks_first:
        x_starts, g_starts = x_starts + block * geometry.inner, g_starts + block * geometry.outer
    return x_starts, g_starts, is_inside
