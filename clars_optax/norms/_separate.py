"""Functions with derivatives of their own are read only to see whether they mix examples.

Such a function is differentiated as it says, once for each group of examples. That is right if
every example's results, and the cotangents of what belongs to one example, come from that example
alone, and if the cotangents of what all share are sums over the examples.
"""

from collections.abc import Mapping, Sequence, Set
from typing import Any

import jax

from clars_optax.norms._batch_axes import follow
from clars_optax.norms._layout import Layout
from clars_optax.norms._obstacles import LINEAR, is_local
from clars_optax.norms._program import Operation, Program, Value

# Linear in what is summed over, so that the examples' shares stay addends.
_SUMS = frozenset(["dot_general", "reduce_sum", "scatter-add"])


def keeps_examples_apart(
    operation: Operation,
    twin: Operation,
    layouts: Mapping[Value, Layout],
    num_examples: int,
) -> bool:
    """Whether neither a function nor its backward mixes examples.

    Args:
      operation: a `custom_vjp_call`.
      twin: the same at twice the batch size.
      layouts: how the batch lies in each value, those of the body included.
      num_examples: the batch size.
    """
    if not _is_separate(operation.bodies[0], layouts):
        return False
    entering = [
        layouts[value]
        for value in (*operation.arguments, *operation.outputs)
        if value in operation.arguments or value.is_differentiable
    ]
    try:
        program, doubled = (_backward(each, entering) for each in (operation, twin))
    except Exception:  # What the function's backward may raise is not known.
        return False
    known = dict(zip(program.inputs, entering, strict=True))
    found, _ = follow(program, doubled, known, num_examples)
    summed = _summed(program, found)
    wanted = [value for value in operation.arguments if value.is_differentiable]
    return summed is not None and not any(
        cotangent in summed
        for value, cotangent in zip(wanted, program.outputs, strict=True)
        if layouts[value].carries_batch
    )


def _backward(operation: Operation, entering: Sequence[Layout]) -> Program:
    """Cotangents of the arguments, from the arguments and the cotangents of the results."""
    arguments = operation.arguments
    moved = [i for i, value in enumerate(arguments) if value.is_differentiable]
    outputs = [i for i, value in enumerate(operation.outputs) if value.is_differentiable]

    def pull(everything: Sequence[Any], cotangents: Sequence[Any]) -> Any:
        def of_moved(*changed: Any) -> list[Any]:
            places = dict(zip(moved, changed, strict=True))
            results = operation.apply(*(places.get(i, x) for i, x in enumerate(everything)))
            return [results[i] for i in outputs]

        return jax.vjp(of_moved, *(everything[i] for i in moved))[1](list(cotangents))

    jaxpr = jax.make_jaxpr(pull)(
        [value.aval for value in arguments], [operation.outputs[i].aval for i in outputs]
    )
    carried = [layout.carries_batch for layout in entering]
    return Program(jaxpr, from_params=[False] * len(carried), from_batch=carried)


def _is_separate(program: Program, layouts: Mapping[Value, Layout]) -> bool:
    """Whether a program computes every example's results from that example alone."""
    return all(_is_local(operation, layouts) for operation in program.operations)


def _is_local(operation: Operation, layouts: Mapping[Value, Layout]) -> bool:
    values = [*operation.operands, *operation.outputs]
    if any(value not in layouts for value in values):
        return False
    every = [layouts[value] for value in values]
    if not any(layout.carries_batch for layout in every):
        return True
    if any(layout.problem is not None or layout.is_crossed for layout in every):
        return False
    if operation.bodies:
        return all(_is_separate(body, layouts) for body in operation.bodies)
    return is_local(operation, layouts)


def _summed(program: Program, layouts: Mapping[Value, Layout]) -> Set[Value] | None:
    """The values that are sums over the examples; None if examples are mixed otherwise."""
    summed: set[Value] = set()
    needed = set(program.outputs)
    for operation in reversed(program.operations):
        if not needed.isdisjoint(operation.outputs):
            needed.update(operation.operands)
    for operation in program.operations:
        if needed.isdisjoint(operation.outputs):
            continue
        addends = [value for value in operation.operands if value in summed]
        if addends:
            others = [value for value in operation.operands if value not in summed]
            if any(value.from_batch for value in others) or not (
                operation.name in LINEAR
                or (operation.name in ("dot_general", "mul") and len(addends) == 1)
                or (operation.name == "div" and operation.operands[1] not in summed)
            ):
                return None
            summed.update(operation.outputs)
        elif not _is_local(operation, layouts):
            if operation.name not in _SUMS or any(
                layouts[value].carries_batch for value in operation.outputs
            ):
                return None
            summed.update(operation.outputs)
    return summed
