"""Runs a loss by its plan, operation by operation, as `jax.core.eval_jaxpr` would."""

from collections.abc import Sequence, Set
from typing import Any

import jax

from clars_optax.norms._layout import Layout
from clars_optax.norms._nested import Entry, Nested
from clars_optax.norms._plan import Plan
from clars_optax.norms._program import Value
from clars_optax.norms._rows import Rows
from clars_optax.norms._taps import carry, claimed, fan_out, meet, spread
from clars_optax.norms._use import Use


def run(plan: Plan, entering: Sequence[Entry], rows: Rows) -> list[Entry]:
    """Runs a program; the gradient with respect to the taps is the squared norms.

    Returns:
      The outputs, with shadows where the plan was asked for them. Gradients flow by the roles that
      were demanded, and by those alone.
    """
    program = plan.program
    values: dict[Value, Any] = {}
    shadows: dict[Value, Any] = {}
    taps: dict[Value, Any] = {}
    for value, entry in zip(program.inputs, entering, strict=True):
        values[value] = entry.value
        if entry.tap is not None:
            taps[value] = entry.tap
            # Gradients reach a parameter through a rule's claim, or else through its shadow alone.
            if not plan.is_claimed(value):
                values[value] = jax.lax.stop_gradient(entry.value)
            if plan.fans_out(value):
                shadows[value] = fan_out(entry.value, entry.tap, rows)
        elif entry.shadow is not None:
            shadows[value] = entry.shadow

    def read(value: Value) -> Any:
        return values.get(value, value.constant)

    def shadows_of(use: Use) -> list[Any]:
        return [shadows[use.operation.arguments[i]] for i in use.shadowed]

    def added(value: Value) -> Any:
        if value in shadows and "sum" not in plan.roles[value]:
            return spread(read(value), shadows[value], rows)
        return read(value)

    def entry_of(value: Value, roles: Set[str], layout: Layout) -> Entry:
        shadow = None
        if "shadow" in roles:
            shadow = shadows[value] if value in shadows else rows.copies(read(value), layout)
        return Entry(added(value) if "sum" in roles else read(value), shadow)

    def run_nested(nested: Nested) -> list[Entry]:
        operation = nested.operation
        entries = [
            Entry(read(value), tap=taps[plan.handed[value]])
            if index in nested.handed
            else entry_of(value, roles, layout)
            for index, (value, roles, layout) in enumerate(nested.entering())
        ]
        return nested.run(run, read(operation.operands[0]), entries, rows)

    for operation in program.operations:
        if operation in plan.nested:
            entries = run_nested(plan.nested[operation])
            for value, entry in zip(operation.outputs, entries, strict=True):
                values[value] = entry.value
                if entry.shadow is not None:
                    shadows[value] = entry.shadow
            continue
        arguments = [read(value) for value in operation.arguments]
        if operation in plan.adding:
            outputs = operation.apply(*map(added, operation.arguments))
        elif operation in plan.claims:
            claim = plan.claims[operation]
            use = plan.use(operation)
            outputs = claimed(use, claim.rule, taps[claim.param], arguments, rows)
        elif operation in plan.meeting:
            use = plan.use(operation)
            rule = None if rows.by_example else plan.rule_of_rows(operation)
            outputs = meet(use, rule, shadows_of(use), arguments, rows)
        else:
            outputs = operation.apply(*arguments)
        if operation in plan.carrying and not plan.is_claimed(operation.arguments[0]):
            use = plan.use(operation)
            carried = carry(use, shadows_of(use), arguments, rows)
            shadows.update(zip(operation.outputs, carried, strict=True))
        values.update(zip(operation.outputs, outputs, strict=True))
    return [
        entry_of(value, roles, plan.scope.layouts[value])
        for value, roles in zip(program.outputs, plan.wanted, strict=True)
    ]
