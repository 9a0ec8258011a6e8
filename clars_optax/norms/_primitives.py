"""How the batch moves through each primitive: where its factors go in the results."""

import math
from collections.abc import Callable, Sequence

from clars_optax.norms._layout import (
    Axis,
    Layout,
    merge,
    plain_axis,
    unbatched,
    unknown,
)
from clars_optax.norms._program import Operation, Value

Rule = Callable[[Operation, Sequence[Layout]], Layout]

ELEMENTWISE = frozenset(
    """
    abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp complex conj
    convert_element_type copy copy_p cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor
    ge gt igamma igammac imag integer_pow is_finite le lgamma log log1p log2 logistic lt max min mul
    name ne neg nextafter not one_minus_square or polygamma polynomial pow real reduce_precision rem
    round rsqrt select_n sharding_constraint shift_left shift_right_arithmetic shift_right_logical
    sign sin sinh sqrt square stop_gradient sub tan tanh xor zeta
    """.split()
)
"""Primitives whose result at a position depends on their operands at that position (or on
scalars)."""

COLLECTIVES = frozenset(
    """
    all_gather all_gather_invariant all_to_all pbroadcast pcast pgather pmax pmin ppermute psum
    psum2 psum_invariant psum_scatter pvary ragged_all_to_all reduce_scatter
    """.split()
)
"""Primitives that speak with other devices."""

A_PART = "a slice takes a part of the batch"

_RULES: dict[str, Rule] = {}


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, function))
        return function

    return register


def propagate(operation: Operation, given: Sequence[Layout]) -> list[Layout]:
    """The layouts of an operation's results, from those of its operands."""
    if not operation.outputs:
        # It is there for its effect, as `jax.debug.print` is.
        return []
    if operation.name in COLLECTIVES and operation.name not in _POSITION_PRESERVING:
        rule: Rule | None = _other
    elif operation.name in ELEMENTWISE or operation.name in _POSITION_PRESERVING:
        rule = _elementwise
    else:
        rule = _RULES.get(operation.name)
    if rule is not None and len(operation.outputs) == 1:
        return [rule(operation, given)]
    if operation.name == "split":
        return _split(operation, given)
    return [_other(operation, given, output) for output in operation.outputs]


def _only(layouts: Sequence[Axis]) -> Axis | None:
    """The one arrangement that carries the batch, if those that do agree; () where none does."""
    batched = {axis for axis in layouts if any(factor.stride for factor in axis)}
    if len(batched) > 1:
        return None
    return batched.pop() if batched else ()


def _problem(given: Sequence[Layout]) -> str | None:
    return next((layout.problem for layout in given if layout.problem is not None), None)


_POSITION_PRESERVING = frozenset(
    """
    cumlogsumexp cummax cummin cumprod cumsum pcast pmax pmin psum psum2 psum_invariant pvary
    """.split()
)


def _elementwise(operation: Operation, given: Sequence[Layout]) -> Layout:
    shape = operation.outputs[0].shape
    entering = list(zip(operation.operands, given, strict=True))
    if any(layout.problem is None and layout.carries_batch for layout in given):
        # An array that the loss made itself lies as the one that it is combined with.
        entering = [
            (value, layout)
            for value, layout in entering
            if layout.problem is None or value.from_batch
        ]
    problem = _problem([layout for _, layout in entering])
    if problem is not None:
        return unknown(shape, problem)
    axes: list[Axis] = []
    for index, size in enumerate(shape):
        # A size-1 axis is broadcast by the primitive itself, and so is a scalar.
        candidates = [
            layout.axes[index]
            for value, layout in entering
            if len(value.shape) == len(shape) and value.shape[index] == size
        ]
        axis = _only(candidates)
        if axis is None:
            return unknown(shape, "two arrangements of the batch meet")
        axes.append(axis or plain_axis(size))
    return Layout(tuple(axes))


def _other(operation: Operation, given: Sequence[Layout], output: Value | None = None) -> Layout:
    """A primitive without a rule: the sizes say where the batch is, if it is plain."""
    shape = (output or operation.outputs[0]).shape
    batched = [layout for layout in given if layout.carries_batch]
    problem = _problem(given)
    if problem is None and operation.name in COLLECTIVES:
        problem = f"`{operation.name}` brings in other devices' examples" if batched else None
    for layout in batched:
        for index in layout.batch_axes:
            if len(layout.axes[index]) > 1 or layout.axes[index][0].stride != 1:
                problem = (
                    problem or f"`{operation.name}` meets a batch that is merged with other axes"
                )
    return unbatched(shape) if problem is None else unknown(shape, problem)


@_rule("reshape")
def _reshape(operation: Operation, given: Sequence[Layout]) -> Layout:
    shape = operation.outputs[0].shape
    if given[0].problem is not None:
        return unknown(shape, given[0].problem)
    if 0 in shape or not given[0].carries_batch:
        return unbatched(shape)
    return given[0].reshape(shape)


@_rule("broadcast_in_dim")
def _broadcast_in_dim(operation: Operation, given: Sequence[Layout]) -> Layout:
    shape = operation.outputs[0].shape
    if given[0].problem is not None:
        return unknown(shape, given[0].problem)
    axes = [plain_axis(size) for size in shape]
    dimensions = operation.params["broadcast_dimensions"]
    for source, target in enumerate(dimensions):
        if operation.operands[0].shape[source] == shape[target]:
            axes[target] = given[0].axes[source]
    return Layout(tuple(axes))


@_rule("tile")
def _tile(operation: Operation, given: Sequence[Layout]) -> Layout:
    repeats = operation.params["reps"]
    axes = [
        merge([*plain_axis(repeat), *axis])
        for repeat, axis in zip(repeats, given[0].axes, strict=True)
    ]
    return Layout(tuple(axes), given[0].problem)


@_rule("transpose")
def _transpose(operation: Operation, given: Sequence[Layout]) -> Layout:
    axes = given[0].axes
    return Layout(tuple(axes[i] for i in operation.params["permutation"]), given[0].problem)


def _without(layout: Layout, removed: Sequence[int], shape: Sequence[int]) -> Layout:
    if layout.problem is not None and not shape:
        return unbatched(shape)
    kept = tuple(axis for index, axis in enumerate(layout.axes) if index not in removed)
    return Layout(kept, layout.problem)


@_rule("squeeze")
def _squeeze(operation: Operation, given: Sequence[Layout]) -> Layout:
    return _without(given[0], operation.params["dimensions"], operation.outputs[0].shape)


@_rule(
    *[
        "argmax",
        "argmin",
        "reduce_and",
        "reduce_max",
        "reduce_min",
        "reduce_or",
        "reduce_prod",
        "reduce_sum",
        "reduce_xor",
    ]
)
def _reduce(operation: Operation, given: Sequence[Layout]) -> Layout:
    return _without(given[0], operation.params["axes"], operation.outputs[0].shape)


@_rule("dot_general")
def _dot_general(operation: Operation, given: Sequence[Layout]) -> Layout:
    shape = operation.outputs[0].shape
    problem = _problem(given)
    if problem is not None:
        return unknown(shape, problem)
    contracted, batched = operation.params["dimension_numbers"]
    left, right = given[0].axes, given[1].axes
    axes: list[Axis] = []
    for i, j in zip(*batched, strict=True):
        axis = _only([left[i], right[j]])
        if axis is None:
            return unknown(shape, "two arrangements of the batch meet")
        axes.append(axis or left[i])
    for side, layout in enumerate((left, right)):
        gone = {*contracted[side], *batched[side]}
        axes.extend(axis for index, axis in enumerate(layout) if index not in gone)
    return Layout(tuple(axes))


@_rule("conv_general_dilated")
def _conv(operation: Operation, given: Sequence[Layout]) -> Layout:
    shape = operation.outputs[0].shape
    numbers = operation.params["dimension_numbers"]
    problem = _problem(given)
    image, kernel = given[0], given[1]
    if problem is None and (
        image.batch_axes - {numbers.lhs_spec[0]}
        or kernel.batch_axes - {numbers.rhs_spec[0]}
        or (kernel.carries_batch and operation.params["feature_group_count"] != 1)
        or (image.carries_batch and operation.params["batch_group_count"] != 1)
    ):
        problem = "a convolution has the batch on its feature or spatial axes"
    if problem is not None:
        return unknown(shape, problem)
    axes = [plain_axis(size) for size in shape]
    if image.carries_batch:
        axes[numbers.out_spec[0]] = image.axes[numbers.lhs_spec[0]]
    if kernel.carries_batch:
        axes[numbers.out_spec[1]] = kernel.axes[numbers.rhs_spec[0]]
    return Layout(tuple(axes))


@_rule("concatenate")
def _concatenate(operation: Operation, given: Sequence[Layout]) -> Layout:
    shape = operation.outputs[0].shape
    along = operation.params["dimension"]
    if _is_rolled(operation, given):
        # The examples in another order: the sizes say so if it is all of them.
        return unbatched(shape)
    problem = _problem(given)
    if problem is not None:
        return unknown(shape, problem)
    axes: list[Axis] = []
    for index, size in enumerate(shape):
        parts = [layout.axes[index] for layout in given]
        if index == along:
            axis = _joined(parts)
        else:
            axis = _only(parts)
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
        sources.add(value.producer.operands[0])
    return len(sources) == 1 and all(
        layout.problem == A_PART or not layout.carries_batch for layout in given
    )


@_rule("stack")
def _stack(operation: Operation, given: Sequence[Layout]) -> Layout:
    shape, along = operation.outputs[0].shape, operation.params["axis"]
    problem = _problem(given)
    axes: list[Axis] = []
    for size, *parts in zip(
        operation.operands[0].shape, *(layout.axes for layout in given), strict=True
    ):
        axis = _only(parts)
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


@_rule("slice")
def _slice(operation: Operation, given: Sequence[Layout]) -> Layout:
    start, stop = operation.params["start_indices"], operation.params["limit_indices"]
    strides = operation.params["strides"] or (1,) * len(start)
    cuts = list(zip(start, stop, strides, strict=True))
    return _sliced(given[0], operation.outputs[0].shape, cuts)


def _split(operation: Operation, given: Sequence[Layout]) -> list[Layout]:
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


@_rule("dynamic_slice")
def _dynamic_slice(operation: Operation, given: Sequence[Layout]) -> Layout:
    shape, source = operation.outputs[0].shape, operation.operands[0].shape
    if given[0].problem is None and all(shape[i] == source[i] for i in given[0].batch_axes):
        return _resized(given[0], shape)
    return unknown(shape, given[0].problem or A_PART)


@_rule(
    "dynamic_update_slice", "scatter", "scatter-add", "scatter_add", "scatter-mul", "scatter_mul"
)
def _updated(operation: Operation, given: Sequence[Layout]) -> Layout:
    return given[0]


@_rule("pad")
def _pad(operation: Operation, given: Sequence[Layout]) -> Layout:
    shape = operation.outputs[0].shape
    configuration = operation.params["padding_config"]
    if given[0].problem is None and all(configuration[i] == (0, 0, 0) for i in given[0].batch_axes):
        return _resized(given[0], shape)
    return unknown(shape, given[0].problem or "the batch is padded")


@_rule("rev")
def _rev(operation: Operation, given: Sequence[Layout]) -> Layout:
    shape = operation.outputs[0].shape
    reversed_axes = {*operation.params["dimensions"]}
    if _is_plain(given[0]) or not given[0].batch_axes & reversed_axes:
        # What takes the place of an example is that example from here on, as in `x[order]`.
        return given[0]
    return unknown(shape, given[0].problem or "the order of the examples is reversed")


@_rule("gather")
def _gather(operation: Operation, given: Sequence[Layout]) -> Layout:
    shape, source = operation.outputs[0].shape, operation.operands[0].shape
    problem = _problem(given)
    if problem is not None:
        return unknown(shape, problem)
    numbers = operation.params["dimension_numbers"]
    sizes = operation.params["slice_sizes"]
    operand, indices = given[0], given[1]
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
