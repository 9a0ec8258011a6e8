"""What is known of the values of a loss before it is planned what to do with them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import jax.numpy as jnp

from clars_optax.norms._layout import Layout
from clars_optax.norms._obstacles import (
    MIXED_INSIDE,
    NOT_LINEAR,
    ONE_FOR_ALL,
    SIZED_INSIDE,
    Obstacle,
)
from clars_optax.norms._program import Operation, Value
from clars_optax.norms._separate import has_same_numbers, is_linear, keeps_examples_apart


@dataclass(frozen=True)
class Scope:
    """What is known of all values of a loss, those inside of nested programs included.

    Args:
      layouts: how the batch lies in each value.
      pairs: the values that the loss at twice the batch size has at the same place.
      num_examples: the batch size N.
      with_rules: whether rules may claim parameters.
      twins: what stands in the place of some operations in the loss of a group (see
        `Plan.untraced`).
    """

    layouts: Mapping[Value, Layout]
    pairs: Mapping[Value, Value]
    num_examples: int
    with_rules: bool
    twins: dict[Operation, Operation] = field(default_factory=dict)

    def carries_all(self, value: Value) -> bool:
        """Whether a value has a place for every example."""
        layout = self.layouts[value]
        return layout.problem is not None or (
            layout.carries_batch and layout.is_complete(self.num_examples)
        )

    def own_derivative_obstacle(self, operation: Operation) -> Obstacle | None:
        """Why an operation's own derivative cannot be taken for each example by itself."""
        if not any(self.layouts[value].carries_batch for value in operation.operands):
            return None if is_linear(operation) else NOT_LINEAR
        if operation.name != "custom_vjp_call":
            return None
        twin = self.pairs[operation.outputs[0]].producer
        if twin is not None and not _alike(operation, twin):
            return ONE_FOR_ALL
        if twin is None or not keeps_examples_apart(
            operation, twin, self.layouts, self.num_examples
        ):
            return MIXED_INSIDE
        return None if has_same_numbers(operation, twin) else SIZED_INSIDE


def _alike(operation: Operation, twin: Operation) -> bool:
    """Whether all results of a function grow with the batch, those that nobody uses too."""
    avals = [[x.aval for x in one.equation.outvars] for one in (operation, twin)]
    return all(
        small.shape != large.shape or not jnp.issubdtype(small.dtype, jnp.inexact)
        for small, large in zip(*avals, strict=True)
    )
