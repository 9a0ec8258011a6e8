"""How the batch moves through each primitive: where its factors go in the results."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from clars_optax.norms._along import along
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
from clars_optax.norms._parts import A_PART, PARTS, split
from clars_optax.norms._program import Operation, Value

Rule = Callable[[Operation, Sequence[Layout]], Layout]

ELEMENTWISE = frozenset(
    """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp
    complex conj convert_element_type copy copy_p cos cosh digamma div eq erf erf_inv erfc exp exp2
    expm1 floor ge gt igamma igamma_grad_a igammac imag integer_pow is_finite le lgamma log log1p
    log2 logistic lt max min mul name ne neg nextafter not one_minus_square or polygamma polynomial
    pow real reduce_precision regularized_incomplete_beta rem round rsqrt select_n
    sharding_constraint shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt
    square stop_gradient sub tan tanh xor zeta
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

_RULES: dict[str, Rule] = dict(PARTS)


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, function))
        return function

    return register


_CUTS = frozenset("dynamic_slice gather slice split".split())
"""Primitives that may take some entries of an axis."""


def propagate(operation: Operation, given: Sequence[Layout]) -> list[Layout]:
    """The layouts of an operation's results, from those of its operands."""
    is_part = any(layout.is_part or layout.problem == A_PART for layout in given) or (
        operation.name in _CUTS
        and given[0].carries_batch
        # Of a sorted batch, it is a statistic, as a maximum is.
        and not _is_sorted(operation.operands[0])
    )
    return [
        replace(layout, is_part=is_part and not layout.carries_batch)
        for layout in _propagated(operation, given)
    ]


def _is_sorted(value: Value) -> bool:
    """Whether a value is made of a sorted one, entry by entry."""
    pending, seen = [value], {value}
    while pending:
        value = pending.pop()
        producer = value.producer
        if producer is None:
            continue
        if producer.name == "sort":
            return True
        if producer.name in ELEMENTWISE:
            sources = {x for x in producer.operands if x.shape == value.shape} - seen
            seen |= sources
            pending += sources
    return False


def _propagated(operation: Operation, given: Sequence[Layout]) -> list[Layout]:
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
        return split(operation, given)
    return [_other(operation, given, output) for output in operation.outputs]


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
    problem = problem_of([layout for _, layout in entering])
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
        axis = only(candidates)
        if axis is None:
            return unknown(shape, "two arrangements of the batch meet")
        axes.append(axis or plain_axis(size))
    return Layout(tuple(axes))


def _other(operation: Operation, given: Sequence[Layout], output: Value | None = None) -> Layout:
    """A primitive without a rule: the sizes say where the batch is, if it is plain."""
    output = output or operation.outputs[0]
    found = along(operation, given, output)
    if found is not None:
        return found
    shape = output.shape
    batched = [layout for layout in given if layout.carries_batch]
    problem = problem_of(given)
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
    axes, order = given[0].axes, operation.params["dimensions"]
    if order is not None:
        # Transposed first: batched convolutions do that, and order="F".
        axes = tuple(axes[i] for i in order)
    return Layout(axes).reshape(shape)


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
    problem = problem_of(given)
    if problem is not None:
        return unknown(shape, problem)
    contracted, batched = operation.params["dimension_numbers"]
    left, right = given[0].axes, given[1].axes
    axes: list[Axis] = []
    for i, j in zip(*batched, strict=True):
        axis = only([left[i], right[j]])
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
    problem = problem_of(given)
    if problem is not None:
        return unknown(shape, problem)
    image, kernel = given[0], given[1]
    axes = [plain_axis(size) for size in shape]
    of_groups = _axis_of_groups(operation, image, kernel)
    if of_groups is not None:
        axes[numbers.out_spec[1]] = of_groups
        return Layout(tuple(axes))
    if (
        image.batch_axes - {numbers.lhs_spec[0]}
        or kernel.batch_axes - {numbers.rhs_spec[0]}
        or (kernel.carries_batch and operation.params["feature_group_count"] != 1)
        or (image.carries_batch and operation.params["batch_group_count"] != 1)
    ):
        return unknown(shape, "a convolution has the batch on its feature or spatial axes")
    if image.carries_batch:
        axes[numbers.out_spec[0]] = image.axes[numbers.lhs_spec[0]]
    if kernel.carries_batch:
        axes[numbers.out_spec[1]] = kernel.axes[numbers.rhs_spec[0]]
    return Layout(tuple(axes))


def _axis_of_groups(operation: Operation, image: Layout, kernel: Layout) -> Axis | None:
    """The channels of a convolution's result, if every example has feature groups of its own.

    That is what `jax.vmap` makes of convolutions with a kernel for each example.
    """
    numbers = operation.params["dimension_numbers"]
    channels, kernels = numbers.lhs_spec[1], numbers.rhs_spec[0]
    if image.batch_axes != {channels} or kernel.batch_axes != {kernels}:
        return None
    examples, others = (
        axis[: 1 + max(index for index, factor in enumerate(axis) if factor.stride)]
        for axis in (image.axes[channels], kernel.axes[kernels])
    )
    number = math.prod(factor.size for factor in examples)
    if examples != others or operation.params["feature_group_count"] % number:
        return None
    size = operation.outputs[0].shape[numbers.out_spec[1]]
    return merge([*examples, *plain_axis(size // number)])
