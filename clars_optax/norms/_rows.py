"""What the rows of a shadow stand for: groups of examples, or single ones."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from clars_optax.norms._layout import Layout, split_examples, split_groups
from clars_optax.norms._rules._products import squared


@dataclass(frozen=True)
class Rows:
    """What the rows of a shadow stand for.

    Usually the groups of `group_size` examples, and one more row for the examples whose norms are
    not asked for. `by_example`: all N examples, for a batch that is split over several axes, where
    a group has no place of its own.
    """

    num_examples: int
    group_size: int
    num_norm_examples: int
    is_mean: bool
    by_example: bool = False

    @property
    def num_groups(self) -> int:
        """How many norms there are."""
        return self.num_norm_examples // self.group_size

    @property
    def has_rest(self) -> bool:
        """Whether some examples are in no group."""
        return self.num_norm_examples < self.num_examples

    @property
    def count(self) -> int:
        """How many rows there are."""
        return self.num_examples if self.by_example else self.num_groups + self.has_rest

    def cut(self, x: jax.Array, layout: Layout) -> tuple[jax.Array, jax.Array | None]:
        """One entry per row along a new first axis; the rest of the batch by itself."""
        if self.by_example:
            return split_examples(x, layout, self.num_examples), None
        return split_groups(x, layout, num_groups=self.num_groups, group_size=self.group_size)

    def place_rest(self, rest: Any, layout: Layout) -> jax.Array:
        """The rest of a batch in its place among zeros."""
        like = jax.ShapeDtypeStruct(layout.local_shape(self.num_examples), rest.dtype)
        return jax.linear_transpose(lambda x: self.cut(x, layout)[1], like)(rest)[0]

    def copies(self, x: jax.Array, layout: Layout) -> jax.Array:
        """The shadow of a value that has none: every row sees the same, or its own part."""
        if layout.carries_batch:
            return self.cut(x, layout)[0]
        return jnp.broadcast_to(x, (self.count, *jnp.shape(x)))

    def grouped(self, x: jax.Array) -> jax.Array:
        """The examples `[N, ...]` that have norms, `[G, b, ...]`."""
        x = x[: self.num_norm_examples]
        return x.reshape(self.num_groups, self.group_size, *x.shape[1:])

    @property
    def scale(self) -> float:
        """What makes the gradient of a group from its share of the gradient of the loss."""
        return (self.num_examples if self.is_mean else 1) / self.group_size

    def squared_norms(self, rows: jax.Array) -> jax.Array:
        """The squared norm of each group's gradient, float32 `[num_groups]`."""
        if self.by_example:
            shape = (self.num_groups, self.group_size, *rows.shape[1:])
            rows = rows[: self.num_norm_examples].reshape(shape).sum(axis=1)
        # The rows are shares of the gradient of the loss. Scaling comes first: a square would
        # underflow.
        return squared(rows[: self.num_groups].astype(jnp.float32) * self.scale)

    def shares(self) -> jax.Array:
        """The part of the batch that each row stands for, float32 `[count]`."""
        if self.by_example:
            sizes = [1] * self.num_examples
        else:
            sizes = [self.group_size] * self.num_groups
            sizes += [self.num_examples - self.num_norm_examples] * self.has_rest
        return jnp.asarray(sizes, jnp.float32) / self.num_examples
