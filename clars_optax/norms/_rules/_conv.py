"""Convolutions, in any number of dimensions and any layout, as products of patches."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clars_optax.norms._rules._fused import fused, fused_depthwise
from clars_optax.norms._rules._geometry import Geometry, Window
from clars_optax.norms._rules._patches import met, padded, unfolded, unfolded_bytes
from clars_optax.norms._rules._products import (
    GRAM_PASSES,
    Sizes,
    along,
    by_gram,
    centred,
    direct,
    gram,
    paired,
    without_underflow,
)
from clars_optax.norms._rules._ways import Platform, Squares, Way

# A kernel with fewer of them, as the first of a network has for colours, is one matrix product for
# all taps together.
_FEW_CHANNELS = 16


class Conv:
    """A convolution whose kernel is a parameter.

    Args:
      params: the parameters of the primitive `conv_general_dilated`.
      shapes: those of the image, the kernel and the result.
    """

    def __init__(self, params: dict[str, Any], shapes: Sequence[Sequence[int]]):
        numbers = params["dimension_numbers"]
        image, kernel, result = (
            [shape[axis] for axis in spec] for shape, spec in zip(shapes, numbers, strict=True)
        )
        self._image_axes, self._kernel_axes, self._result_axes = numbers
        self._precision = params["precision"]
        self._blocks = params["feature_group_count"]
        self._windows = tuple(
            Window(pixels, positions, taps, stride, dilation, low, spread)
            for pixels, positions, taps, stride, dilation, (low, _), spread in zip(
                *(image[2:], result[2:], kernel[2:], params["window_strides"]),
                *(params["rhs_dilation"], params["padding"], params["lhs_dilation"]),
                strict=True,
            )
        )
        self._inner, self._outer = kernel[1], kernel[0] // self._blocks

    def ways(self, x: jax.Array, g: jax.Array, scale: float, device: Platform) -> list[Way]:
        """The ways to the squared norms, from arrays `[G, b, *axes]`."""
        x, g = _canonical(x, self._image_axes), _canonical(g, self._result_axes)
        if self._blocks > 1 and self._inner == 1:
            return self._depthwise_ways(x, g, scale, device)
        ways = [self._gram(x, g, scale)]
        if self._num_taps > 1:
            ways.append(self._pixel_gram(x, g, scale))
        ways.append(self._direct(x, g, scale, device.chunk_bytes))
        if self._blocks == 1:
            ways.extend(
                self._split(x, g, scale, device.chunk_bytes, axis)
                for axis, window in enumerate(self._windows)
                if window.taps > 1 and window.stride == 1
            )
        ways.extend(self._fused(x, g, scale, device))
        return ways

    def gradient(self, x: jax.Array, g: jax.Array) -> None:
        """None: the convolution's own derivative is as good."""

    @property
    def _taps(self) -> list[int]:
        return [window.taps for window in self._windows]

    @property
    def _num_taps(self) -> int:
        return math.prod(self._taps)

    def _sizes(self, x: jax.Array, growth: float = 1.0) -> Sizes:
        positions = math.prod(window.positions for window in self._windows)
        uses = self._images(x) * positions
        inner = self._num_taps * self._inner
        return Sizes(x.shape[0], self._blocks, int(uses * growth), inner, self._outer)

    def _images(self, x: jax.Array) -> int:
        return math.prod(x.shape[1 : -1 - len(self._windows)])

    def _direct(self, x: jax.Array, g: jax.Array, scale: float, chunk_bytes: int) -> Way:
        def rows(x: jax.Array, g: jax.Array) -> jax.Array:
            return self._products(unfolded(self._windows, x, self._blocks), g)

        return direct(
            self._sizes(x),
            rows,
            self._placed_blocks,
            [x, g],
            scale,
            chunk_bytes=chunk_bytes,
            unfolded_bytes=unfolded_bytes(self._windows, x),
        )

    def _products(self, x: jax.Array, g: jax.Array) -> jax.Array:
        """The products `A' G` of patches or pixels and cotangents, `[G, blocks, inner, outer]`."""
        # The positions keep their axes, and get no others beside them: a TPU would copy before.
        summed, blocks = tuple(range(1, x.ndim - 1)), [0]
        if self._blocks > 1:
            blocks.append(x.ndim - 1)
            x, g = (z.reshape(*x.shape[:-1], self._blocks, -1) for z in (x, g))
        rows = jax.lax.dot_general(
            x,
            g,
            ((summed, summed), (blocks, blocks)),
            precision=self._precision,
            preferred_element_type=jnp.float32,
        )
        return rows.reshape(len(x), self._blocks, *rows.shape[-2:])

    def _split(self, x: jax.Array, g: jax.Array, scale: float, chunk_bytes: int, axis: int) -> Way:
        """Direct with the taps of one axis on the side of the cotangent.

        The gradient is a sum over i of `x[i + k] * g[i]`. Along one axis it becomes a sum over
        `j = i + k` of `x[j] * g[j - k]`, so that the image is unfolded along the others only: 3 + 3
        copies for a 3x3 kernel instead of 9, and a product of nearly square matrices.
        """
        window = self._windows[axis]
        taps, step = window.taps, window.dilation
        reach = (taps - 1) * step
        length = window.positions + reach
        sizes = self._sizes(x, length / window.positions)
        others = self._num_taps // taps

        def rows(x: jax.Array, g: jax.Array) -> jax.Array:
            padding = [(0, 0, 0)] * g.ndim
            place = axis - len(self._windows) - 1
            padding[place] = (reach, reach, 0)
            g = jax.lax.pad(g, jnp.zeros((), g.dtype), padding)
            shifted = [
                jax.lax.slice_in_dim(g, reach - k * step, reach - k * step + length, axis=place)
                for k in range(taps)
            ]
            a = unfolded(self._windows, x, self._blocks, whole=axis)
            c = jnp.concatenate(shifted, axis=-1)
            return self._products(a, c)

        def place(total: jax.Array) -> jax.Array:
            rest = [size for index, size in enumerate(self._taps) if index != axis]
            total = total.reshape(*rest, self._inner, taps, self._outer)
            return self._placed(jnp.moveaxis(total, -2, axis))

        used = x.shape[0] * sizes.uses * (others * self._inner + taps * self._outer)
        return direct(
            sizes,
            rows,
            place,
            [x, g],
            scale,
            chunk_bytes=chunk_bytes,
            unfolded_bytes=float(x.dtype.itemsize * used),
            name=f"Split {axis}",
        )

    def _fused(self, x: jax.Array, g: jax.Array, scale: float, device: Platform) -> list[Way]:
        is_folded = self._inner < _FEW_CHANNELS and self._num_taps > 1
        return fused(
            self._geometry(x, is_folded),
            x,
            g,
            scale,
            self._placed_blocks,
            precision=self._precision,
            device=device,
            direct=lambda x, g: self._direct(x, g, scale, device.chunk_bytes).run(),
        )

    def _geometry(self, x: jax.Array, is_folded: bool = False) -> Geometry:
        return Geometry(
            x.shape[0],
            self._blocks,
            self._images(x),
            self._windows,
            self._inner,
            self._outer,
            blocks_first=False,
            folded=is_folded,
        )

    def _depthwise_ways(
        self, x: jax.Array, g: jax.Array, scale: float, device: Platform
    ) -> list[Way]:
        def by_direct(x: jax.Array, g: jax.Array) -> Way:
            return self._depthwise(x, g, scale, device.chunk_bytes)

        return [
            by_direct(x, g),
            *fused_depthwise(
                self._geometry(x),
                x,
                g,
                scale,
                self._placed_depthwise,
                device=device,
                direct=lambda x, g: by_direct(x, g).run(),
            ),
        ]

    def _depthwise(self, x: jax.Array, g: jax.Array, scale: float, chunk_bytes: int) -> Way:
        """Direct for kernels that see one channel: a sum of element-wise products for each tap."""
        sizes = self._sizes(x)

        def rows(x: jax.Array, g: jax.Array) -> jax.Array:
            g = g.reshape(*g.shape[:-1], self._blocks, self._outer).astype(jnp.float32)
            summed = tuple(range(1, g.ndim - 2))
            made = [
                jnp.sum(part[..., None].astype(jnp.float32) * g, axis=summed)
                for part in met(self._windows, padded(self._windows, x))
            ]
            return jnp.stack(made, axis=1)

        return direct(
            sizes,
            rows,
            self._placed_depthwise,
            [x, g],
            scale,
            chunk_bytes=chunk_bytes,
            unfolded_bytes=2.0 * x.nbytes,
        )

    def _gram(self, x: jax.Array, g: jax.Array, scale: float) -> Way:
        def make() -> tuple[jax.Array, jax.Array]:
            return self._in_blocks(unfolded(self._windows, x, self._blocks)), self._in_blocks(g)

        patch_bytes = unfolded_bytes(self._windows, x)
        operand_bytes = (patch_bytes or x.nbytes) + g.nbytes
        return by_gram(self._sizes(x), make, scale, self._precision, operand_bytes, patch_bytes)

    def _pixel_gram(self, x: jax.Array, g: jax.Array, scale: float) -> Way:
        """Gram without patches: their inner products are sums of those of pixels."""
        images = self._images(x)
        sizes = self._sizes(x)
        spans = [window.span for window in self._windows]
        pixels = images * math.prod(spans)
        taps = self._num_taps
        first, second = 3, 4 + len(spans)

        def run() -> Squares:
            mean = jnp.mean(x, axis=tuple(range(1, x.ndim - 1)), keepdims=True, dtype=jnp.float32)
            # Padded before the mean is taken off: it is that of all patches then.
            inputs = centred(padded(self._windows, x), mean)
            blocks = self._in_blocks(inputs)
            of_pixels = gram(blocks, self._precision)
            sizes_of_images = (images, *inputs.shape[-1 - len(spans) : -1])
            of_pixels = of_pixels.reshape(*of_pixels.shape[:2], *sizes_of_images * 2)
            of_patches = _sum_of(met(self._windows, of_pixels, starts=(first, second)))
            mean = self._in_blocks(mean)[:, :, 0]
            along_mean = along(blocks, mean)
            along_mean = along_mean.reshape(*along_mean.shape[:2], *sizes_of_images)
            along_mean = _sum_of(met(self._windows, along_mean, starts=(first,)))
            c, rest = without_underflow(self._in_blocks(g), scale)
            of_results = gram(c, self._precision)
            squares = paired(
                of_patches.reshape(of_results.shape),
                of_results,
                along_mean.reshape(of_results.shape[:3]),
                taps * jnp.sum(jnp.square(mean), axis=2),
                c,
            )
            return Squares(squares * rest**2, None)

        blocks = sizes.groups * sizes.blocks
        flops = 2.0 * blocks * (pixels**2 * self._inner + sizes.uses**2 * (sizes.outer + taps))
        shifted = 8.0 * blocks * (pixels**2 + 2 * sizes.uses**2)
        reread = GRAM_PASSES * (x.nbytes + g.nbytes)
        return Way("Pixel-Gram", 0.0, flops, 0.0, run, reread=reread, unfolded=shifted)

    def _in_blocks(self, x: jax.Array) -> jax.Array:
        """`[G, ..., *positions, blocks * width]` to `[G, blocks, uses, width]`."""
        x = x.reshape(x.shape[0], math.prod(x.shape[1:-1]), self._blocks, -1)
        return x.swapaxes(1, 2)

    def _placed_blocks(self, gradient: jax.Array) -> jax.Array:
        """`[blocks, *taps, inner, outer]`, its axes merged or not, to the kernel's layout."""
        gradient = gradient.reshape(self._blocks, *self._taps, self._inner, self._outer)
        return self._placed(jnp.moveaxis(gradient, 0, -2))

    def _placed_depthwise(self, gradient: jax.Array) -> jax.Array:
        """`[taps, channels]`, its axes split or not, to the kernel's layout."""
        return self._placed(gradient.reshape(*self._taps, 1, self._blocks, self._outer))

    def _placed(self, gradient: jax.Array) -> jax.Array:
        """`[*taps, inner, *blocks and outer]` to the kernel's layout."""
        outer, inner, *taps = self._kernel_axes
        gradient = gradient.reshape(*self._taps, self._inner, self._blocks * self._outer)
        return gradient.transpose(np.argsort([*taps, inner, outer]))


def _sum_of(parts: Sequence[jax.Array]) -> jax.Array:
    """The sum of some arrays."""
    return functools.reduce(jnp.add, parts)


def _canonical(x: jax.Array, spec: Sequence[int]) -> jax.Array:
    """`[G, b, *axes]` to `[G, *positions, channels]`, or `[G, images, *positions, channels]`.

    The images are the examples of a group, and what shares their axis.
    """
    batch, channels, *positions = spec
    x = x.transpose([0, 1, *(axis + 2 for axis in (batch, *positions, channels))])
    images = math.prod(x.shape[1:3])
    return x.reshape(len(x), *([images] if images > 1 else []), *x.shape[3:])
