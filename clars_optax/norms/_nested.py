"""Nested programs that parameters enter: a plan for the body, run inside of the same primitive.

`jax.checkpoint` still rematerialises, and a scan is still a loop. What enters a body, and what
leaves it, is an `Entry`: a value, and beside it its shadow or its tap. Everything inside can be
differentiated, so that no derivative of its own is needed around the whole.

In a scan, shadows of constants are constants: the cotangents of the steps add up before they are
squared. The slices of what is scanned over are disjoint, so that their squares add: a parameter
that is used nowhere else goes in with its tap, and fans out in the body, one slice at a time.

Not followed: a scan whose steps are the examples (but for `jax.lax.map`, see `_obstacles`), and
`while_loop`, which has no reverse derivative.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from clars_optax.norms._layout import Layout
from clars_optax.norms._obstacles import Obstacle, not_followed
from clars_optax.norms._primitives import COLLECTIVES
from clars_optax.norms._program import Operation, Program, Value
from clars_optax.norms._rows import Rows

_KINDS = frozenset(["checkpoint", "cond", "optimization_barrier", "scan"])

Roots = frozenset[str]


class Entry(NamedTuple):
    """A value with its shadow, or with the tap of a parameter that fans out further inside."""

    value: Any
    shadow: Any = None
    tap: Any = None


class BodyPlan(Protocol):
    """What is asked of the plan of a body (it is `_plan.Plan`)."""

    program: Program
    roots: dict[Value, Roots]

    @property
    def is_split(self) -> bool: ...

    @property
    def untraced(self) -> dict[Operation, Roots]: ...

    @property
    def fanned_out(self) -> Roots: ...

    def demand(self, wanted: Sequence[Set[str]]) -> list[set[str]]: ...

    def hand_in(self, tapped: Set[Value]) -> None: ...


RunBody = Callable[[Any, Sequence[Entry], Rows], list[Entry]]


def can_nest(operation: Operation, layouts: Mapping[Value, Layout]) -> bool:
    """Whether an operation's bodies are entered, because the batch is in them."""
    followed = all(value in layouts for body in operation.bodies for value in body.inputs)
    return (
        operation.kind in _KINDS
        and followed
        and any(_is_reached(body, layouts) for body in operation.bodies)
    )


def _is_reached(program: Program, layouts: Mapping[Value, Layout]) -> bool:
    """Whether the batch is in a program, or an operation speaks to other devices."""
    values = [*program.inputs, *(v for operation in program.operations for v in operation.outputs)]
    return any(value.from_batch or layouts[value].carries_batch for value in values) or any(
        operation.name in COLLECTIVES or can_nest(operation, layouts)
        for operation in program.operations
    )


class Nested:
    """An operation with a plan for each of its bodies.

    Args:
      operation: what `can_nest`.
      roots: of each value that enters the bodies, the parameters that its shadow comes from.
      layouts: how the batch lies in each value.
      plan: makes the plan of a body, given the roots of its inputs.
    """

    def __init__(
        self,
        operation: Operation,
        roots: Sequence[Roots],
        layouts: Mapping[Value, Layout],
        plan: Callable[[Program, dict[Value, Roots]], Any],
    ):
        self.operation = operation
        self._carried = operation.carried
        entering = list(roots)
        while True:
            self.plans: list[BodyPlan] = [
                plan(body, {v: r for v, r in zip(body.inputs, entering, strict=True) if r})
                for body in operation.bodies
            ]
            before = list(entering)
            for index, value in zip(self._carried, self._leaving(0), strict=False):
                entering[index] |= self.plans[0].roots.get(value, frozenset())
            if entering == before:
                break
        self._entering = entering
        self._layouts = layouts

    def _leaving(self, body: int) -> list[Value]:
        return self.operation.bodies[body].outputs

    def roots_of_outputs(self) -> dict[Value, Roots]:
        """The operation's results that have shadows."""
        found = {}
        for value, position in zip(self.operation.outputs, self.operation.positions, strict=True):
            roots: Roots = frozenset().union(
                *(plan.roots.get(plan.program.outputs[position], ()) for plan in self.plans)
            )
            if position < len(self._carried):
                roots |= self._entering[self._carried[position]]
            if roots and value.from_params:
                found[value] = roots
        return found

    def find_obstacle(self) -> Obstacle | None:
        """Why values with shadows cannot enter or leave the bodies."""
        inputs = self.operation.bodies[0].inputs
        entering = [v for v, roots in zip(inputs, self._entering, strict=True) if roots]
        for value in (*entering, *self.roots_of_outputs()):
            problem = self._layouts[value].problem
            if problem is not None:
                return not_followed(problem)
        return None

    @property
    def is_split(self) -> bool:
        """Whether the batch is split over several axes in a body."""
        return any(plan.is_split for plan in self.plans)

    def demand(self, roles: Sequence[Set[str]]) -> list[set[str]]:
        """From the roles of the operation's outputs to those of what enters it."""
        wanted: list[set[str]] = [set() for _ in self._leaving(0)]
        for position, each in zip(self.operation.positions, roles, strict=True):
            wanted[position] |= each
        while True:
            demanded = [plan.demand(wanted) for plan in self.plans]
            self.entering_roles = [set().union(*each) for each in zip(*demanded, strict=True)]
            before = [set(each) for each in wanted]
            for position, index in enumerate(self._carried):
                wanted[position] |= self.entering_roles[index]
                self.entering_roles[index] |= wanted[position]
            if wanted == before:
                return self.entering_roles

    def takes_tap(self, index: int) -> bool:
        """Whether a parameter may go in with its tap: not as what all steps of a scan share."""
        return self.operation.kind != "scan" or index >= self._carried.stop

    def hand_in(self, tapped: Set[int]) -> None:
        """Says which of the values that enter come with their taps."""
        self.handed = tapped
        for plan in self.plans:
            plan.hand_in({plan.program.inputs[index] for index in tapped})

    def entering(self) -> list[tuple[Value, set[str], Layout]]:
        """What enters the bodies: its roles, and how the batch lies in its shadow."""
        layouts = [self._layouts[value] for value in self.operation.bodies[0].inputs]
        return list(zip(self.operation.entering, self.entering_roles, layouts, strict=True))

    def run(self, run: RunBody, index: Any, entries: list[Entry], rows: Rows) -> list[Entry]:
        """The operation with the plans for its bodies; `index` is a `cond`'s branch."""
        params = self.operation.params

        def body(plan: BodyPlan) -> Callable[[list[Entry]], list[Entry]]:
            return lambda entries: run(plan, entries, rows)

        match self.operation.kind:
            case "checkpoint":
                remat = jax.checkpoint(
                    body(self.plans[0]), prevent_cse=params["prevent_cse"], policy=params["policy"]
                )
                outputs = remat(entries)
            case "cond":
                outputs = jax.lax.switch(index, [body(plan) for plan in self.plans], entries)
            case "optimization_barrier":
                outputs = run(self.plans[0], entries, rows)
                values = jax.lax.optimization_barrier([entry.value for entry in outputs])
                outputs = [x._replace(value=v) for x, v in zip(outputs, values, strict=True)]
            case _:
                outputs = self._scan(body(self.plans[0]), entries)
        return [outputs[position] for position in self.operation.positions]

    def _scan(
        self, body: Callable[[list[Entry]], list[Entry]], entries: list[Entry]
    ) -> list[Entry]:
        params = self.operation.params
        start, stop = self._carried.start, self._carried.stop
        consts, init, scanned = entries[:start], entries[start:stop], entries[stop:]

        def step(carry: list[Entry], xs: list[Entry]) -> tuple[list[Entry], list[Entry]]:
            outputs = body([*consts, *carry, *xs])
            return outputs[: len(carry)], outputs[len(carry) :]

        def per_step(entry: Entry) -> Entry:
            # The squares of disjoint slices add up, by the derivative of the broadcast.
            tap, length = entry.tap, params["length"]
            return Entry(
                entry.value,
                None if entry.shadow is None else jnp.moveaxis(entry.shadow, 1, 0),
                None if tap is None else jnp.broadcast_to(tap, (length, *tap.shape)),
            )

        carry, stacked = jax.lax.scan(
            step,
            init,
            [per_step(entry) for entry in scanned],
            length=params["length"],
            reverse=params["reverse"],
            unroll=params["unroll"],
        )
        return [
            *carry,
            *(
                x if x.shadow is None else x._replace(shadow=jnp.moveaxis(x.shadow, 0, 1))
                for x in stacked
            ),
        ]
