"""How the batch moves through primitives that take a part of an array, or put parts together."""

import math
from collections.abc import Callable, Sequence

from clars_optax.norms._layout import (
    Axis,
    Layout,
    merge,
    only,
    plain_axis,
    problem_of,
    unbatched,
    unknown,
)
from clars_optax.norms._program import Operation, Value

A_PART = "a slice takes a part of the batch"


def _concatenate(operation: Operation, given: Sequence[Layout]) -> Layout:
    shape = operation.outputs[0].shape
    along = operation.params["dimension"]
    if _is_rolled(operation, given):
        # The examples in another order: the sizes say so if it is all of them.
        return unbatched(shape)
    known = [
        layout
        for value, layout in zip(operation.operands, given, strict=True)
        # One entry each that the loss made itself, as the indices in `x[jnp.arange(len(x)), k]`,
        # lies as what it is put beside.
        if layout.problem is None or value.from_batch or value.shape[along] != 1
    ]
    problem = problem_of(known or given)
    if problem is not None:
        return unknown(shape, problem)
    axes: list[Axis] = []
    for index, size in enumerate(shape):
        if index == along:
            axis = _joined([layout.axes[index] for layout in given])
        else:
            axis = only([layout.axes[index] for layout in known])
            axis = plain_axis(size) if axis == () else axis
        if axis is None:
            return unknown(shape, "examples are concatenated with something else")
        axes.append(axis)
    return Layout(tuple(axes))


def _is_rolled(operation: Operation, given: Sequence[Layout]) -> bool:
    """Whether slices along the batch are put together again, as `jnp.roll` does."""
    sources = set()
    for value in operation.operands:
        if value.producer is None or value.producer.name != "slice":
            return False
        (source,) = value.producer.operands
        along = operation.params["dimension"]
        if any(
            size != part and axis != along
            for axis, (size, part) in enumerate(zip(source.shape, value.shape, strict=True))
        ):
            # Something else than the order changes.
            return False
        sources.add(source)
    return len(sources) == 1 and all(
        layout.problem == A_PART or not layout.carries_batch for layout in given
    )


def _stack(operation: Operation, given: Sequence[Layout]) -> Layout:
    shape, along = operation.outputs[0].shape, operation.params["axis"]
    problem = problem_of(given)
    axes: list[Axis] = []
    for size, *parts in zip(
        operation.operands[0].shape, *(layout.axes for layout in given), strict=True
    ):
        axis = only(parts)
        if axis is None:
            problem = problem or "two arrangements of the batch meet"
        axes.append(axis or plain_axis(size))
    axes.insert(along, plain_axis(shape[along]))
    return unknown(shape, problem) if problem is not None else Layout(tuple(axes))


def _joined(parts: Sequence[Axis]) -> Axis | None:
    """An axis made of several: `k` runs of the whole batch are the factors `k` and `N`."""
    if not any(factor.stride for axis in parts for factor in axis):
        return plain_axis(sum(_size(axis) for axis in parts))
    runs, bodies = 0, set()
    for axis in parts:
        outer = axis[0].size if axis and not axis[0].stride else 1
        bodies.add(axis[1:] if outer > 1 else axis)
        runs += outer
    if len(bodies) != 1:
        return None
    return merge([*plain_axis(runs), *bodies.pop()])


def _size(axis: Axis) -> int:
    return math.prod(factor.size for factor in axis)


def _cut(axis: Axis, start: int, stop: int, stride: int) -> Axis | None:
    """The part of an axis from `start` to `stop`; None where it tears the batch."""
    if (start, stop, stride) == (0, _size(axis), 1):
        return axis
    if not any(factor.stride for factor in axis):
        return plain_axis(-(-(stop - start) // stride))
    if not axis[0].stride and stride == 1:
        run = _size(axis[1:])
        if start % run == 0 and stop % run == 0:
            return merge([*plain_axis((stop - start) // run), *axis[1:]])
    inner = axis[-1].size
    taken = -(-(stop - start) // stride)
    if not axis[-1].stride and stride == inner > start and taken == _size(axis[:-1]):
        # Every k-th position of [N, k] merged: one of the k entries of each example.
        return axis[:-1]
    return None


def _is_plain(layout: Layout) -> bool:
    """Whether all the batch is one axis, example after example."""
    factors = layout.batch_factors
    return len(factors) == 1 and factors[0].stride == 1 and (factors[0],) in layout.axes


def _sliced(layout: Layout, shape: Sequence[int], cuts: Sequence[tuple[int, int, int]]) -> Layout:
    axes = [_cut(axis, *cut) for axis, cut in zip(layout.axes, cuts, strict=True)]
    if layout.problem is None and None in axes and _is_plain(layout):
        # A fixed number of examples, as `x[0]`, is no batch; the sizes tell it from a part.
        return unbatched(shape)
    if layout.problem is not None or None in axes:
        return unknown(shape, layout.problem or A_PART)
    return Layout(tuple(axis for axis in axes if axis is not None))


def _slice(operation: Operation, given: Sequence[Layout]) -> Layout:
    start, stop = operation.params["start_indices"], operation.params["limit_indices"]
    strides = operation.params["strides"] or (1,) * len(start)
    cuts = list(zip(start, stop, strides, strict=True))
    return _sliced(given[0], operation.outputs[0].shape, cuts)


def split(operation: Operation, given: Sequence[Layout]) -> list[Layout]:
    """The layouts of the parts that are used."""
    along, start, layouts = operation.params["axis"], 0, []
    whole = [(0, size, 1) for size in operation.operands[0].shape]
    for size in operation.params["sizes"]:
        cuts = [*whole[:along], (start, start + size, 1), *whole[along + 1 :]]
        shape = [stop - start for start, stop, _ in cuts]
        layouts.append(_sliced(given[0], shape, cuts))
        start += size
    return [layouts[position] for position in operation.positions]


def _resized(layout: Layout, shape: Sequence[int]) -> Layout:
    """The layout when only axes that do not carry the batch change their sizes."""
    kept = layout.batch_axes
    axes = [layout.axes[i] if i in kept else plain_axis(size) for i, size in enumerate(shape)]
    return Layout(tuple(axes))


def _dynamic_slice(operation: Operation, given: Sequence[Layout]) -> Layout:
    shape, source = operation.outputs[0].shape, operation.operands[0].shape
    if given[0].problem is None and all(shape[i] == source[i] for i in given[0].batch_axes):
        return _resized(given[0], shape)
    return unknown(shape, given[0].problem or A_PART)


def _updated(operation: Operation, given: Sequence[Layout]) -> Layout:
    return given[0]


def _scattered(operation: Operation, given: Sequence[Layout]) -> Layout:
    target, indices = operation.operands[:2]
    axes = operation.params["dimension_numbers"].scatter_dims_to_operand_dims
    if any(
        axis in given[0].batch_axes
        and _component(indices, position).from_batch
        # Of a batch that is merged with other axes, the size is no coincidence.
        and not (target.from_batch and len(given[0].axes[axis]) > 1)
        for position, axis in enumerate(axes)
    ):
        # Slots or segments, of which there happen to be as many as examples.
        return unknown(operation.outputs[0].shape, "where something is put depends on the batch")
    return given[0]


def _component(indices: Value, position: int) -> Value:
    """What the indices along one axis come from, where they were put together."""
    producer = indices.producer
    if producer is None or producer.name != "concatenate":
        return indices
    if producer.params["dimension"] != len(indices.shape) - 1:
        return indices
    parts = [part for part in producer.operands for _ in range(part.shape[-1])]
    return parts[position]


def _pad(operation: Operation, given: Sequence[Layout]) -> Layout:
    shape = operation.outputs[0].shape
    configuration = operation.params["padding_config"]
    if given[0].problem is None and all(configuration[i] == (0, 0, 0) for i in given[0].batch_axes):
        return _resized(given[0], shape)
    return unknown(shape, given[0].problem or "the batch is padded")


def _rev(operation: Operation, given: Sequence[Layout]) -> Layout:
    shape = operation.outputs[0].shape
    reversed_axes = {*operation.params["dimensions"]}
    if _is_plain(given[0]) or not given[0].batch_axes & reversed_axes:
        # What takes the place of an example is that example from here on, as in `x[order]`.
        return given[0]
    return unknown(shape, given[0].problem or "the order of the examples is reversed")


def _gather(operation: Operation, given: Sequence[Layout]) -> Layout:
    shape, source = operation.outputs[0].shape, operation.operands[0].shape
    problem = problem_of(given)
    if problem is not None:
        return unknown(shape, problem)
    numbers = operation.params["dimension_numbers"]
    sizes = operation.params["slice_sizes"]
    operand, indices = given[0], given[1]
    for pair in zip(
        numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True
    ):
        if only([layout.axes[axis] for layout, axis in zip(given, pair, strict=False)]) is None:
            return unknown(shape, "two arrangements of the batch meet")
    axes = [plain_axis(size) for size in shape]
    looked_up = [i for i in range(len(shape)) if i not in numbers.offset_dims]
    for target, axis in zip(looked_up, indices.axes[:-1], strict=True):
        axes[target] = axis
    collapsed = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    windows = [i for i in range(len(source)) if i not in collapsed]
    for target, axis_index in zip(numbers.offset_dims, windows, strict=True):
        if sizes[axis_index] == source[axis_index]:
            axes[target] = operand.axes[axis_index]
        elif axis_index in operand.batch_axes:
            return unknown(shape, A_PART)
    return Layout(tuple(axes))


PARTS: dict[str, Callable[[Operation, Sequence[Layout]], Layout]] = {
    "concatenate": _concatenate,
    "stack": _stack,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _updated,
    "pad": _pad,
    "rev": _rev,
    "gather": _gather,
    "scatter": _scattered,
    **{
        f"scatter{sign}{kind}": _scattered
        for kind in ("add", "sub", "mul", "min", "max")
        for sign in "-_"
    },
}
"""By the name of the primitive, what lays its one result."""
