"""Convolutions, in any number of dimensions and any layout, as products of patches."""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clars_optax.norms._rules._fused import fused, fused_depthwise
from clars_optax.norms._rules._geometry import Geometry, Window
from clars_optax.norms._rules._products import (
    GRAM_PASSES,
    Sizes,
    along,
    by_gram,
    centred,
    direct,
    gradients,
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
        self._strides = tuple(params["window_strides"])
        self._dilations = tuple(params["rhs_dilation"])
        self._padding = [
            (low, high, interior - 1)
            for (low, high), interior in zip(params["padding"], params["lhs_dilation"], strict=True)
        ]
        self._pixels = image[2:]
        self._taps = kernel[2:]
        self._positions = result[2:]
        self._inner, self._outer = kernel[1], kernel[0] // self._blocks

    def ways(self, x: jax.Array, g: jax.Array, scale: float, device: Platform) -> list[Way]:
        """The ways to the squared norms, from arrays `[G, b, *axes]`."""
        x, g = _channels_last(x, self._image_axes), _channels_last(g, self._result_axes)
        if self._blocks > 1 and self._inner == 1:
            return self._depthwise_ways(x, g, scale, device)
        ways = [self._gram(x, g, scale)]
        if math.prod(self._taps) > 1:
            ways.append(self._pixel_gram(x, g, scale))
        ways.append(self._direct(x, g, scale, device.chunk_bytes))
        if self._blocks == 1:
            ways.extend(
                self._split(x, g, scale, device.chunk_bytes, axis)
                for axis, (taps, stride) in enumerate(zip(self._taps, self._strides, strict=True))
                if taps > 1 and stride == 1
            )
        ways.extend(self._fused(x, g, scale, device))
        return ways

    def gradient(self, x: jax.Array, g: jax.Array) -> None:
        """None: the convolution's own derivative is as good."""

    def _sizes(self, x: jax.Array, growth: float = 1.0) -> Sizes:
        uses = math.prod([*x.shape[1:3], *self._positions])
        inner = math.prod(self._taps) * self._inner
        return Sizes(x.shape[0], self._blocks, int(uses * growth), inner, self._outer)

    def _patch_bytes(self, x: jax.Array) -> float:
        if math.prod(self._taps) == 1:
            return 0.0
        sizes = self._sizes(x)
        return float(x.dtype.itemsize * sizes.groups * sizes.blocks * sizes.uses * sizes.inner)

    def _direct(self, x: jax.Array, g: jax.Array, scale: float, chunk_bytes: int) -> Way:
        def rows(x: jax.Array, g: jax.Array) -> jax.Array:
            return gradients(self._in_blocks(self._patches(x)), self._in_blocks(g), self._precision)

        return direct(
            self._sizes(x),
            rows,
            self._placed_blocks,
            [x, g],
            scale,
            chunk_bytes=chunk_bytes,
            extra_bytes=self._patch_bytes(x),
        )

    def _split(self, x: jax.Array, g: jax.Array, scale: float, chunk_bytes: int, axis: int) -> Way:
        """Direct with the taps of one axis on the side of the cotangent.

        The gradient is a sum over i of `x[i + k] * g[i]`. Along one axis it becomes a sum over
        `j = i + k` of `x[j] * g[j - k]`, so that the image is unfolded along the others only: 3 + 3
        copies for a 3x3 kernel instead of 9, and a product of nearly square matrices.
        """
        taps, step = self._taps[axis], self._dilations[axis]
        reach = (taps - 1) * step
        growth = (self._positions[axis] + reach) / self._positions[axis]
        sizes = self._sizes(x, growth)
        others = math.prod(self._taps) // taps

        def rows(x: jax.Array, g: jax.Array) -> jax.Array:
            padding = [(0, 0, 0)] * g.ndim
            padding[3 + axis] = (reach, reach, 0)
            g = jax.lax.pad(g, jnp.zeros((), g.dtype), padding)
            length = self._positions[axis] + reach
            shifted = [
                jax.lax.slice_in_dim(g, reach - k * step, reach - k * step + length, axis=3 + axis)
                for k in range(taps)
            ]
            a, c = self._patches(x, whole=axis), jnp.concatenate(shifted, axis=-1)
            return gradients(self._in_blocks(a), self._in_blocks(c), self._precision)

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
            extra_bytes=float(x.dtype.itemsize * used),
            name=f"Split {axis}",
        )

    def _fused(self, x: jax.Array, g: jax.Array, scale: float, device: Platform) -> list[Way]:
        is_folded = self._inner < _FEW_CHANNELS and math.prod(self._taps) > 1
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
        windows = tuple(
            Window(pixels, positions, taps, stride, dilation, low, interior + 1)
            for pixels, positions, taps, stride, dilation, (low, _, interior) in zip(
                *(self._pixels, self._positions, self._taps, self._strides, self._dilations),
                self._padding,
                strict=True,
            )
        )
        return Geometry(
            x.shape[0],
            self._blocks,
            x.shape[1] * x.shape[2],
            windows,
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
            return jnp.stack(
                [
                    jnp.sum(part[..., None].astype(jnp.float32) * g, axis=summed)
                    for part in self._shifted(self._padded(x))
                ],
                axis=1,
            )

        return direct(
            sizes,
            rows,
            self._placed_depthwise,
            [x, g],
            scale,
            chunk_bytes=chunk_bytes,
            extra_bytes=2.0 * x.size * x.dtype.itemsize,
        )

    def _gram(self, x: jax.Array, g: jax.Array, scale: float) -> Way:
        def make() -> tuple[jax.Array, jax.Array]:
            return self._in_blocks(self._patches(x)), self._in_blocks(g)

        patch_bytes = self._patch_bytes(x)
        operand_bytes = (patch_bytes or x.nbytes) + g.nbytes
        return by_gram(self._sizes(x), make, scale, self._precision, operand_bytes, patch_bytes)

    def _pixel_gram(self, x: jax.Array, g: jax.Array, scale: float) -> Way:
        """Gram without patches: their inner products are sums of those of pixels."""
        images = x.shape[1] * x.shape[2]
        sizes = self._sizes(x)
        padded = [
            low + high + size + (size - 1) * interior
            for size, (low, high, interior) in zip(self._pixels, self._padding, strict=True)
        ]
        pixels = images * math.prod(padded)
        taps = math.prod(self._taps)
        first, second = 3, 4 + len(padded)

        def run() -> Squares:
            mean = jnp.mean(x, axis=tuple(range(1, x.ndim - 1)), keepdims=True, dtype=jnp.float32)
            # Padded before the mean is taken off: it is that of all patches then.
            inputs = centred(self._padded(x), mean)
            blocks = self._in_blocks(inputs)
            of_pixels = gram(blocks, self._precision)
            of_pixels = of_pixels.reshape(*of_pixels.shape[:2], *(images, *padded) * 2)
            of_patches = _sum_of(self._shifted(of_pixels, starts=(first, second)))
            mean = self._in_blocks(mean)[:, :, 0]
            along_mean = along(blocks, mean)
            along_mean = along_mean.reshape(*along_mean.shape[:2], images, *padded)
            along_mean = _sum_of(self._shifted(along_mean, starts=(first,)))
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
        moved = 8.0 * blocks * (pixels**2 + 2 * sizes.uses**2)
        reread = GRAM_PASSES * (x.nbytes + g.nbytes)
        return Way("Pixel-Gram", 0.0, flops, moved, run, reread=reread)

    def _padded(self, x: jax.Array) -> jax.Array:
        padding = [(0, 0, 0)] * 3 + self._padding + [(0, 0, 0)]
        return jax.lax.pad(x, jnp.zeros((), x.dtype), padding)

    def _shifted(
        self, x: jax.Array, starts: Sequence[int] = (3,), whole: int | None = None
    ) -> list[jax.Array]:
        """For each tap, the pixels that it meets; `whole` is an axis that is not cut."""
        cuts = []
        for axis, (taps, stride, step, positions) in enumerate(
            zip(self._taps, self._strides, self._dilations, self._positions, strict=True)
        ):
            length = (positions - 1) * stride + 1
            if axis == whole:
                taps, length = 1, positions + (taps - 1) * step
            cuts.append([(k * step, k * step + length, stride) for k in range(taps)])
        parts = []
        for chosen in itertools.product(*cuts):
            limits = [(0, size, 1) for size in x.shape]
            for start in starts:
                limits[start : start + len(chosen)] = chosen
            parts.append(jax.lax.slice(x, *zip(*limits, strict=True)))
        return parts

    def _patches(self, x: jax.Array, whole: int | None = None) -> jax.Array:
        """`[G, b, R, *positions, taps * channels]`, the channels in blocks on the outside."""
        parts = self._shifted(self._padded(x), whole=whole)
        if len(parts) == 1:
            return parts[0]
        if self._blocks == 1:
            return jnp.concatenate(parts, axis=-1)
        parts = [part.reshape(*part.shape[:-1], self._blocks, self._inner) for part in parts]
        return jnp.concatenate(parts, axis=-1).reshape(*parts[0].shape[:-2], -1)

    def _in_blocks(self, x: jax.Array) -> jax.Array:
        """`[G, b, R, *positions, blocks * width]` to `[G, blocks, uses, width]`."""
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


def _channels_last(x: jax.Array, spec: Sequence[int]) -> jax.Array:
    """`[G, b, *axes]` to `[G, b, R, *positions, channels]`: R shares the axis of the batch."""
    batch, channels, *positions = spec
    return x.transpose([0, 1, *(axis + 2 for axis in (batch, *positions, channels))])
