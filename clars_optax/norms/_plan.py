"""What to do with each operation of a loss.

Going forward, every value that comes from parameters and does not carry the whole batch gets a
shadow (see `_taps`), and an operation in which such a value meets the batch is the frontier. Going
backward from the loss, only what a gradient needs is kept; what is needed and cannot be done is an
error. Last, parameters with one use only are claimed by a rule, or handed into a nested program.
"""

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

import jax.numpy as jnp

from clars_optax.norms._nested import Nested, can_nest
from clars_optax.norms._obstacles import AFTER_THE_MEAN, find_obstacle, is_additive
from clars_optax.norms._program import Operation, Program, Value
from clars_optax.norms._rules import Elementwise, Rule, find_rule
from clars_optax.norms._scope import Scope
from clars_optax.norms._use import Use

# Between a parameter and its use, these change neither the norm of a gradient nor what a rule sees.
_VIEWS = frozenset(
    "convert_element_type copy copy_p name neg reshape rev squeeze transpose".split()
)


@dataclass(frozen=True)
class Claim:
    """A use of a parameter for which there is a rule.

    Attributes:
      param: the parameter.
      rule: finds the squared norms.
    """

    param: Value
    rule: Rule


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
            for operation in (self.meeting | self.carrying) - self.claims.keys()
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
            obstacle = obstacle or self.scope.own_derivative_obstacle(operation)
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
        self._consumers: dict[Value, list[tuple[Operation | None, int]]] = {}
        self.adding: set[Operation] = set()
        self.carrying: set[Operation] = set()
        self.meeting: set[Operation] = set()
        self.nested: dict[Operation, Nested] = {}
        for index, (value, roles) in enumerate(zip(self.program.outputs, wanted, strict=True)):
            self._want(value, roles, None, index)
        first_error: Exception | None = None
        for operation in reversed(self.program.operations):
            try:
                self._demand(operation)
            except (NotImplementedError, ValueError) as error:
                first_error = error
        if first_error is not None:
            raise first_error
        return [self.roles.get(value, set()) for value in self.program.inputs]

    def _want(
        self, value: Value, roles: Set[str], consumer: Operation | None, position: int
    ) -> None:
        if not roles or not value.from_params:
            return
        if not self.has_shadow(value):
            roles = {"value"}
        elif not value.from_batch:
            # A term of parameters alone.
            roles = {"shadow"}
        self.roles.setdefault(value, set()).update(roles)
        self._consumers.setdefault(value, []).append((consumer, position))

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
            wanted = zip(operation.entering, nested.demand(roles), strict=True)
            for position, (value, entering) in enumerate(wanted):
                self._want(value, entering, operation, position)
            return
        for position, value in enumerate(operation.operands):
            self._want(value, every - {"value"} or {"shadow"}, operation, position)
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
        """Decides for parameters that enter with taps what becomes of these.

        A parameter whose only use, but for views, has a rule is claimed by it. If the only use is
        in a nested program, the tap is handed in, to be used as late as can be: inside of a scan
        over layers, for one layer at a time. All others fan out at once.
        """
        self.claims: dict[Operation, Claim] = {}
        self.handed: dict[Value, Value] = {}
        """What goes into nested programs with a tap, and which parameter's tap that is."""
        self._claimed: set[Value] = set()
        positions: dict[Operation, set[int]] = {operation: set() for operation in self.nested}
        for param in tapped:
            views = [param]
            while len(self._consumers.get(views[-1], ())) == 1:
                ((operation, position),) = self._consumers[views[-1]]
                if operation is None or operation in self.adding:
                    break
                rule = self._rule(operation, position)
                if rule is not None:
                    self.claims[operation] = Claim(param, rule)
                elif operation in self.nested and self.nested[operation].takes_tap(position):
                    positions[operation].add(position)
                    self.handed[views[-1]] = param
                elif operation in self.carrying and _is_view(operation):
                    views.append(operation.outputs[0])
                    continue
                else:
                    break
                self._claimed.update(views)
                break
        for operation, nested in self.nested.items():
            nested.hand_in(positions[operation])

    def fans_out(self, param: Value) -> bool:
        """Whether a parameter that enters with a tap gets a shadow here."""
        return param in self.roles and param not in self._claimed

    @property
    def fanned_out(self) -> frozenset[str]:
        """The paths of the parameters that have shadows."""
        found = [
            self.roots[value]
            for value in self.program.inputs
            if self.has_shadow(value) and self.fans_out(value)
        ]
        found += [plan.fanned_out for nested in self.nested.values() for plan in nested.plans]
        return frozenset().union(*found)

    def is_claimed(self, value: Value) -> bool:
        """Whether a value is a parameter that a rule has claimed, or a view of it."""
        return value in self._claimed

    def rule_of_rows(self, operation: Operation) -> Elementwise | None:
        """What makes the rows where a value with a shadow is added to, or multiplies, the batch."""
        position = next(i for i, x in enumerate(operation.operands) if self.has_shadow(x))
        rule = self._rule(operation, position)
        return rule if isinstance(rule, Elementwise) else None

    def _rule(self, operation: Operation, position: int) -> Rule | None:
        if not self.scope.with_rules or operation not in self.meeting:
            return None
        layouts = self.scope.layouts
        shadowed = [value for value in operation.operands if self.has_shadow(value)]
        others = [value for value in operation.operands if layouts[value].carries_batch]
        if len(shadowed) > 1 or len(others) != 1 or not self.scope.carries_all(others[0]):
            return None
        values = [*operation.operands, *operation.outputs]
        if not all(map(_fits_rules, values)):
            return None
        shapes = [value.shape for value in values]
        return find_rule(operation.name, operation.params, shapes, position)


def _fits_rules(value: Value) -> bool:
    """Whether a rule may work on a value: its products are real, in float32."""
    dtype = value.aval.dtype
    is_wider = jnp.issubdtype(dtype, jnp.inexact) and dtype.itemsize > 4
    return math.prod(value.shape) > 0 and not is_wider


def _is_view(operation: Operation) -> bool:
    if operation.name == "broadcast_in_dim":
        return math.prod(operation.operands[0].shape) == math.prod(operation.outputs[0].shape)
    return operation.name in _VIEWS
