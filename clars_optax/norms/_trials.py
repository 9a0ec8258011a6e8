"""Tries the kernels that the norms of a loss may take, before its backward pass is traced."""

from collections.abc import Iterator
from typing import Any, cast

import jax

from clars_optax.norms._plan import Plan
from clars_optax.norms._program import Value
from clars_optax.norms._rows import Rows
from clars_optax.norms._rules import Platform, Rule, all_at_once, platform
from clars_optax.norms._taps import Use


def try_kernels(plan: Plan, rows: Rows) -> None:
    """Tries on a GPU all kinds of kernels that the rules may take, side by side."""
    device = platform()
    if device.kernels != "compiled":
        return
    with all_at_once():
        for use, rule in _claims_of(plan):
            _ask(use, rule, rows, device)


def _ask(use: Use, rule: Rule, rows: Rows, device: Platform) -> None:
    # The ways are of no use yet: what counts is which kernels they ask for.
    def find(arguments: Any, cotangent: Any) -> None:
        use.ways(rule, arguments, cotangent, rows, device)

    operation = use.operation
    jax.eval_shape(find, [_type_of(x) for x in operation.arguments], _type_of(operation.outputs[0]))


def _type_of(value: Value) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(value.shape, value.aval.dtype)


def _claims_of(plan: Plan) -> Iterator[tuple[Use, Rule]]:
    """Of nested programs too."""
    for operation, claim in plan.claims.items():
        yield plan.use(operation), claim.rule
    for nested in plan.nested.values():
        for inner in nested.plans:
            yield from _claims_of(cast(Plan, inner))
