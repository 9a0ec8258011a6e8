"""Tables of which examples look up entries: embeddings."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import GatherScatterMode

from clars_optax.norms._rules._products import gram, paired
from clars_optax.norms._rules._ways import Squares, Way


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
        self._drops = params["mode"] == GatherScatterMode.FILL_OR_DROP

    def ways(self, x: jax.Array, g: jax.Array, scale: float) -> list[Way]:
        """The ways to the squared norms, from arrays `[G, b, *axes]`.

        The inputs of the product are one-hot vectors, so that their Gram matrix says which uses
        looked up the same entry.
        """
        num_groups = x.shape[0]
        uses = math.prod(x.shape[1:-1])
        width = math.prod(g.shape[1:]) // uses

        def run() -> Squares:
            places = x.reshape(num_groups, uses, len(self._lengths))
            c = g.transpose([0, 1, *(i + 2 for i in (*self._use_axes, *self._entry_axes))])
            c = c.reshape(num_groups, 1, uses, width) * scale
            bounds = jnp.array(self._lengths, places.dtype)
            if self._drops:
                inside = jnp.all((places >= 0) & (places < bounds), axis=-1)
                c = jnp.where(inside[:, None, :, None], c, 0)
            places = jnp.clip(places, 0, bounds - 1)
            same = jnp.all(places[:, :, None] == places[:, None, :], axis=-1)
            products = gram(c, jax.lax.Precision.HIGHEST)
            return Squares(paired(same[:, None].astype(jnp.float32), products), None)

        flops = 2.0 * num_groups * uses**2 * width
        return [Way(flops, 12.0 * num_groups * uses**2, run)]


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
