"""The layouts that are inferred, against where the examples really are.

An array whose entries are the indices of their own examples goes through the same operations.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clars_optax.norms._batch_axes import follow
from clars_optax.norms._layout import Factor, Layout, leading, split_examples, split_groups
from clars_optax.norms._program import Program


def inferred(function, shape):
    """The layout of `function(x)` for a batch `x` of the shape."""
    jaxprs = [
        jax.make_jaxpr(function)(jax.ShapeDtypeStruct((n, *shape[1:]), jnp.float32))
        for n in (shape[0], 2 * shape[0])
    ]
    program, doubled = (Program.of_loss(jaxpr, 0) for jaxpr in jaxprs)
    layouts, _ = follow(program, doubled, {program.inputs[0]: leading(shape)}, shape[0])
    return layouts[program.outputs[0]]


def examples_of(layout):
    """The index of the example at every position that a layout speaks of."""
    total = np.zeros(())
    for axis in layout.axes:
        places = np.zeros(1, int)
        for factor in axis:
            places = np.add.outer(places, np.arange(factor.size) * factor.stride).ravel()
        total = np.add.outer(total, places)
    return total


def indices(shape):
    return np.broadcast_to(np.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1)), shape)


@st.composite
def shape_changes(draw):
    """A function that moves an array of shape [N, 2, 3] about, described by its steps."""
    num_examples = draw(st.sampled_from([2, 3, 4, 6]))
    steps = draw(
        st.lists(
            st.sampled_from(
                [
                    *["transpose", "merge", "split", "expand", "views", "first_view", "flip"],
                    *["repeat", "column_major"],
                ]
            ),
            min_size=1,
            max_size=6,
        )
    )
    numbers = [draw(st.integers(0, 5)) for _ in steps]

    def function(x):
        n = x.shape[0]
        for step, number in zip(steps, numbers, strict=True):
            axis = number % x.ndim
            if step == "transpose":
                x = jnp.moveaxis(x, axis, 0)
            elif step == "merge" and x.ndim > 1:
                x = x.reshape(-1, *x.shape[2:])
            elif step == "split" and x.shape[0] % n == 0 and x.shape[0] > n:
                x = x.reshape(n, -1, *x.shape[1:])
            elif step == "expand":
                x = jnp.expand_dims(x, axis)
            elif step == "views":
                x = jnp.concatenate([x, jnp.abs(x)], axis=axis)
            elif step == "first_view":
                x = jnp.split(jnp.concatenate([x, x, x], axis=axis), 3, axis=axis)[1]
            elif step == "flip" and x.shape[axis] in (2, 3) and n not in (2, 3):
                x = jnp.flip(x, axis)
            elif step == "repeat":
                x = jnp.broadcast_to(x, (2, *x.shape))
            elif step == "column_major" and x.ndim > 1:
                x = x.reshape(-1, *x.shape[2:], order="F")
        return x

    return (num_examples, 2, 3), function


@settings(deadline=None, max_examples=60)
@given(shape_changes())
def test_layout_says_where_the_examples_are(case):
    shape, function = case
    layout = inferred(function, shape)
    if layout.problem is not None:
        return  # refused where a parameter meets it
    where = np.asarray(jax.jit(function)(jnp.asarray(indices(shape), jnp.float32)))
    np.testing.assert_array_equal(examples_of(layout), where)


def halves_joined(x):
    return jnp.concatenate([x[: len(x) // 2], x[len(x) // 2 :]], 1)


def doubled(x):
    """Two views, one behind the other."""
    return jnp.concatenate([x, 2 * x])


def order(x):
    """An order for each example's two views, side by side."""
    return jnp.repeat(jnp.argsort(x, 1), 2, 0)


def pooled(x, window):
    return jax.lax.reduce_window(x, 0.0, jax.lax.add, window, (1, 1), "VALID")


@pytest.mark.parametrize(
    ("function", "axes"),
    [
        (lambda x: x.reshape(-1, 3), (((6, 1), (2, 0)), ((3, 0),))),
        (lambda x: x.swapaxes(0, 1).reshape(-1, 3), (((2, 0), (6, 1)), ((3, 0),))),
        (lambda x: jnp.concatenate([x, x, x]), (((3, 0), (6, 1)), ((2, 0),), ((3, 0),))),
        (lambda x: x.reshape(-1, 3, 2, 3), (((2, 3),), ((3, 1),), ((2, 0),), ((3, 0),))),
        (lambda x: x.reshape(2, -1, 2, 3), (((2, 3),), ((3, 1),), ((2, 0),), ((3, 0),))),
        (lambda x: x.reshape(-1, 3)[::2], (((6, 1),), ((3, 0),))),
        (lambda x: x.mean((1, 2)), (((6, 1),),)),
        (lambda x: x.reshape(-1, 3, 6).mean(1), (((2, 3),), ((6, 0),))),
        (lambda x: jnp.einsum("nij,nkj->nik", x, x), (((6, 1),), ((2, 0),), ((2, 0),))),
        (lambda x: x.mean(0), (((2, 0),), ((3, 0),))),
        (lambda x: x[::-1], (((6, 1),), ((2, 0),), ((3, 0),))),
        (lambda x: jnp.roll(x, 2, 0), (((6, 1),), ((2, 0),), ((3, 0),))),
        (lambda x: x[:2], (((2, 0),), ((2, 0),), ((3, 0),))),
        (lambda x: x - x[-1], (((6, 1),), ((2, 0),), ((3, 0),))),
        (lambda x: jnp.stack([x, x], 1), (((6, 1),), ((2, 0),), ((2, 0),), ((3, 0),))),
        (lambda x: jax.checkpoint(jnp.sin)(x).T, (((3, 0),), ((2, 0),), ((6, 1),))),
        (lambda x: jax.lax.reshape(x, (18, 2), (0, 2, 1)), (((6, 1), (3, 0)), ((2, 0),))),
        (lambda x: x.ravel("F"), (((6, 0), (6, 1)),)),
        (lambda x: jnp.sort(x.reshape(-1, 3)), (((6, 1), (2, 0)), ((3, 0),))),
        (lambda x: jax.lax.top_k(x.reshape(-1, 3), 2)[1], (((6, 1), (2, 0)), ((2, 0),))),
        (lambda x: jax.lax.approx_max_k(x.reshape(-1, 3), 1)[0], (((6, 1), (2, 0)), ())),
        (lambda x: jnp.fft.rfft(x.reshape(-1, 3)).real, (((6, 1), (2, 0)), ((2, 0),))),
        (
            lambda x: jnp.linalg.svd(jnp.tile(x, 2).reshape(-1, 2, 3))[1],
            (((6, 1), (2, 0)), ((2, 0),)),
        ),
        (lambda x: pooled(x.reshape(-1, 3), (1, 3)), (((6, 1), (2, 0)), ())),
        (
            lambda x: jax.lax.scan(lambda c, _: (c + x, c.T), 0 * x, None, 4)[1],
            (((4, 0),), ((3, 0),), ((2, 0),), ((6, 1),)),
        ),
    ],
)  # fmt: skip
def test_known_layouts(function, axes):
    expected = tuple(tuple(Factor(*factor) for factor in axis) for axis in axes)
    assert inferred(function, (6, 2, 3)).axes == expected


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (lambda x: x[: x.shape[0] // 2], "part of the batch"),
        (lambda x: x[1:], "part of the batch"),
        (lambda x: x.reshape(-1, 3)[::-1], "reversed"),
        (lambda x: jnp.roll(x.reshape(-1, 3), 1, 0), "mixed with something else"),
        (lambda x: jnp.sort(x.reshape(-1, 3), 0), "merged with other axes"),
        (lambda x: pooled(x.reshape(-1, 3), (3, 1)), "merged with other axes"),
        (lambda x: halves_joined(jnp.repeat(x, 2, 0)), "part of the batch"),
        (lambda x: jnp.take_along_axis(doubled(x), order(x), 1), "two arrangements"),
        (lambda x: jnp.pad(x, ((1, 0), (0, 0), (0, 0))), "padded"),
        (lambda x: jnp.concatenate([x, jnp.ones((1, 2, 3))]), "concatenated with something else"),
        (lambda x: jax.lax.conv(x.T[:1], jnp.ones((1, 2, 1)), (1,), "SAME"), "spatial"),
    ],
)  # fmt: skip
def test_unknown_layouts(function, problem):
    assert problem in inferred(function, (6, 2, 3)).problem


def test_reshape_that_fits_by_coincidence():
    """[2 N] as [N, 2] has the views on its first axis if N is 2, and cuts through if it is 3."""
    layout = inferred(lambda x: jnp.concatenate([x, x]).reshape(len(x), -1, 5), (2, 5))
    assert "cuts across" in layout.problem


def test_crossed():
    layout = inferred(lambda x: x[:, 0] @ x[:, 0].T, (6, 2, 3))
    assert layout.is_crossed
    assert not leading((6, 2, 3)).is_crossed


@st.composite
def whole_layouts(draw):
    """A layout in which one factor holds the batch, at any place of any axis."""
    num_examples = draw(st.sampled_from([4, 6, 12]))
    sizes = draw(st.lists(st.lists(st.integers(1, 3), max_size=2), min_size=1, max_size=3))
    axes = [[Factor(size, 0) for size in axis if size > 1] for axis in sizes]
    axis = draw(st.integers(0, len(axes) - 1))
    place = draw(st.integers(0, len(axes[axis])))
    axes[axis].insert(place, Factor(num_examples, 1))
    return Layout(tuple(map(tuple, axes))), num_examples


@settings(deadline=None, max_examples=40)
@given(whole_layouts(), st.sampled_from([1, 2]), st.integers(1, 2))
def test_cutting_into_groups_and_examples(case, group_size, num_groups):
    layout, num_examples = case
    where = jnp.asarray(examples_of(layout))
    # In one program: each operation by itself would be compiled for each shape.
    groups, rest, single = jax.jit(
        lambda x: (
            *split_groups(x, layout, num_groups=num_groups, group_size=group_size),
            split_examples(x, layout, num_examples),
        )
    )(where)
    assert groups.shape == (num_groups, *layout.local_shape(group_size))
    for index, group in enumerate(np.asarray(groups)):
        members = set(range(index * group_size, (index + 1) * group_size))
        assert set(group.ravel().astype(int)) == members
    taken = num_groups * group_size
    if taken == num_examples:
        assert rest is None
    else:
        assert rest.shape == layout.local_shape(num_examples - taken)
        assert set(np.asarray(rest).ravel().astype(int)) == set(range(taken, num_examples))
    flat = np.asarray(single).reshape(num_examples, -1)
    np.testing.assert_array_equal(flat, np.arange(num_examples)[:, None] + np.zeros_like(flat))
    assert math.prod(single.shape) == where.size
