"""How a TPU's kernel cuts its work, and where things lie while it works.

The uses of a convolution's weights are numbered as positions in an image with a margin, so that for
every tap the pixels that they meet have numbers that are as much larger: the tap's offset. Of the
pixels in a stride, each is in an image of its own.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from clars_optax.norms._rules._geometry import Geometry, Window

LANES = 128
"""Channels of a register."""

ROWS = 8
"""Rows of one, of 32 bits an entry."""

SIDE = 8
"""Groups of a step."""

# Uses that are multiplied at a time: twice as many where nothing is put behind the last one.
_LARGEST_CHUNK = 512

# The largest side of a tile, in registers.
_LARGEST_SIDE = 8


class Run(NamedTuple):
    """Entries at even distances: the first one and the distance, where they come from and go to."""

    source: int
    source_step: int
    target: int
    target_step: int
    number: int


@dataclass(frozen=True)
class Axis:
    """An axis of the images.

    Attributes:
      window: how it meets an axis of a kernel.
      length: what an image has of it, with its margin.
      phases: which of a stride's images are met by taps.
    """

    window: Window
    length: int
    phases: tuple[int, ...]

    @classmethod
    def of(cls, window: Window) -> "Axis":
        """That of a window."""
        shifts, phases = zip(*_steps(window), strict=True)
        return cls(window, window.positions + max(shifts), tuple(sorted(set(phases))))

    @property
    def taps(self) -> list[tuple[int, int]]:
        """For each tap, the number of its image, and its shift there."""
        return [(self.phases.index(phase), shift) for shift, phase in _steps(self.window)]

    def pixels(self, phase: int) -> Run:
        """Those of an image, and their positions in it."""
        window = self.window
        found = [
            (pixel, position)
            for pixel in range(window.pixels)
            for position, rest in [divmod(window.padding + pixel * window.spread, window.stride)]
            if rest == phase and 0 <= position < self.length
        ]
        if not found:
            return Run(0, 1, 0, 1, 0)
        (source, target), (source_step, target_step) = found[0], (1, 1)
        if len(found) > 1:
            source_step, target_step = found[1][0] - source, found[1][1] - target
        return Run(source, source_step, target, target_step, len(found))


@dataclass(frozen=True)
class Blocks:
    """How the work is cut.

    Cotangents are turned on the chip, once for all taps and input channels. The fewer output
    channels the better: where positions are pixels, images and cotangents may change places.

    Attributes:
      geometry: where things are; with images and cotangents in each other's place, if they are.
      is_swapped: whether they are.
      itemsize: bytes of an entry.
      axes: those of the images; none where uses have no positions.
      chunk: uses that are multiplied at a time.
      rows: input channels of a tile.
      columns: output channels of a tile.
    """

    geometry: Geometry
    is_swapped: bool
    itemsize: int
    axes: tuple[Axis, ...]
    chunk: int
    rows: int
    columns: int

    # A network has the same convolution many times, and each time asks more than once.
    @classmethod
    @functools.cache
    def of(cls, geometry: Geometry, itemsize: int, chip_bytes: int) -> "Blocks | None":
        """Cuts it so that a step fits into so many bytes on the chip; None if none does."""
        if geometry.blocks > 1 or geometry.folded:
            return None
        is_swapped = geometry.outer > geometry.inner and all(
            window.is_plain for window in geometry.windows
        )
        if is_swapped:
            geometry = replace(geometry, inner=geometry.outer, outer=geometry.inner)
        axes = tuple(map(Axis.of, geometry.windows))
        chunk = _chunk(geometry, axes)
        if chunk is None:
            return None
        sides = [
            [LANES * number for number in _divisors(math.ceil(size / LANES))]
            for size in (geometry.inner, geometry.outer)
        ]
        found = (
            cls(geometry, is_swapped, itemsize, axes, chunk, *tile)
            for tile in itertools.product(*sides)
        )
        return min(
            (blocks for blocks in found if blocks.bytes <= chip_bytes),
            key=lambda blocks: (blocks.loaded, blocks.bytes),
            default=None,
        )

    @property
    def loaded(self) -> int:
        """Entries that are loaded for a group, by all tiles."""
        return (
            self.row_tiles
            * self.column_tiles
            * (self.pixels * self.rows + self.uses * self.columns)
        )

    @property
    def width(self) -> int:
        """Input channels that are multiplied at a time."""
        return _part(self.rows)

    @property
    def height(self) -> int:
        """Output channels that are multiplied at a time."""
        return _part(self.columns)

    @property
    def is_apart(self) -> bool:
        """Whether the entries of a group lie apart, and those of all groups side by side."""
        return bool(self.axes)

    @property
    def row_tiles(self) -> int:
        """Tiles of input channels."""
        return math.ceil(self.geometry.inner / self.rows)

    @property
    def column_tiles(self) -> int:
        """Tiles of output channels."""
        return math.ceil(self.geometry.outer / self.columns)

    @property
    def inner(self) -> int:
        """Input channels of all tiles."""
        return self.row_tiles * self.rows

    @property
    def outer(self) -> int:
        """Output channels of all tiles."""
        return self.column_tiles * self.columns

    @property
    def groups(self) -> int:
        """Groups of all steps."""
        return filled(self.geometry.groups, SIDE)

    @property
    def chunks(self) -> int:
        """How often so many uses are multiplied."""
        return math.ceil(_uses(self.geometry, self.axes) / self.chunk)

    @property
    def groups_of_word(self) -> int:
        """Groups that share a word of 32 bits where they lie side by side."""
        return 4 // self.itemsize if self.is_apart else 1

    @property
    def words(self) -> int:
        """Words of a step's groups."""
        return SIDE // self.groups_of_word

    @property
    def pixels(self) -> int:
        """Rows of the operand that holds the images, for a group."""
        return self.geometry.images * math.prod(w.pixels for w in self.geometry.windows)

    @property
    def uses(self) -> int:
        """Rows of the other operand."""
        return self.geometry.uses

    @property
    def cotangent_rows(self) -> int:
        """Rows of the cotangents as they are multiplied, with margins and what fills the chunks."""
        return self.chunks * self.chunk

    @property
    def image_rows(self) -> int:
        """Likewise of the images, with all shifts."""
        return filled(self.cotangent_rows + max(self.offsets), ROWS)

    @property
    def offsets(self) -> tuple[int, ...]:
        """For each tap, the row of the images that the first use meets."""
        offsets = []
        for taps in itertools.product(*(axis.taps for axis in self.axes)):
            number, offset = 0, 0
            for axis, (image, shift) in zip(self.axes, taps, strict=True):
                number = number * len(axis.phases) + image
                offset = offset * axis.length + shift
            offsets.append(number * _rows_of_image(self.geometry, self.axes) + offset)
        return tuple(offsets)

    @property
    def image_runs(self) -> list[list[Run]]:
        """Where the rows of the images go: runs inside each other, for each image of a stride."""
        sizes = [axis.window.pixels for axis in self.axes]
        chosen = itertools.product(*(axis.phases for axis in self.axes))
        return [
            self._runs(sizes, list(map(Axis.pixels, self.axes, phases)), number)
            for number, phases in enumerate(chosen)
        ]

    @property
    def cotangent_runs(self) -> list[list[Run]]:
        """Where the rows of the cotangents go."""
        sizes = [axis.window.positions for axis in self.axes]
        return [self._runs(sizes, [Run(0, 1, 0, 1, size) for size in sizes], 0)]

    def _runs(self, sizes: Sequence[int], runs: Sequence[Run], number: int) -> list[Run]:
        """Runs of rows, from those along the axes.

        Args:
          sizes: those of the axes where the rows come from.
          runs: along each of them.
          number: which of a stride's images they go to.
        """
        start = number * _rows_of_image(self.geometry, self.axes)
        lengths = [axis.length for axis in self.axes]
        found = [Run(0, math.prod(sizes), start, math.prod(lengths), self.geometry.images)]
        for index, run in enumerate(runs, 1):
            pitch, pitch_there = math.prod(sizes[index:]), math.prod(lengths[index:])
            inner = Run(
                run.source * pitch,
                run.source_step * pitch,
                run.target * pitch_there,
                run.target_step * pitch_there,
                run.number,
            )
            outer = found[-1]
            reach = inner.number * inner.source_step, inner.number * inner.target_step
            if outer.number == 1 or reach == (outer.source_step, outer.target_step):
                # One follows on the other.
                found[-1] = inner._replace(
                    source=outer.source + inner.source,
                    target=outer.target + inner.target,
                    number=outer.number * inner.number,
                )
            else:
                found.append(inner)
        return found

    @property
    def bytes(self) -> int:
        """What a step needs on the chip."""
        rows = self.image_rows * self.rows + self.cotangent_rows * self.columns
        needed = 2 * SIDE * self.itemsize * (self.pixels * self.rows + self.uses * self.columns)
        needed += self.itemsize * self.groups_of_word * self.cotangent_rows * self.columns
        if self.is_apart:
            needed += 4 * self.words * rows
        # Sums over chunks, and as much again for what goes on between loads and products.
        side = max(self.width, self.height)
        needed += 12 * self.groups_of_word * side * max(side, self.chunk)
        return needed + 8 * self.geometry.taps * self.rows * self.columns


def filled(size: float, unit: int) -> int:
    """How many there are in whole units."""
    return math.ceil(size / unit) * unit


def _steps(window: Window) -> list[tuple[int, int]]:
    """For each tap, how many strides it is from the first one, and the pixels that are left."""
    return [divmod(tap * window.dilation, window.stride) for tap in range(window.taps)]


def _rows_of_image(geometry: Geometry, axes: Sequence[Axis]) -> int:
    """Rows of an image, or of one of a stride's, with its margin, for all examples of a group."""
    return geometry.images * math.prod(axis.length for axis in axes)


def _uses(geometry: Geometry, axes: Sequence[Axis]) -> int:
    """Rows up to the last use."""
    margin = 0
    for axis in axes:
        margin = margin * axis.length + axis.length - axis.window.positions
    return _rows_of_image(geometry, axes) - margin


def _chunk(geometry: Geometry, axes: Sequence[Axis]) -> int | None:
    """How many uses to multiply at a time, if there is a number."""
    uses = _uses(geometry, axes)
    if not axes:
        # Nothing is put behind the last one.
        numbers = (n for n in range(1, uses // LANES + 2) if n == 1 or uses % (n * LANES) == 0)
        return next((uses // n for n in numbers if uses // n <= 2 * _LARGEST_CHUNK), None)
    # A half is a number of whole registers. The unit for products takes as long for any number up
    # to 128, and a chunk more costs about as much.
    sizes = {filled(uses / n, 2 * ROWS) for n in range(1, uses // 16 + 2)}
    return min(
        (size for size in sizes if size <= _LARGEST_CHUNK),
        key=lambda size: (
            math.ceil(uses / size) * (filled(size, LANES) + LANES),
            -size,
        ),
    )


def _divisors(size: int) -> list[int]:
    """Those that a tile's side may have."""
    return [n for n in range(1, min(size, _LARGEST_SIDE) + 1) if size % n == 0]


def _part(side: int) -> int:
    """The part of a tile's side that fills the unit for products, and not much more code."""
    return LANES * next((n for n in (2, 3) if side % (n * LANES) == 0), 1)
