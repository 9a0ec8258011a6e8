"""The operands of a TPU's kernel: how they come on the chip, and how a group's rows are read there.

XLA's convolutions on TPUs keep the examples next to the channels, `[*pixels, N, channels]`, so that
the entries of one example lie apart. They are loaded so, and copied together on the chip, each row
to where `Blocks` has it; margins and strides need no copy in memory then. A word has 32 bits: two
examples in bfloat16, which are told apart by moving bits.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from clars_optax.norms._rules._blocks import LANES, SIDE, Blocks, Run

# Rows that are copied in a step of a loop.
_COPIED = 64


Reader = Callable[[Any, Any, Any, int], list[jax.Array]]
"""Reads a chunk of the rows of each of a word's groups.

It takes the number of the word, the first row, which part of the tile's channels, and how many
channels such a part has.
"""


@dataclass(frozen=True)
class Tile:
    """A tile of an operand's channels.

    Attributes:
      channels: how many the operand has.
      size: how many a tile has.
      axis: the axis of the grid that numbers the tiles.
    """

    channels: int
    size: int
    axis: int

    def cut(self) -> Callable[[Any, jax.Array], jax.Array]:
        """What puts zeros where there are no channels, and memory holds anything.

        It takes the number of a channel of the tile, and rows of those from there on.
        """
        from jax.experimental import pallas as pl

        # Here: Pallas's interpreter does not know it in a loop.
        end = self.channels - pl.program_id(self.axis) * self.size

        def without_rest(first: Any, rows: jax.Array) -> jax.Array:
            if self.channels % LANES == 0:
                return rows
            lanes = jax.lax.broadcasted_iota(jnp.int32, rows.shape, 1)
            return jnp.where(lanes < end - first, rows, jnp.zeros_like(rows))

        return without_rest


@dataclass(frozen=True)
class Together:
    """Images or cotangents `[G, T, channels]`: the entries of a group lie together.

    Attributes:
      blocks: how the work is cut.
      tile: of the channels.
    """

    blocks: Blocks
    tile: Tile

    def views(self, x: jax.Array) -> list[jax.Array]:
        """What the kernel gets, from `[G, ..., channels]`."""
        return [_with_whole_steps(x.reshape(len(x), -1, self.tile.channels), axis=0)]

    def specs(self) -> list[Any]:
        """What a step gets of these."""
        from jax.experimental import pallas as pl

        def place(*indices: Any) -> tuple[Any, ...]:
            return indices[2], 0, indices[self.tile.axis]

        return [pl.BlockSpec((SIDE, self.blocks.uses, self.tile.size), place)]

    def stages(self) -> list[Any]:
        """What it needs on the chip besides."""
        return []

    def prepared(self, views: Sequence[Any], stages: Sequence[Any]) -> Reader:
        """Prepares those of a step, and returns what reads them."""
        from jax.experimental import pallas as pl

        without_rest = self.tile.cut()

        def read(word: Any, start: Any, part: Any, width: int) -> list[jax.Array]:
            lanes = pl.ds(pl.multiple_of(part * width, LANES), width)
            rows = views[0][word, pl.ds(start, self.blocks.chunk), lanes]
            return [without_rest(part * width, rows)]

        return read


@dataclass(frozen=True)
class Apart:
    """Images or cotangents `[G, ..., channels]` that lie in memory as `[..., G, channels]`.

    Attributes:
      blocks: how the work is cut.
      tile: of the channels.
      dtype: that of the entries.
      rows_there: rows of a group in memory.
      rows_here: likewise on the chip; where nothing is copied there are zeros.
      runs: which rows are copied, and where to.
    """

    blocks: Blocks
    tile: Tile
    dtype: Any
    rows_there: int
    rows_here: int
    runs: list[list[Run]]

    def views(self, x: jax.Array) -> list[jax.Array]:
        """What the kernel gets, from `[G, ..., channels]`: the same for each register's width."""
        x = x.reshape(len(x), -1, self.tile.channels).swapaxes(0, 1)
        return [_with_whole_steps(x, axis=1)] * self._number

    def specs(self) -> list[Any]:
        """What a step gets of these."""
        from jax.experimental import pallas as pl

        def place(*indices: Any, index: int) -> tuple[Any, ...]:
            return 0, indices[2], indices[self.tile.axis] * self._number + index

        # Only what is as wide as a register can be read at a distance.
        return [
            pl.BlockSpec((self.rows_there, SIDE, LANES), functools.partial(place, index=index))
            for index in range(self._number)
        ]

    def stages(self) -> list[Any]:
        """What it needs on the chip besides: room for a group's rows, one after the other."""
        from jax.experimental.pallas import tpu

        word = self.dtype if self.blocks.groups_of_word == 1 else jnp.uint32
        return [tpu.VMEM((self._number, self.blocks.words, self.rows_here, LANES), word)]

    def prepared(self, views: Sequence[Any], stages: Sequence[Any]) -> Reader:
        """Prepares those of a step, and returns what reads them.

        The rows of two groups of a word come in another order; what they are multiplied by has the
        same.
        """
        from jax.experimental import pallas as pl

        (stage,) = stages
        without_rest = self.tile.cut()

        @pl.when(pl.program_id(2) == 0)
        def _() -> None:
            rest = stage.at[:, :, self._copied_whole :]
            rest[...] = jnp.zeros_like(rest)

        for index, view in enumerate(views):
            finish = functools.partial(without_rest, index * LANES)
            for runs in self.runs:
                _copy(view, stage.at[index], runs, finish)

        def read(word: Any, start: Any, part: Any, width: int) -> list[jax.Array]:
            number = width // LANES
            of_views = [
                _split(stage.at[part * number + index, word], start, self.blocks.chunk, self.dtype)
                for index in range(number)
            ]
            return [jnp.concatenate(rows, axis=1) for rows in zip(*of_views, strict=True)]

        return read

    @property
    def _copied_whole(self) -> int:
        """Rows on the chip that every step copies all of."""
        (first, *inner), *others = self.runs
        if inner or others or (first.target, first.target_step) != (0, 1):
            return 0
        return min(first.number, self.rows_here - 1) // 8 * 8

    @property
    def _number(self) -> int:
        return self.tile.size // LANES


Operand = Together | Apart


def loop(number: int, body: Callable[[Any, Any], Any], carried: Any) -> Any:
    """`jax.lax.fori_loop` from 0, or the body alone where it is run once."""
    if number == 1:
        return body(0, carried)
    return jax.lax.fori_loop(0, number, body, carried)


def _with_whole_steps(x: jax.Array, axis: int) -> jax.Array:
    """With more groups, of zeros, so that every step has all of its own."""
    missing = -x.shape[axis] % SIDE
    if not missing:
        return x
    margins = [(0, missing if index == axis else 0, 0) for index in range(x.ndim)]
    return jax.lax.pad(x, jnp.zeros((), x.dtype), margins)


def _copy(
    view: Any, stage: Any, runs: Sequence[Run], finish: Callable[[jax.Array], jax.Array]
) -> None:
    """Copies words `[rows, words, LANES]`, of one or two groups, to `[words, rows, LANES]`.

    Args:
      view: where they come from, `[rows, groups, LANES]`.
      stage: where they go.
      runs: which rows go where; runs inside each other.
      finish: what is done with them on the way.
    """
    from jax.experimental import pallas as pl

    words = stage.shape[0]
    if view.dtype != stage.dtype:
        view = view.bitcast(stage.dtype)
    flat = view.reshape(view.shape[0] * words, LANES)

    def take(runs: Sequence[Run], source: Any, target: Any) -> None:
        run, *others = runs

        def some(first: Any, number: int) -> None:
            begin = source + run.source + first * run.source_step
            goal = target + run.target + first * run.target_step
            if others:
                for index in range(number):
                    take(others, begin + index * run.source_step, goal + index * run.target_step)
                return
            reach = ((number - 1) * run.source_step + 1) * words
            rows = flat.at[pl.ds(pl.multiple_of(begin * words, words), reach)]
            for word in range(words):
                loaded = rows[pl.ds(word, number, stride=run.source_step * words)]
                there = stage.at[word]
                there[pl.ds(goal, number, stride=run.target_step)] = finish(loaded)

        size = max(1, _COPIED // math.prod(run.number for run in others))
        whole, rest = divmod(run.number, size)
        if whole:
            loop(whole, lambda index, _: some(index * size, size), None)
        if rest:
            some(whole * size, rest)

    if all(run.number for run in runs):
        take(runs, 0, 0)


def _split(words: Any, start: Any, number: int, dtype: Any) -> list[jax.Array]:
    """So many rows of each of the groups whose words these are."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu

    if words.dtype == dtype:
        return [words[pl.ds(start, number)]]
    half = number // 2
    first, second = (words[pl.ds(begin, half)] for begin in (start, start + half))
    low, high, bits = jnp.uint32(0xFFFF), jnp.uint32(0xFFFF0000), jnp.uint32(16)
    return [
        tpu.bitcast(both, dtype)
        for both in ((first & low) | (second << bits), (first >> bits) | (second & high))
    ]
