"""Tries the kernels that the norms of a loss may take, before its backward pass is traced."""

from collections.abc import Iterator
from typing import Any, cast

import jax

from clars_optax.norms._plan import Plan
from clars_optax.norms._program import Operation
from clars_optax.norms._rows import Rows
from clars_optax.norms._rules import Platform, Rule, all_at_once, platform
from clars_optax.norms._use import Use


def try_kernels(plan: Plan, rows: Rows) -> None:
    """Tries on the device all kinds of kernels that the rules may take, side by side."""
    device = platform()
    if device.kernels == "none" or device.interprets:
        return
    with all_at_once():
        for inner, operation in claims_of(plan):
            _ask(inner.use(operation), inner.claims[operation].rule, rows, device)


def _ask(use: Use, rule: Rule, rows: Rows, device: Platform) -> None:
    # The ways are of no use yet: what counts is which kernels they ask for.
    def find(arguments: Any, cotangent: Any) -> None:
        use.ways(rule, arguments, cotangent, rows, device)

    jax.eval_shape(find, *use.types)


def claims_of(plan: Plan) -> Iterator[tuple[Plan, Operation]]:
    """The operations that have claimed a parameter, with their plans: of nested programs too."""
    for operation in plan.claims:
        yield plan, operation
    for nested in plan.nested.values():
        for inner in nested.plans:
            yield from claims_of(cast(Plan, inner))
