"""Runs a loss with a tap on every parameter.

First a plan. Going forward, every value that comes from parameters and does not carry the whole
batch gets a shadow (see `_taps`), and an operation in which such a value meets the batch is the
frontier. Going backward from the loss, only what a gradient needs is kept; what is needed and
cannot be done is an error. Then the program is run, operation by operation, as
`jax.core.eval_jaxpr` would. A nested program (see `_nested`) has a plan of its own.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import jax

from clars_optax.norms._layout import Layout
from clars_optax.norms._nested import Entry, Nested, can_nest
from clars_optax.norms._obstacles import AFTER_THE_MEAN, find_obstacle, is_additive
from clars_optax.norms._program import Operation, Program, Value
from clars_optax.norms._taps import Rows, Use, carry, fan_out, meet, spread


@dataclass(frozen=True)
class Scope:
    """What is known of all values of a loss, those inside of nested programs included.

    Args:
      layouts: how the batch lies in each value.
      pairs: the values that the loss at twice the batch size has at the same place.
      num_examples: the batch size N.
      twins: what stands in the place of some operations in the loss of a group (see
        `Plan.untraced`).
    """

    layouts: Mapping[Value, Layout]
    pairs: Mapping[Value, Value]
    num_examples: int
    twins: dict[Operation, Operation] = field(default_factory=dict)

    def carries_all(self, value: Value) -> bool:
        """Whether a value has a place for every example."""
        layout = self.layouts[value]
        return layout.problem is not None or (
            layout.carries_batch and layout.is_complete(self.num_examples)
        )


class Plan:
    """What to do with each operation of a program.

    Roles say how a gradient flows through a value: "value", as ever; "shadow", through the shadow;
    "sum", through the value, to which terms of parameters alone have been added.

    Args:
      program: the loss, or a program inside of it.
      scope: what is known of its values.
      roots: the inputs that have shadows, with the paths of the parameters that they come from.
    """

    def __init__(self, program: Program, scope: Scope, roots: Mapping[Value, frozenset[str]]):
        self.program = program
        self.scope = scope
        self.roots = dict(roots)
        self._obstacles: dict[Operation, Exception] = {}
        self._mixed: set[Operation] = set()
        self._inner: dict[Operation, Nested] = {}
        for operation in program.operations:
            self._classify(operation)

    @classmethod
    def of_loss(cls, program: Program, scope: Scope, params: Mapping[Value, str]) -> "Plan":
        """The plan of a loss: the program's first output; the others are auxiliary.

        Raises:
          NotImplementedError: the engine cannot follow a parameter through an operation.
          ValueError: the per-example gradient of a parameter has no meaning.
        """
        plan = cls(program, scope, {value: frozenset([path]) for value, path in params.items()})
        plan.demand([{"sum"}, *[set() for _ in program.outputs[1:]]])
        plan.hand_in(params.keys())
        return plan

    @property
    def is_split(self) -> bool:
        """Whether the batch is split over several axes anywhere that a parameter meets it."""
        values = {
            value
            for operation in self.meeting | self.carrying
            for value in (*operation.operands, *operation.outputs)
        }
        values.update(value for value in self.program.inputs if value in self.roots)
        values.update(
            value
            for value, roles in zip(self.program.outputs, self.wanted, strict=True)
            if "shadow" in roles
        )
        return any(nested.is_split for nested in self.nested.values()) or any(
            self.scope.layouts[value].carries_batch
            and not self.scope.layouts[value].is_whole(self.scope.num_examples)
            for value in values
        )

    @property
    def untraced(self) -> dict[Operation, frozenset[str]]:
        """Operations that must be traced at the size of a group, with the parameters in them."""
        found = {
            operation: frozenset().union(*(self.roots.get(v, ()) for v in operation.arguments))
            for operation in self.meeting | self.carrying
            if operation.name == "custom_vjp_call"
            and any(self.scope.layouts[value].carries_batch for value in operation.operands)
        }
        for nested in self.nested.values():
            for plan in nested.plans:
                found.update(plan.untraced)
        return found

    @property
    def has_term_of_parameters(self) -> bool:
        """Whether a term of parameters alone is added to the loss."""
        return self.has_shadow(self.program.outputs[0])

    def has_shadow(self, value: Value) -> bool:
        """Whether a value comes from parameters, and not by way of the whole batch."""
        return value in self.roots

    def use(self, operation: Operation) -> Use:
        """The operation as `carry` and `meet` take it."""
        arguments = operation.arguments
        return Use(
            operation,
            tuple(self.scope.layouts[value] for value in arguments),
            tuple(self.scope.layouts[value] for value in operation.outputs),
            tuple(i for i, value in enumerate(arguments) if self.has_shadow(value)),
            tuple(
                i
                for i, value in enumerate(arguments)
                if value.from_params and not self.has_shadow(value)
            ),
            self.scope.twins.get(operation),
        )

    def _classify(self, operation: Operation) -> None:
        roots = [self.roots[v] for v in operation.arguments if v in self.roots]
        outputs = [value for value in operation.outputs if value.from_params]
        if not roots or not outputs:
            return
        paths = frozenset().union(*roots)
        if can_nest(operation, self.scope.layouts):
            entering = [self.roots.get(value, frozenset()) for value in operation.entering]
            nested = Nested(
                operation,
                entering,
                self.scope.layouts,
                lambda body, roots: Plan(body, self.scope, roots),
            )
            self._inner[operation] = nested
            obstacle = nested.find_obstacle()
            self.roots.update(nested.roots_of_outputs())
        else:
            obstacle = find_obstacle(operation, self.scope.layouts, self.scope.pairs)
            if any(self.scope.carries_all(value) for value in operation.outputs):
                self._mixed.add(operation)
            else:
                self.roots.update(dict.fromkeys(outputs, paths))
        if obstacle is not None:
            self._obstacles[operation] = obstacle.error(operation, paths)

    def demand(self, wanted: Sequence[Set[str]]) -> list[set[str]]:
        """Walks back along gradients, from roles of the outputs to those of the inputs.

        Raises:
          NotImplementedError, ValueError: a gradient is needed that cannot be had.
        """
        self.wanted = [set(roles) for roles in wanted]
        self.roles: dict[Value, set[str]] = {}
        self._uses: dict[Value, int] = {}
        self.adding: set[Operation] = set()
        self.carrying: set[Operation] = set()
        self.meeting: set[Operation] = set()
        self.nested: dict[Operation, Nested] = {}
        for value, roles in zip(self.program.outputs, wanted, strict=True):
            self._want(value, roles)
        first_error: Exception | None = None
        for operation in reversed(self.program.operations):
            try:
                self._demand(operation)
            except (NotImplementedError, ValueError) as error:
                first_error = error
        if first_error is not None:
            raise first_error
        return [self.roles.get(value, set()) for value in self.program.inputs]

    def _want(self, value: Value, roles: Set[str]) -> None:
        if not roles or not value.from_params:
            return
        if not self.has_shadow(value):
            roles = {"value"}
        elif not value.from_batch:
            # A term of parameters alone.
            roles = {"shadow"}
        self.roles.setdefault(value, set()).update(roles)
        self._uses[value] = self._uses.get(value, 0) + 1

    def _demand(self, operation: Operation) -> None:
        roles = [self.roles.get(value, set()) for value in operation.outputs]
        every: set[str] = set().union(*roles)
        if not every:
            return
        obstacle = self._obstacles.get(operation)
        if operation in self._inner:
            if obstacle is not None:
                raise obstacle
            nested = self.nested[operation] = self._inner[operation]
            for value, entering in zip(operation.entering, nested.demand(roles), strict=True):
                self._want(value, entering)
            return
        for value in operation.arguments:
            self._want(value, every - {"value"} or {"shadow"})
        if "sum" in every:
            if not is_additive(operation):
                paths = next(self.roots[v] for v in operation.outputs if v in self.roots)
                raise obstacle or AFTER_THE_MEAN.error(operation, paths)
            self.adding.add(operation)
        if every != {"sum"} and obstacle is not None:
            raise obstacle
        if "shadow" in every:
            self.carrying.add(operation)
        if operation in self._mixed:
            self.meeting.add(operation)

    def hand_in(self, tapped: Set[Value]) -> None:
        """Decides which taps go into nested programs: of inputs with no other use.

        There, a parameter fans out as late as can be: inside of a scan over layers, one layer's
        copies at a time.
        """
        self.tapped = {value for value in tapped if value in self.roles}
        self.handed: set[Value] = set()
        for nested in self.nested.values():
            alone = {value for value in self.tapped if self._uses[value] == 1}
            self.handed |= nested.hand_in(alone)


def run(plan: Plan, entering: Sequence[Entry], rows: Rows) -> list[Entry]:
    """Runs a program; the gradient with respect to the taps is the squared norms.

    Returns:
      The outputs, with shadows where the plan was asked for them. Gradients flow by the roles that
      were demanded, and by those alone.
    """
    program = plan.program
    values: dict[Value, Any] = {}
    shadows: dict[Value, Any] = {}
    for value, entry in zip(program.inputs, entering, strict=True):
        # Gradients reach the parameters through their shadows alone.
        values[value] = entry.value if entry.tap is None else jax.lax.stop_gradient(entry.value)
        if value in plan.tapped and value not in plan.handed:
            shadows[value] = fan_out(entry.value, entry.tap, rows)
        elif entry.shadow is not None:
            shadows[value] = entry.shadow
    handed = dict(zip(program.inputs, entering, strict=True))

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
            handed[value] if index in nested.handed else entry_of(value, roles, layout)
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
        elif operation in plan.meeting:
            use = plan.use(operation)
            outputs = meet(use, shadows_of(use), arguments, rows)
        else:
            outputs = operation.apply(*arguments)
        if operation in plan.carrying:
            use = plan.use(operation)
            carried = carry(use, shadows_of(use), arguments, rows)
            shadows.update(zip(operation.outputs, carried, strict=True))
        values.update(zip(operation.outputs, outputs, strict=True))
    return [
        entry_of(value, roles, plan.scope.layouts[value])
        for value, roles in zip(program.outputs, plan.wanted, strict=True)
    ]
