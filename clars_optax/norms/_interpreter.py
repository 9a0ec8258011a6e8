"""Runs a loss with a tap on every parameter.

First a plan. Going forward, every value that comes from parameters and does not carry the whole
batch gets a shadow (see `_taps`), and an operation in which such a value meets the batch is the
frontier. Going backward from the loss, only what a gradient needs is kept; what is needed and
cannot be done is an error. Then the program is run, operation by operation, as
`jax.core.eval_jaxpr` would.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from clars_optax.norms._layout import Layout
from clars_optax.norms._obstacles import AFTER_THE_MEAN, find_obstacle, is_additive
from clars_optax.norms._program import Operation, Program, Value
from clars_optax.norms._rules import Rule, find_rule
from clars_optax.norms._taps import Rows, Use, carry, claimed, fan_out, meet, spread

# Between a parameter and its use, these change neither the norm of a gradient nor what a rule sees.
_VIEWS = frozenset(
    "convert_element_type copy copy_p name neg reshape rev squeeze transpose".split()
)


@dataclass(frozen=True)
class Claim:
    """A use of a parameter for which there is a rule.

    Attributes:
      param: the parameter.
      views: what lies between the parameter and its use, beginning with the parameter.
      rule: finds the squared norms.
    """

    param: Value
    views: tuple[Value, ...]
    rule: Rule


class Plan:
    """What to do with each operation.

    Args:
      program: the loss; its first output is the loss itself, the others are auxiliary.
      layouts: how the batch lies in each value.
      pairs: the values that the loss at twice the batch size has at the same place.
      params: the values of the parameters, with their paths for error messages.
      num_examples: the batch size N.
      with_rules: whether rules may claim parameters.

    Raises:
      NotImplementedError: the engine cannot follow a parameter through an operation.
      ValueError: the per-example gradient of a parameter has no meaning.
    """

    def __init__(
        self,
        program: Program,
        layouts: Mapping[Value, Layout],
        pairs: Mapping[Value, Value],
        params: Mapping[Value, str],
        num_examples: int,
        *,
        with_rules: bool,
    ):
        self.program = program
        self.layouts = layouts
        self.num_examples = num_examples
        self._pairs = pairs
        self._roots: dict[Value, frozenset[str]] = {v: frozenset([p]) for v, p in params.items()}
        self._obstacles: dict[Operation, Exception] = {}
        self.meeting: set[Operation] = set()
        for operation in program.operations:
            self._classify(operation)
        self.carrying: set[Operation] = set()
        self.adding: set[Operation] = set()
        self._demand()
        self.claims: dict[Operation, Claim] = {}
        self._claimed: set[Value] = set()
        if with_rules:
            self._claim(params)

    @property
    def is_split(self) -> bool:
        """Whether the batch is split over several axes anywhere that a parameter meets it."""
        return any(
            self.layouts[value].carries_batch
            and not self.layouts[value].is_whole(self.num_examples)
            for operation in (self.meeting | self.carrying) - self.claims.keys()
            for value in (*operation.operands, *operation.outputs)
        )

    @property
    def has_term_of_parameters(self) -> bool:
        """Whether a term of parameters alone is added to the loss."""
        return self.has_shadow(self.program.outputs[0])

    def has_shadow(self, value: Value) -> bool:
        """Whether a value comes from parameters, and not by way of the whole batch."""
        return value in self._roots

    def is_claimed(self, value: Value) -> bool:
        """Whether a value is a parameter that a rule has claimed, or a view of it."""
        return value in self._claimed

    def use(self, operation: Operation) -> Use:
        """The operation as `carry` and `meet` take it."""
        arguments = operation.arguments
        return Use(
            operation,
            tuple(self.layouts[value] for value in arguments),
            tuple(self.layouts[value] for value in operation.outputs),
            tuple(i for i, value in enumerate(arguments) if self.has_shadow(value)),
            tuple(
                i
                for i, value in enumerate(arguments)
                if value.from_params and not self.has_shadow(value)
            ),
        )

    def _carries_all(self, value: Value) -> bool:
        return self.layouts[value].problem is not None or (
            self.layouts[value].carries_batch and self.layouts[value].is_complete(self.num_examples)
        )

    def _classify(self, operation: Operation) -> None:
        roots = [self._roots[v] for v in operation.arguments if v in self._roots]
        outputs = [value for value in operation.outputs if value.from_params]
        if not roots or not outputs:
            return
        paths = frozenset().union(*roots)
        obstacle = find_obstacle(operation, self.layouts, self._pairs)
        if obstacle is not None:
            self._obstacles[operation] = obstacle.error(operation, paths)
        if any(self._carries_all(value) for value in operation.outputs):
            self.meeting.add(operation)
        else:
            self._roots.update(dict.fromkeys(outputs, paths))

    def _demand(self) -> None:
        """Walks back from the loss, along gradients."""
        loss = self.program.outputs[0]
        pending = [(loss, "sum" if self.has_shadow(loss) else "value")]
        seen: set[tuple[Value, str]] = set()
        while pending:
            value, role = pending.pop()
            operation = value.producer
            if role == "sum" and not value.from_batch:
                # A term of parameters alone.
                role = "shadow"
            if role == "sum" and operation is not None and not is_additive(operation):
                error = AFTER_THE_MEAN.error(operation, self._roots[value])
                self._obstacles.setdefault(operation, error)
                role = "shadow"
            if (value, role) in seen or not value.from_params or operation is None:
                continue
            seen.add((value, role))
            if role == "sum":
                self.adding.add(operation)
            if role == "shadow":
                self.carrying.add(operation)
            of_shadows = "sum" if role == "sum" else "shadow"
            pending.extend(
                (argument, of_shadows if self.has_shadow(argument) else "value")
                for argument in operation.arguments
            )
        demanded = {value.producer for value, role in seen if role != "sum"}
        self.meeting &= demanded
        for operation in self.program.operations:
            if operation in demanded and operation in self._obstacles:
                raise self._obstacles[operation]

    def _claim(self, params: Iterable[Value]) -> None:
        """Finds the parameters that have one use only, through views, for which there is a rule."""
        consumers: dict[Value, list[tuple[Operation, int]]] = {}
        for operation in self.program.operations:
            if operation in self.meeting | self.carrying | self.adding:
                for position, value in enumerate(operation.operands):
                    consumers.setdefault(value, []).append((operation, position))
        for param in params:
            views = [param]
            while len(consumers.get(views[-1], ())) == 1:
                ((operation, position),) = consumers[views[-1]]
                if operation in self.meeting:
                    rule = self._rule(operation, position)
                    if rule is not None:
                        self.claims[operation] = Claim(param, tuple(views), rule)
                        self._claimed.update(views)
                    break
                if operation in self.adding or not _is_view(operation):
                    break
                views.append(operation.outputs[0])

    def _rule(self, operation: Operation, position: int) -> Rule | None:
        values = [*operation.operands, *operation.outputs]
        shadowed = [value for value in operation.operands if self.has_shadow(value)]
        others = [value for value in operation.operands if self.layouts[value].carries_batch]
        if len(shadowed) > 1 or len(others) != 1 or not self._carries_all(others[0]):
            return None
        shapes = [value.shape for value in values]
        return find_rule(operation.name, operation.params, shapes, position)


def _is_view(operation: Operation) -> bool:
    if operation.name == "broadcast_in_dim":
        return math.prod(operation.operands[0].shape) == math.prod(operation.outputs[0].shape)
    return operation.name in _VIEWS


def run(
    plan: Plan, params: Sequence[Any], taps: Sequence[Any], batch: Sequence[Any], rows: Rows
) -> list[Any]:
    """Runs the program; the gradient with respect to the taps is the squared norms.

    Returns:
      The program's outputs: the loss, and auxiliary values through which no gradient flows.
    """
    program = plan.program
    # Gradients reach a parameter through a rule's claim, or else through its shadow alone.
    values: dict[Value, Any] = dict(zip(program.inputs, [*params, *batch], strict=True))
    shadows: dict[Value, Any] = {}
    taps_of = dict(zip(program.inputs, taps, strict=False))
    for value, x, tap in zip(program.inputs, params, taps, strict=False):
        if not plan.is_claimed(value):
            values[value] = jax.lax.stop_gradient(x)
            shadows[value] = fan_out(x, tap, rows)

    def read(value: Value) -> Any:
        return values.get(value, value.constant)

    def shadows_of(use: Use) -> list[Any]:
        return [shadows[use.operation.arguments[i]] for i in use.shadowed]

    def added(value: Value) -> Any:
        if value in shadows and value.producer not in plan.adding:
            return spread(read(value), shadows[value], rows)
        return read(value)

    for operation in program.operations:
        arguments = [read(value) for value in operation.arguments]
        if operation in plan.adding:
            outputs = operation.apply(*map(added, operation.arguments))
        elif operation in plan.claims:
            claim = plan.claims[operation]
            use = plan.use(operation)
            outputs = claimed(use, claim.rule, taps_of[claim.param], arguments, rows)
        elif operation in plan.meeting:
            use = plan.use(operation)
            outputs = meet(use, shadows_of(use), arguments, rows)
        else:
            outputs = operation.apply(*arguments)
        if operation in plan.carrying and not plan.is_claimed(operation.arguments[0]):
            use = plan.use(operation)
            carried = carry(use, shadows_of(use), arguments, rows)
            shadows.update(zip(operation.outputs, carried, strict=True))
        values.update(zip(operation.outputs, outputs, strict=True))
    loss, *aux = program.outputs
    return [added(loss), *(jax.lax.stop_gradient(read(value)) for value in aux)]
