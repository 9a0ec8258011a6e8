"""Tables of which examples look up entries: embeddings."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import GatherScatterMode

from clars_optax.norms._rules._products import gram, squared, without_underflow
from clars_optax.norms._rules._ways import Platform, Squares, Way


class Embedding:
    """A `gather` of entries from a parameter.

    Args:
      params: the parameters of the primitive `gather`.
      shapes: those of the table, the indices and the result.
    """

    def __init__(self, params: dict[str, Any], shapes: Sequence[Sequence[int]]):
        numbers = params["dimension_numbers"]
        table, _, result = shapes
        self._entry_axes = tuple(numbers.offset_dims)
        self._use_axes = tuple(i for i in range(len(result)) if i not in self._entry_axes)
        self._lengths = [table[axis] for axis in numbers.start_index_map]
        # What is promised to be inside is looked up clipped, but has no gradient.
        self._drops = params["mode"] != GatherScatterMode.CLIP

    def ways(self, x: jax.Array, g: jax.Array, scale: float, device: Platform) -> list[Way]:
        """The ways to the squared norms, from arrays `[G, b, *axes]`.

        The inputs of the product are one-hot vectors. Their Gram matrix says which uses looked up
        the same entry; with many uses, the cotangents of each entry are added up instead.
        """
        num_groups = x.shape[0]
        uses = math.prod(x.shape[1:-1])
        width = math.prod(g.shape[1:]) // uses

        def inputs() -> tuple[jax.Array, jax.Array]:
            # Small integers could not hold the length of the table.
            places = x.reshape(num_groups, uses, len(self._lengths)).astype(jnp.int32)
            c = g.transpose([0, 1, *(i + 2 for i in (*self._use_axes, *self._entry_axes))])
            c = c.reshape(num_groups, uses, width)
            bounds = jnp.array(self._lengths, jnp.int32)
            if self._drops:
                inside = jnp.all((places >= 0) & (places < bounds), axis=-1)
                c = jnp.where(inside[..., None], c, 0)
            return jnp.clip(places, 0, bounds - 1), c

        def by_pairs() -> Squares:
            places, c = inputs()
            same = jnp.all(places[:, :, None] == places[:, None, :], axis=-1)
            c, rest = without_underflow(c[:, None], scale)
            pairs = same[:, None] * gram(c, jax.lax.Precision.HIGHEST)
            return Squares(jnp.maximum(jnp.sum(pairs, axis=(1, 2, 3)), 0) * rest**2, None)

        def by_entries() -> Squares:
            places, c = inputs()
            order = jnp.lexsort(tuple(jnp.moveaxis(places, -1, 0)), axis=-1)
            ordered = jnp.take_along_axis(places, order[..., None], axis=1)
            is_new = jnp.any(ordered[:, 1:] != ordered[:, :-1], axis=-1)
            entries = jnp.pad(jnp.cumsum(is_new, axis=1), ((0, 0), (1, 0)))
            c = jnp.take_along_axis(c, order[..., None], axis=1).astype(jnp.float32) * scale
            add = functools.partial(jax.ops.segment_sum, num_segments=uses, indices_are_sorted=True)
            return Squares(squared(jax.vmap(add)(c, entries)), None)

        # Sorting, and adding up at sorted places, is much slower than moving the same bytes.
        sorted_bytes = 40.0 * 4 * num_groups * uses * width
        pairs = 1.0 * num_groups * uses**2
        return [
            Way("Gram", 0.0, 2.0 * pairs * width, 12.0 * pairs, by_pairs),
            Way("Direct", 0.0, 0.0, sorted_bytes, by_entries),
        ]

    def gradient(self, x: jax.Array, g: jax.Array) -> None:
        """None: the look-up's own derivative is as good."""


def is_lookup(params: dict[str, Any], shapes: Sequence[Sequence[int]]) -> bool:
    """Whether a gather takes whole entries: one position on some axes, all of the others."""
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    looked_up = {*numbers.start_index_map}
    return (
        not numbers.operand_batching_dims
        and {*numbers.collapsed_slice_dims} == looked_up
        and all(
            size == (1 if axis in looked_up else shapes[0][axis]) for axis, size in enumerate(sizes)
        )
    )
