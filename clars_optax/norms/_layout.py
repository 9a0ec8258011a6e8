"""How the batch lies in an array: on one axis, merged with others, or split over several.

An axis is a row-major product of factors. `[N, T, d]` reshaped to `[N * T, d]` has on its first
axis the factors N (one example a step) and T (not the batch); two views concatenated to `[2 N, d]`
have 2 and N; ghost BatchNorm's `[N / k, k, d]` has N / k on the first axis (k examples a step) and
k on the second.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Factor(NamedTuple):
    """A run of positions on an axis."""

    size: int
    stride: int
    """How many examples one step along the factor is; 0 where the factor is not the batch."""


Axis = tuple[Factor, ...]


@dataclass(frozen=True)
class Layout:
    """The factors of every axis.

    Attributes:
      axes: the factors, by axis.
      problem: why it is not known how the batch lies in the array; else None.
      is_part: whether the array has no batch, but a fixed part of it, as `x[0]` is, or what is made
        of one.
    """

    axes: tuple[Axis, ...]
    problem: str | None = None
    is_part: bool = False

    @property
    def batch_factors(self) -> list[Factor]:
        """The factors that carry the batch, in row-major order."""
        return [factor for axis in self.axes for factor in axis if factor.stride]

    @property
    def carries_batch(self) -> bool:
        """Whether any axis carries the batch, or a part of it."""
        return self.problem is not None or bool(self.batch_factors)

    @property
    def batch_axes(self) -> frozenset[int]:
        """The axes that carry the batch."""
        return frozenset(
            index for index, axis in enumerate(self.axes) if any(factor.stride for factor in axis)
        )

    def is_whole(self, num_examples: int) -> bool:
        """Whether one factor holds all examples in order."""
        return self.problem is None and self.batch_factors == [Factor(num_examples, 1)]

    def is_complete(self, num_examples: int) -> bool:
        """Whether every example has its place exactly once."""
        sizes = [factor.size for factor in self.batch_factors]
        return self.problem is None and math.prod(sizes) == num_examples

    @property
    def is_crossed(self) -> bool:
        """Whether two factors walk through the same examples, as those of `[N, N]` logits do."""
        reach = 1
        for factor in sorted(self.batch_factors, key=lambda factor: factor.stride):
            if factor.stride < reach:
                return True
            reach = factor.stride * factor.size
        return False

    def local_shape(self, examples: int) -> tuple[int, ...]:
        """The shape when the batch has only so many examples (one, where the batch is split)."""
        return tuple(
            math.prod(examples if factor.stride else factor.size for factor in axis)
            for axis in self.axes
        )

    def reshape(self, shape: Sequence[int]) -> "Layout":
        """The layout after a row-major reshape."""
        pending = list(merge([factor for axis in self.axes for factor in axis]))
        axes: list[Axis] = []
        for size in shape:
            axis: list[Factor] = []
            while size > 1:
                factor = pending.pop(0)
                if factor.size > size and factor.size % size == 0:
                    rest = factor.size // size
                    pending.insert(0, Factor(rest, factor.stride))
                    factor = Factor(size, factor.stride * rest)
                if size % factor.size:
                    return unknown(shape, "a reshape cuts across the batch")
                axis.append(factor)
                size //= factor.size
            axes.append(merge(axis))
        return Layout(tuple(axes))


def merge(factors: Sequence[Factor]) -> Axis:
    """Joins neighbours that are one run of positions."""
    merged: list[Factor] = []
    for factor in factors:
        last = merged[-1] if merged else None
        if last is not None and last.stride == factor.stride * factor.size:
            merged[-1] = Factor(last.size * factor.size, factor.stride)
        else:
            merged.append(factor)
    return tuple(merged)


def plain_axis(size: int) -> Axis:
    """An axis that does not carry the batch."""
    return () if size == 1 else (Factor(size, 0),)


def unbatched(shape: Sequence[int]) -> Layout:
    """No axis carries the batch."""
    return Layout(tuple(plain_axis(size) for size in shape))


def leading(shape: Sequence[int]) -> Layout:
    """The first axis is the batch."""
    return Layout(((Factor(shape[0], 1),), *unbatched(shape[1:]).axes))


def unknown(shape: Sequence[int], problem: str) -> Layout:
    """The batch is in the array, but not in a way that can be followed."""
    return Layout(unbatched(shape).axes, problem)


def split_groups(
    x: jax.Array, layout: Layout, *, num_groups: int, group_size: int
) -> tuple[jax.Array, jax.Array | None]:
    """Cuts an array whose layout is whole into groups of examples.

    Returns:
      The groups, `[num_groups, *layout.local_shape(group_size)]`, and what is left of the batch,
      shaped `layout.local_shape(N - num_groups * group_size)`, or None where nothing is left.
    """
    factors = [factor for axis in layout.axes for factor in axis]
    position = next(index for index, factor in enumerate(factors) if factor.stride)
    num_examples = factors[position].size
    x = jnp.moveaxis(x.reshape([factor.size for factor in factors]), position, 0)
    taken = num_groups * group_size
    groups = x[:taken].reshape(num_groups, group_size, *x.shape[1:])
    groups = jnp.moveaxis(groups, 1, position + 1)
    groups = groups.reshape(num_groups, *layout.local_shape(group_size))
    if taken == num_examples:
        return groups, None
    rest = jnp.moveaxis(x[taken:], 0, position)
    return groups, rest.reshape(layout.local_shape(num_examples - taken))


def examples_first(x: jax.Array, layout: Layout) -> jax.Array:
    """The array as `[N, *axes]`, the batch taken out of the axes; every example has its place."""
    factors = [factor for axis in layout.axes for factor in axis]
    batch = [index for index, factor in enumerate(factors) if factor.stride]
    batch.sort(key=lambda index: -factors[index].stride)
    others = [index for index, factor in enumerate(factors) if not factor.stride]
    x = x.reshape([factor.size for factor in factors]).transpose(batch + others)
    return x.reshape(-1, *layout.local_shape(1))


def split_examples(x: jax.Array, layout: Layout, num_examples: int) -> jax.Array:
    """Cuts an array into single examples, `[N, *layout.local_shape(1)]`.

    The batch may be split over several factors, and where the array carries only some of them (the
    statistics of ghost BatchNorm), examples share what it holds.
    """
    factors = [factor for axis in layout.axes for factor in axis]
    batch = [index for index, factor in enumerate(factors) if factor.stride]
    others = [index for index, factor in enumerate(factors) if not factor.stride]
    x = x.reshape([factor.size for factor in factors]).transpose(batch + others)
    example = jnp.arange(num_examples)
    places = tuple(example // factors[i].stride % factors[i].size for i in batch)
    return x[places].reshape(num_examples, *layout.local_shape(1))


def only(axes: Sequence[Axis]) -> Axis | None:
    """The one arrangement that carries the batch, if those that do agree; () where none does."""
    batched = {axis for axis in axes if any(factor.stride for factor in axis)}
    if len(batched) > 1:
        return None
    return batched.pop() if batched else ()


def problem_of(layouts: Sequence[Layout]) -> str | None:
    """The first reason why a layout is unknown; None if all are known."""
    return next((layout.problem for layout in layouts if layout.problem is not None), None)
