"""A loss function as a flat list of operations, and its twin at twice the batch size.

A jaxpr nests: `jit` inside `jit`, functions with a derivative of their own. The engine wants one
list, in which every array has an identity of its own (a jaxpr that is called twice must not share
its variables), and knows of each array whether a gradient flows to it from the parameters, and
whether it depends on the batch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, DropVar, Jaxpr, JaxprEqn, Literal

# The name of the parameter that holds the body, by the name of the primitive.
_INLINED = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr"}

# What an operation does, whatever the sizes of its operands are.
_SIZELESS_PARAMS = frozenset(
    """
    axes axis batch_group_count broadcast_dimensions dimension dimension_numbers dimensions
    feature_group_count permutation
    """.split()
)


class Value:
    """One array: an input, a constant, or a result of an operation."""

    __slots__ = ("aval", "constant", "from_batch", "from_params", "producer")

    def __init__(self, aval: Any, *, constant: Any = None, producer: "Operation | None" = None):
        self.aval = aval
        self.constant = constant
        self.producer = producer
        self.from_params = False
        """A gradient can flow from here to a parameter."""
        self.from_batch = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return self.aval.shape

    @property
    def is_differentiable(self) -> bool:
        """Whether the dtype has a gradient."""
        return jnp.issubdtype(self.aval.dtype, jnp.inexact)


class Operation:
    """One equation of a jaxpr, on values.

    `operands` follow the equation's positions; `arguments` are the same values once each, without
    literals: what `apply` takes.
    """

    __slots__ = ("arguments", "equation", "jaxpr", "operands", "outputs", "positions")

    def __init__(self, jaxpr: Jaxpr, equation: JaxprEqn, operands: Sequence[Value]):
        variables: dict[Any, Value] = {
            variable: value
            for variable, value in zip(equation.invars, operands, strict=True)
            if not isinstance(variable, Literal)
        }
        kept = {i: x for i, x in enumerate(equation.outvars) if not isinstance(x, DropVar)}
        # Only one equation is run, in the frame of the jaxpr that it came from.
        self.jaxpr = jaxpr.replace(
            constvars=[], invars=list(variables), outvars=list(kept.values()), eqns=[equation]
        )
        self.equation = equation
        self.operands = tuple(operands)
        self.arguments = tuple(variables.values())
        self.positions = tuple(kept)
        """Which of the equation's results are used: `outputs` has those alone."""
        self.outputs = tuple(Value(variable.aval, producer=self) for variable in kept.values())
        for output in self.outputs:
            output.from_batch = any(value.from_batch for value in operands)
            output.from_params = (
                any(value.from_params for value in operands)
                and output.is_differentiable
                and self.name != "stop_gradient"
            )

    @property
    def name(self) -> str:
        """The name of the primitive."""
        return self.equation.primitive.name

    @property
    def params(self) -> dict[str, Any]:
        """The primitive's parameters."""
        return self.equation.params

    @property
    def where(self) -> str:
        """The primitive and the user's line that it came from, for error messages."""
        return f"`{self.name}` ({source_info_util.summarize(self.equation.source_info)})"

    def apply(self, *arguments: Any, **changed_params: Any) -> list[Any]:
        """Runs the equation; a changed parameter replaces the equation's own."""
        jaxpr = self.jaxpr
        if changed_params:
            equation = self.equation.replace(params={**self.params, **changed_params})
            jaxpr = jaxpr.replace(eqns=[equation])
        return jax.core.eval_jaxpr(jaxpr, (), *arguments)


class Program:
    """Operations in order, with the values that enter and leave them."""

    def __init__(self, jaxpr: ClosedJaxpr, *, num_params: int):
        """Flattens a jaxpr whose first `num_params` inputs are parameters, the others the batch."""
        self.operations: list[Operation] = []
        self.inputs = [Value(variable.aval) for variable in jaxpr.jaxpr.invars]
        for index, value in enumerate(self.inputs):
            value.from_params = index < num_params
            value.from_batch = index >= num_params
        self.outputs = self._inline(jaxpr, self.inputs)

    def _inline(self, closed: ClosedJaxpr, inputs: Sequence[Value]) -> list[Value]:
        jaxpr = closed.jaxpr
        values: dict[Any, Value] = dict(zip(jaxpr.invars, inputs, strict=True))
        for variable, constant in zip(jaxpr.constvars, closed.consts, strict=True):
            values[variable] = Value(variable.aval, constant=constant)

        def read(atom: Any) -> Value:
            if isinstance(atom, Literal):
                return Value(atom.aval, constant=atom.val)
            return values[atom]

        for equation in jaxpr.eqns:
            operands = [read(atom) for atom in equation.invars]
            if equation.primitive.name in _INLINED:
                body = equation.params[_INLINED[equation.primitive.name]]
                outputs: Sequence[Value] = self._inline(_closed(body), operands)
                named = zip(equation.outvars, outputs, strict=True)
                values.update(named)
                continue
            operation = Operation(jaxpr, equation, operands)
            if _mixes_in_custom_jvp(operation):
                traced = jax.make_jaxpr(_spelled_out(operation))(
                    *(argument.aval for argument in operation.arguments)
                )
                outputs = self._inline(traced, operation.arguments)
            else:
                self.operations.append(operation)
                outputs = operation.outputs
            kept = [equation.outvars[position] for position in operation.positions]
            values.update(zip(kept, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]


def body_of(operation: Operation) -> ClosedJaxpr | None:
    """The jaxpr of a function with a derivative of its own, which the operation calls once."""
    if operation.name.startswith(("custom_jvp_call", "custom_vjp_call")):
        body = operation.params.get("call_jaxpr")
        return None if body is None else _closed(body)
    return None


def _closed(jaxpr: ClosedJaxpr | Jaxpr) -> ClosedJaxpr:
    return jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, ())


def _mixes_in_custom_jvp(operation: Operation) -> bool:
    reached = [v for v in operation.arguments if v.from_params or v.from_batch]
    return (
        operation.name.startswith("custom_jvp_call")
        and len(reached) > 1
        and any(value.from_params for value in reached)
        and any(value.from_batch for value in reached)
    )


@jax.custom_vjp
def _value_and_derivative_of(value: Any, derivative: Any) -> Any:
    """The first argument; the second takes the cotangent."""
    del derivative
    return value


_value_and_derivative_of.defvjp(
    lambda value, derivative: (value, None), lambda _, cotangent: (None, cotangent)
)


def _spelled_out(operation: Operation) -> Callable[..., list[Any]]:
    """A `custom_jvp` function as plain operations with the derivative that its rule states.

    The rule is run on tangents `x - stop_gradient(x)`, which are zero and whose derivative is one:
    the outputs depend on `x` through the rule's own linear map, and a parameter can be followed
    through it.
    """

    def run(*arguments: Any) -> list[Any]:
        stopped = [jax.lax.stop_gradient(x) for x in arguments]
        moved = [i for i, value in enumerate(operation.arguments) if value.is_differentiable]

        def of_moved(*changed: Any) -> list[Any]:
            everything = list(stopped)
            for index, x in zip(moved, changed, strict=True):
                everything[index] = x
            return operation.apply(*everything)

        primals, tangents = jax.jvp(
            of_moved,
            [stopped[i] for i in moved],
            [arguments[i] - stopped[i] for i in moved],
        )
        return [
            _value_and_derivative_of(jax.lax.stop_gradient(primal), tangent)
            if jnp.issubdtype(primal.dtype, jnp.inexact)
            else primal
            for primal, tangent in zip(primals, tangents, strict=True)
        ]

    return run


def match(program: Program, doubled: Program) -> dict[Value, Value]:
    """Pairs the values of a program with those of the same loss at twice the batch size.

    It walks backwards from the outputs: where two operations agree, so do their operands. A part
    that differs with the batch size (`random.permutation` sorts in more rounds) ends the walk
    there. What that part makes of the batch is still known by its place in the operation that takes
    it; a value that comes from parameters has no pair then.
    """
    pairs = dict(zip(program.inputs, doubled.inputs, strict=True))
    pending = list(zip(program.outputs, doubled.outputs, strict=True))
    torn: set[Value] = set()
    while pending:
        one, two = pending.pop()
        if one in torn or pairs.get(one) is two:
            continue
        first, second = one.producer, two.producer
        agree = first is not None and second is not None and _agree(first, second)
        if one.from_params and (one in pairs or not agree):
            torn.add(one)
            pairs.pop(one, None)
            continue
        if one in pairs:
            continue
        pairs[one] = two
        if first is not None and second is not None and agree:
            pairs.update(zip(first.outputs, second.outputs, strict=True))
            pending.extend(zip(first.operands, second.operands, strict=True))
    return pairs


def _agree(first: Operation, second: Operation) -> bool:
    """Whether two operations are the same but for sizes."""
    return (
        first.name == second.name
        and first.positions == second.positions
        and [_kind(value) for value in first.operands] == [_kind(v) for v in second.operands]
        and all(
            first.params[name] == second.params[name]
            for name in first.params.keys() & _SIZELESS_PARAMS
        )
    )


def _kind(value: Value) -> tuple[Any, ...]:
    return value.aval.dtype, len(value.shape), value.from_params, value.from_batch
