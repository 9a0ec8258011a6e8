"""Functions with derivatives of their own are read only to see whether they mix examples.

Such a function is differentiated as it says, once for each group of examples. That is right if
every example's results, and the cotangents of what belongs to one example, come from that example
alone, and if the cotangents of what all share are sums over the examples.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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
    carried = [layout.carries_batch for layout in entering]
    try:
        program, doubled = (_backward(each, carried) for each in (operation, twin))
    except Exception:  # What the function's backward may raise is not known.
        return False
    known = dict(zip(program.inputs, entering, strict=True))
    found, _ = follow(program, doubled, known, num_examples)
    summed = _summed(program, found)
    if summed is None:
        return False
    for value, cotangent in zip(
        (value for value in operation.arguments if value.is_differentiable),
        program.outputs,
        strict=True,
    ):
        is_sum = cotangent in summed
        if layouts[value].carries_batch and is_sum:
            return False
        # Anything else would be added for every share.
        is_shared = value.from_params and not layouts[value].carries_batch
        if is_shared and not is_sum and not _is_zero(cotangent):
            return False
    return True


def is_linear(operation: Operation) -> bool:
    """Whether a function's backward is linear in the cotangents, as derivatives are.

    What clips or normalises gradients is not: applied to the gradients of examples, it would give
    another sum.
    """
    if operation.name != "custom_vjp_call":
        return all(is_linear(inner) for body in operation.bodies for inner in body.operations)
    num_arguments = len(operation.arguments)
    num_cotangents = sum(value.is_differentiable for value in operation.outputs)
    try:
        program = _backward(operation, [False] * (num_arguments + num_cotangents))
    except Exception:  # What the function's backward may raise is not known.
        return False
    summed = _summed(program, {}, program.inputs[num_arguments:])
    return summed is not None and all(x in summed or _is_zero(x) for x in program.outputs)


def has_same_numbers(operation: Operation, twin: Operation) -> bool:
    """Whether a function and its backward hold the same numbers as at another batch size.

    One that divides by the batch size would divide by the size of a group when it is traced for
    one.
    """
    num_inputs = len(operation.arguments) + sum(v.is_differentiable for v in operation.outputs)
    try:
        backwards = [_backward(each, [False] * num_inputs) for each in (operation, twin)]
    except Exception:  # What the function's backward may raise is not known.
        return False
    one, two = (
        sum(map(_numbers, (*each.bodies, backward)), Counter())
        for each, backward in zip((operation, twin), backwards, strict=True)
    )
    # Zeros and ones come and go with axes of length 1.
    return one <= two and {*(two - one)} <= {0.0, 1.0}


def _numbers(program: Program) -> Counter[Any]:
    """The constants of a program: what can be compared of them."""
    found: Counter[Any] = Counter()
    for operation in program.operations:
        for value in operation.operands:
            if value.constant is not None:
                found[_number(value.constant)] += 1
        for body in operation.bodies:
            found.update(_numbers(body))
    return found


def _number(constant: Any) -> Any:
    dtype = getattr(constant, "dtype", None)
    if isinstance(constant, jax.core.Tracer) or jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        return id(constant)
    if np.ndim(constant) == 0:
        number = float(np.real(constant))
        # NaN, which `jnp.var` holds, is not equal to itself.
        return "nan" if math.isnan(number) else number
    return np.shape(constant), np.asarray(constant).tobytes()


def _backward(operation: Operation, carried: Sequence[bool]) -> Program:
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
    return Program(jaxpr, from_params=[False] * len(carried), from_batch=carried)


def _is_separate(program: Program, layouts: Mapping[Value, Layout]) -> bool:
    """Whether a program computes every example's results from that example alone."""
    return all(_is_local(operation, layouts) for operation in _needed(program))


def _needed(program: Program) -> list[Operation]:
    """The operations that a program's results come from."""
    found: list[Operation] = []
    needed = set(program.outputs)
    for operation in reversed(program.operations):
        if not needed.isdisjoint(operation.outputs):
            needed.update(operation.operands)
            found.append(operation)
    return found[::-1]


def _is_local(operation: Operation, layouts: Mapping[Value, Layout]) -> bool:
    values = [*operation.operands, *operation.outputs]
    if any(value not in layouts for value in values):
        return not any(value.from_batch for value in values)
    every = [layouts[value] for value in values]
    if not any(layout.carries_batch for layout in every):
        return True
    if any(layout.problem is not None or layout.is_crossed for layout in every):
        return False
    if operation.bodies:
        return all(_is_separate(body, layouts) for body in operation.bodies)
    return is_local(operation, layouts)


def _summed(
    program: Program, layouts: Mapping[Value, Layout], addends: Sequence[Value] = ()
) -> Set[Value] | None:
    """The values that are sums over the examples; None if examples are mixed otherwise.

    Inputs that are such sums already may be named: what is made of them must be linear.
    """
    summed: set[Value] = set(addends)
    for operation in _needed(program):
        found = [value for value in operation.operands if value in summed]
        if found:
            others = [value for value in operation.operands if value not in summed]
            if any(value.from_batch for value in others) or not (
                # Something else that is added would be added for every share.
                (
                    operation.name in LINEAR
                    and all(map(_is_zero, others))
                    and all(map(_is_fine, operation.outputs))
                )
                or (operation.name in ("dot_general", "mul") and len(found) == 1)
                or (operation.name == "div" and operation.operands[1] not in summed)
                or (operation.name == "select_n" and _selects(operation, summed))
            ):
                return None
            summed.update(operation.outputs)
        elif not _is_local(operation, layouts):
            if (
                operation.name not in _SUMS
                or any(layouts[value].carries_batch for value in operation.outputs)
                or (operation.name == "scatter-add" and not _is_zero(operation.operands[0]))
                or not all(map(_is_fine, operation.outputs))
            ):
                return None
            summed.update(operation.outputs)
    return summed


def _selects(operation: Operation, summed: Set[Value]) -> bool:
    """Whether a choice is between sums and zeros, whatever the sums are."""
    choice, *cases = operation.operands
    return choice not in summed and all(case in summed or _is_zero(case) for case in cases)


def _is_fine(value: Value) -> bool:
    """Whether rounding to its type is no more than the usual loss of precision."""
    return value.is_differentiable and jnp.finfo(value.aval.dtype).bits >= 16


def _is_zero(value: Value) -> bool:
    producer = value.producer
    if producer is not None and producer.name in ("broadcast_in_dim", "convert_element_type"):
        return _is_zero(producer.operands[0])
    return value.constant is not None and _number(value.constant) == 0.0
