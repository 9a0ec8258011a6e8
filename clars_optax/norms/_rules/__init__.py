"""Faster ways to the norms for the uses of parameters that matter: products in the wide sense.

A rule knows arrays and shapes. It is for a parameter that is used once, in one operation, with one
other operand that carries the batch.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import jax

from clars_optax.norms._rules._conv import Conv
from clars_optax.norms._rules._dense import Dense
from clars_optax.norms._rules._elementwise import Elementwise
from clars_optax.norms._rules._embedding import Embedding, is_lookup
from clars_optax.norms._rules._platforms import platform
from clars_optax.norms._rules._trial import all_at_once
from clars_optax.norms._rules._ways import Platform, Squares, Way, cheapest, cost

__all__ = [
    "Elementwise",
    "Platform",
    "Rule",
    "Squares",
    "Way",
    "all_at_once",
    "cheapest",
    "cost",
    "find_rule",
    "platform",
]


class Rule(Protocol):
    """The ways to find squared norms for a use of a parameter."""

    def ways(self, x: jax.Array, g: jax.Array, scale: float, device: Platform) -> list[Way]:
        """The ways there are.

        Args:
          x: the other operand, `[G, b, *axes]` with G groups of b examples; its axes are all there,
            that of the batch with what one example has on it.
          g: the cotangent of the result, in the same form.
          scale: a factor for the gradients of which the norms are wanted.
          device: what the program will run on.
        """
        ...

    def gradient(self, x: jax.Array, g: jax.Array) -> jax.Array | None:
        """The weight gradient alone; None where the operation's own derivative is as good."""
        ...


def find_rule(
    primitive: str, params: dict[str, Any], shapes: Sequence[Sequence[int]], position: int
) -> Rule | None:
    """The rule for a use of a parameter, if there is one.

    Args:
      primitive: the name of the operation.
      params: its parameters.
      shapes: those of its operands and of its result.
      position: which operand the parameter is.
    """
    match primitive, position:
        case "dot_general", (0 | 1):
            numbers, precision = params["dimension_numbers"], params["precision"]
            return Dense(position, numbers, precision, shapes[:2])
        case "conv_general_dilated", 1 if params["batch_group_count"] == 1:
            return Conv(params, shapes)
        case "gather", 0 if is_lookup(params, shapes):
            return Embedding(params, shapes)
        case (("add" | "sub" | "mul"), (0 | 1)) if len(shapes[0]) == len(shapes[1]):
            return Elementwise(primitive, position, shapes[position])
    return None
