"""Follows the batch through the operations of a program: which axes carry it, and how.

Two sources agree. A rule per primitive says how factors move (see `_primitives`). The sizes in a
second trace, at twice the batch size, say which axes carry the batch at all: that finds the arrays
that a loss makes itself (`jnp.zeros((N, 1, d))`), and shows where a primitive without a rule put
the batch. Where neither suffices the layout is unknown, which is an error only if a parameter meets
the value. Inside of a nested program the same is done again; what a scan carries from one step to
the next must lie the same way before and after.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from clars_optax.norms._layout import (
    Factor,
    Layout,
    plain_axis,
    unbatched,
    unknown,
)
from clars_optax.norms._match import match
from clars_optax.norms._parts import A_PART
from clars_optax.norms._primitives import ELEMENTWISE, propagate
from clars_optax.norms._program import Operation, Program, Value


def follow(
    program: Program, doubled: Program, batch: Mapping[Value, Layout], num_examples: int
) -> tuple[dict[Value, Layout], dict[Value, Value]]:
    """Finds the layout of every value of a program.

    Args:
      program: the loss at N examples.
      doubled: the loss at 2 N examples.
      batch: the layouts of the inputs that carry the batch.
      num_examples: N.

    Returns:
      The layouts, and the pairs of values that stand at the same place in the two programs.
    """
    pairs = match(program, doubled)
    return _layouts(program, batch, pairs, num_examples), pairs


def _layouts(
    program: Program,
    entering: Mapping[Value, Layout],
    pairs: Mapping[Value, Value],
    num_examples: int,
) -> dict[Value, Layout]:
    """The layouts of all values, those inside of nested programs included."""
    known = dict(entering)
    while True:
        layouts = dict(known)

        def settle(value: Value, layout: Layout | None = None) -> Layout:
            if value not in layouts:  # noqa: B023
                layout = layout or unbatched(value.shape)
                layouts[value] = _reconcile(layout, value, pairs, num_examples)  # noqa: B023
            return layouts[value]  # noqa: B023

        for operation in program.operations:
            given = [settle(value) for value in operation.operands]
            inside = _inside(operation, given, pairs, num_examples)
            if inside is None:
                outputs = propagate(operation, given)
            else:
                layouts.update(inside)
                outputs = _leaving(operation, inside)
            for value, layout in zip(operation.outputs, outputs, strict=True):
                settle(value, layout)
        for value in (*program.inputs, *program.outputs):
            settle(value)
        learnt = _learn(program, layouts)
        if not learnt:
            return layouts
        known.update(learnt)


def _learn(program: Program, layouts: Mapping[Value, Layout]) -> dict[Value, Layout]:
    """What arrays that the loss made itself must be, from the values that they are combined with.

    A bias that is broadcast to `[N * T, d]` does not say by itself whether T is inside or outside.
    """
    return {
        operand: layouts[operation.outputs[0]]
        for operation in program.operations
        if operation.name in ELEMENTWISE and layouts[operation.outputs[0]].problem is None
        for operand in operation.operands
        if layouts[operand].problem is not None
        and not operand.from_batch
        and operand.shape == operation.outputs[0].shape
    }


def _reconcile(
    layout: Layout, value: Value, pairs: Mapping[Value, Value], num_examples: int
) -> Layout:
    """Completes what a rule says by what the sizes say."""
    if layout.problem is not None or value not in pairs:
        return layout
    shape, doubled = value.shape, pairs[value].shape
    if len(shape) != len(doubled):
        return unknown(shape, "its rank depends on the batch size")
    axes = list(layout.axes)
    for index, (size, twice) in enumerate(zip(shape, doubled, strict=True)):
        if size == twice or index in layout.batch_axes:
            continue
        if value.producer is not None and value.producer.name == "reshape" and layout.carries_batch:
            # By coincidence the factors fit at this batch size; at another they would not.
            return unknown(shape, "a reshape cuts across the batch")
        if (size, twice) != (num_examples, 2 * num_examples):
            is_slice = value.producer is not None and value.producer.name == "slice"
            mixed = f"the batch is mixed with something else on axis {index}"
            return unknown(shape, A_PART if is_slice else mixed)
        axes[index] = (Factor(size, 1),)
    found = Layout(tuple(axes))
    return replace(found, is_part=layout.is_part and not found.carries_batch)


def _inside(
    operation: Operation,
    given: Sequence[Layout],
    pairs: Mapping[Value, Value],
    num_examples: int,
) -> dict[Value, Layout] | None:
    """The layouts inside of an operation's bodies; None where the sizes must do."""
    if not operation.bodies or any(x not in pairs for b in operation.bodies for x in b.inputs):
        return None
    entering = list(given[-len(operation.entering) :])
    carried = operation.carried
    if operation.kind == "scan":
        if walks_through_the_batch(operation, given, pairs):
            return None
        stop = carried.stop
        entering[stop:] = [replace(x, axes=x.axes[1:]) for x in entering[stop:]]
    while True:
        layouts: dict[Value, Layout] = {}
        for body in operation.bodies:
            known = dict(zip(body.inputs, entering, strict=True))
            layouts.update(_layouts(body, known, pairs, num_examples))
        before = list(entering)
        for index, value in zip(carried, operation.bodies[0].outputs, strict=False):
            body_input = operation.bodies[0].inputs[index]
            entering[index] = _agreed(
                entering[index], layouts[value], body_input, (operation.entering[index], value)
            )
        if entering == before:
            return layouts


def walks_through_the_batch(
    operation: Operation, given: Sequence[Layout], pairs: Mapping[Value, Value]
) -> bool:
    """Whether the steps of a scan are the examples, or depend on their number."""
    twin = next((pairs[value].producer for value in operation.outputs if value in pairs), None)
    return any(0 in layout.batch_axes for layout in given[operation.carried.stop :]) or (
        twin is not None and twin.params["length"] != operation.params["length"]
    )


def _agreed(one: Layout, other: Layout, value: Value, sources: tuple[Value, Value]) -> Layout:
    """The layout of what two branches return, or a scan takes from one step to the next.

    Args:
      one: that of a branch, or before the step.
      other: that of another branch, or behind it.
      value: what takes its place.
      sources: what the layouts are of.
    """
    if (one.axes, one.problem) == (other.axes, other.problem):
        return replace(one, is_part=one.is_part or other.is_part)
    if one.problem is None and other.problem is None:
        return unknown(value.shape, "two arrangements of the batch meet")
    for layout, source in zip((one, other), sources, strict=True):
        if layout.problem is not None and source.from_batch:
            return unknown(value.shape, layout.problem)
    # An array that the loss made itself lies as the one that takes its place.
    return other if one.problem is not None and other.problem is None else one


def _leaving(operation: Operation, inside: Mapping[Value, Layout]) -> list[Layout]:
    """The layouts of the results of an operation with bodies."""
    layouts = []
    for value, position in zip(operation.outputs, operation.positions, strict=True):
        first, *others = (body.outputs[position] for body in operation.bodies)
        layout = inside[first]
        for other in others:
            layout = _agreed(layout, inside[other], value, (first, other))
        if operation.kind == "scan" and position >= len(operation.carried):
            layout = replace(layout, axes=(plain_axis(value.shape[0]), *layout.axes))
        layouts.append(layout)
    return layouts
