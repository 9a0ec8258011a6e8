"""A loss function as a flat list of operations.

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
_CHECKPOINT = {"checkpoint": "jaxpr", "remat": "jaxpr", "remat2": "jaxpr"}
_BODIES = {
    **_CHECKPOINT,
    "cond": "branches",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "scan": "jaxpr",
}


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

    __slots__ = ("arguments", "bodies", "equation", "jaxpr", "operands", "outputs", "positions")

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
        self.bodies = _bodies(equation, operands)
        """The programs inside: of each branch, or of the one body."""
        for output, position in zip(self.outputs, self.positions, strict=True):
            sources: Sequence[Value] = operands
            if self.bodies and not self.has_own_derivative:
                sources = [body.outputs[position] for body in self.bodies]
            output.from_batch = any(value.from_batch for value in sources)
            output.from_params = (
                any(value.from_params for value in sources)
                and output.is_differentiable
                and self.name != "stop_gradient"
            )
            if self.name == "cond":
                output.from_batch |= operands[0].from_batch

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
        line = source_info_util.summarize(self.equation.source_info)
        return f"`{self.name}` ({line})" if line else f"`{self.name}`"

    @property
    def writes_params(self) -> bool:
        """Whether something with a gradient may be written to a mutable array, here or inside."""
        if self.bodies:
            return any(one.writes_params for body in self.bodies for one in body.operations)
        atoms = (*self.equation.invars, *self.equation.outvars)
        # The types of mutable arrays, unlike others, hold that of an array.
        return any(hasattr(atom.aval, "inner_aval") for atom in atoms) and any(
            value.from_params for value in self.operands
        )

    @property
    def kind(self) -> str:
        """The name of the primitive, the same in all versions of JAX."""
        return "checkpoint" if self.name in _CHECKPOINT else self.name

    @property
    def has_own_derivative(self) -> bool:
        """Whether the derivative is not that of the body."""
        return self.name in ("custom_jvp_call", "custom_vjp_call")

    @property
    def entering(self) -> tuple[Value, ...]:
        """The operands that enter the bodies, one for each of their inputs."""
        return self.operands[1:] if self.name == "cond" else self.operands

    @property
    def carried(self) -> range:
        """The operands that one step of a scan takes from the step before; else none."""
        return _carried(self.equation)

    def apply(self, *arguments: Any, **changed_params: Any) -> list[Any]:
        """Runs the equation; a changed parameter replaces the equation's own."""
        jaxpr = self.jaxpr
        if changed_params:
            equation = self.equation.replace(params={**self.params, **changed_params})
            jaxpr = jaxpr.replace(eqns=[equation])
        return jax.core.eval_jaxpr(jaxpr, (), *arguments)


class Program:
    """Operations in order, with the values that enter and leave them."""

    def __init__(
        self, jaxpr: ClosedJaxpr, *, from_params: Sequence[bool], from_batch: Sequence[bool]
    ):
        """Flattens a jaxpr, given of each input what it depends on."""
        self.operations: list[Operation] = []
        self.inputs = [Value(variable.aval) for variable in jaxpr.jaxpr.invars]
        for value, params, batch in zip(self.inputs, from_params, from_batch, strict=True):
            value.from_params = params
            value.from_batch = batch
        self.outputs = self._inline(jaxpr, self.inputs)

    @classmethod
    def of_loss(cls, jaxpr: ClosedJaxpr, num_params: int) -> "Program":
        """A program whose first inputs are the parameters, and the others the batch."""
        is_param = [index < num_params for index in range(len(jaxpr.jaxpr.invars))]
        return cls(jaxpr, from_params=is_param, from_batch=[not x for x in is_param])

    def _inline(self, function: ClosedJaxpr, inputs: Sequence[Value]) -> list[Value]:
        jaxpr = function.jaxpr
        values: dict[Any, Value] = dict(zip(jaxpr.invars, inputs, strict=True))
        for variable, constant in zip(jaxpr.constvars, function.consts, strict=True):
            values[variable] = Value(variable.aval, constant=constant)

        def read(atom: Any) -> Value:
            if isinstance(atom, Literal):
                return Value(atom.aval, constant=atom.val)
            return values[atom]

        for equation in jaxpr.eqns:
            operands = [read(atom) for atom in equation.invars]
            if equation.primitive.name in _INLINED:
                body = equation.params[_INLINED[equation.primitive.name]]
                outputs: Sequence[Value] = self._inline(closed(body), operands)
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


def _bodies(equation: JaxprEqn, operands: Sequence[Value]) -> tuple[Program, ...]:
    """The programs inside of an equation that calls others."""
    name = equation.primitive.name
    if name == "optimization_barrier":
        # Each operand for itself: a body that does nothing.
        jaxprs: Any = jax.make_jaxpr(lambda *xs: xs)(*(atom.aval for atom in equation.invars))
    else:
        jaxprs = equation.params.get(_BODIES.get(name, ""))
    if jaxprs is None:
        return ()
    entering = operands[1:] if name == "cond" else operands
    carried = _carried(equation)
    from_params = [value.from_params for value in entering]
    from_batch = [value.from_batch for value in entering]
    while True:
        programs = tuple(
            Program(closed(jaxpr), from_params=from_params, from_batch=from_batch)
            for jaxpr in (jaxprs if isinstance(jaxprs, tuple) else (jaxprs,))
        )
        before = [*from_params, *from_batch]
        # What one step of a scan carries to the next.
        for index, value in zip(carried, programs[0].outputs, strict=False):
            from_params[index] |= value.from_params
            from_batch[index] |= value.from_batch
        if [*from_params, *from_batch] == before:
            return programs


def _carried(equation: JaxprEqn) -> range:
    """The operands that one step of a scan takes from the step before; none if it is no scan.

    Those before them are the same for all steps, those after them have a slice for each. Ranks tell
    which are which; the parameters that do so have other names in other versions of JAX.
    """
    if equation.primitive.name != "scan":
        return range(0)
    body = closed(equation.params["jaxpr"]).jaxpr

    def num_sliced(outside: Sequence[Any], inside: Sequence[Any]) -> int:
        return sum(
            len(a.aval.shape) > len(b.aval.shape) for a, b in zip(outside, inside, strict=True)
        )

    num_carried = len(equation.outvars) - num_sliced(equation.outvars, body.outvars)
    stop = len(equation.invars) - num_sliced(equation.invars, body.invars)
    return range(stop - num_carried, stop)


def closed(jaxpr: ClosedJaxpr | Jaxpr) -> ClosedJaxpr:
    """The body of an equation: some are held with their constants, some have none."""
    return jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, ())


def _mixes_in_custom_jvp(operation: Operation) -> bool:
    reached = [v for v in operation.arguments if v.from_params or v.from_batch]
    return (
        operation.name == "custom_jvp_call"
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
