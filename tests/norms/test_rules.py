"""Every way of every rule against the operation's own derivative, one group at a time."""

import dataclasses
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from clars_optax.norms._rules import (
    Platform,
    Way,
    _conv,
    _elementwise,
    _patches,
    cheapest,
    find_rule,
)
from clars_optax.norms._rules._geometry import Window
from clars_optax.norms._rules._ways import Squares

SCALE = 3.0
DEVICE = Platform(1.0, 1.0, chunk_bytes=2**20, splits_sums=True, kernels="gpu", interprets=True)
CPU = Platform(1.0, 1.0, chunk_bytes=2**20)
DENSE = {"dimension_numbers": (((2,), (0,)), ((), ())), "precision": None}


def check(operation, w, x, position, group_size, chunk_bytes, definition=None):
    """All ways for `operation(w, x)`, where `x` is `[N, ...]` and so is the result.

    The operation is its own definition, unless XLA's way to write loops in tests has it wrong.
    """
    definition = definition or operation
    operands = (w, x) if position == 0 else (x, w)
    traced = jax.make_jaxpr(lambda *operands: operation(*operands))(*operands)
    (equation,) = traced.eqns
    y = operation(*operands)
    g = jnp.asarray(np.random.default_rng(0).normal(size=y.shape), y.dtype)

    def weight_gradient(x, g):
        def of_weight(w):
            return definition(w, x) if position == 0 else definition(x, w)

        return jax.vjp(of_weight, w)[1](g)[0]

    shapes = [value.aval.shape for value in (*equation.invars, *equation.outvars)]
    rule = find_rule(equation.primitive.name, equation.params, shapes, position)
    ways = []

    @jax.jit
    def everything(x, g):
        starts = range(0, len(x), group_size)
        rows = [weight_gradient(x[i : i + group_size], g[i : i + group_size]) for i in starts]
        # Each example by itself, as the engine hands them over: the batch is out of its axis.
        single = x[:, None], g[:, None]
        grouped = (z.reshape(-1, group_size, *z.shape[1:]) for z in single)
        device = dataclasses.replace(DEVICE, chunk_bytes=chunk_bytes)
        ways.extend(rule.ways(*grouped, SCALE, device))
        alone = rule.gradient(*(z[:, None] for z in single))
        return jnp.stack(rows), weight_gradient(x, g), alone, [way.run() for way in ways]

    rows, total, alone, found = everything(x, g)
    rows = np.asarray(rows, np.float64).reshape(len(rows), -1)
    expected = np.sum((SCALE * rows) ** 2, axis=1)
    # Where all are zero, Pixel-Gram has what is left of the mean that it takes off and adds again.
    size = expected.max() or 10 * SCALE**2
    for squares, gradient in found:
        np.testing.assert_allclose(squares, expected, rtol=1e-4, atol=1e-5 * size)
        if gradient is not None:
            np.testing.assert_allclose(gradient, total, rtol=1e-4, atol=1e-4)
    if alone is not None:
        np.testing.assert_allclose(alone, total, rtol=1e-4, atol=1e-4)
    return ways


@st.composite
def convolutions(draw):
    rank = draw(st.integers(1, 3))

    def per_axis(strategy):
        return draw(st.lists(strategy, min_size=rank, max_size=rank))

    taps = per_axis(st.integers(1, 3))
    dilations = per_axis(st.integers(1, 2))
    inner_dilations = per_axis(st.integers(1, 2))
    pixels = per_axis(st.integers(2, 5))
    padding = [(draw(st.integers(-1, 2)), draw(st.integers(-1, 2))) for _ in range(rank)]
    for axis in range(rank):
        length = (pixels[axis] - 1) * inner_dilations[axis] + 1 + sum(padding[axis])
        hypothesis.assume(length >= (taps[axis] - 1) * dilations[axis] + 1)
    blocks = draw(st.sampled_from([1, 1, 2, 3]))
    inner, outer = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    orders = [draw(st.permutations(range(1, rank + 2))) for _ in range(2)]
    kernel_order = draw(st.permutations(range(rank + 2)))
    group_size = draw(st.sampled_from([1, 2]))
    num_examples = group_size * draw(st.integers(1, 5))
    image = [num_examples, blocks * inner, *pixels]
    kernel = [blocks * outer, inner, *taps]
    specs = [(0, *orders[0]), tuple(kernel_order), (0, *orders[1])]
    rng = np.random.default_rng(draw(st.integers(0, 9)))

    def laid_out(sizes, spec):
        shape = [0] * len(sizes)
        for size, axis in zip(sizes, spec, strict=True):
            shape[axis] = size
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    def operation(x, w):
        return jax.lax.conv_general_dilated(
            x,
            w,
            per_axis_strides,
            padding,
            lhs_dilation=inner_dilations,
            rhs_dilation=dilations,
            dimension_numbers=jax.lax.ConvDimensionNumbers(*specs),
            feature_group_count=blocks,
            precision="highest",
        )

    per_axis_strides = per_axis(st.integers(1, 2))
    chunk_bytes = draw(st.sampled_from([1, 300, 2**20]))
    return operation, laid_out(kernel, specs[1]), laid_out(image, specs[0]), group_size, chunk_bytes


@hypothesis.settings(
    max_examples=20, deadline=None, phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate]
)
@hypothesis.given(convolutions(), st.sampled_from([1, 16]))
def test_convolutions(case, few_channels):
    operation, w, x, group_size, chunk_bytes = case
    # The kernel has their taps together or one by one.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_conv, "_FEW_CHANNELS", few_channels)
        check(operation, w, x, 1, group_size, chunk_bytes)


def test_a_kernel_that_meets_only_padding_has_norms_of_zero():
    def operation(x, w):
        # The stride steps from one of the zeros between the pixels to the next.
        return jax.lax.conv_general_dilated(
            x, w, (2,), [(-1, 2)], lhs_dilation=(2,), rhs_dilation=(2,), precision="highest"
        )

    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in [(4, 2, 3), (2, 2, 2)])
    assert not operation(x, w).any()
    assert len(check(operation, w, x, 1, 2, 300)) == 4


def test_what_no_tap_meets_stays_out():
    def operation(x, w):
        # The stride steps over the last pixel, and over one in two of the others.
        return jax.lax.conv_general_dilated(x, w, (2,), [(0, 0)], precision="highest")

    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in [(4, 2, 6), (3, 2, 1)])
    check(operation, w, x, 1, 2, 2**20)


@pytest.mark.parametrize("size", [(8, 6), (9, 7)])
def test_patches_that_tile_an_image(size):
    def operation(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (4, 3), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
        )

    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in [(4, *size, 2), (4, 3, 2, 5)])
    windows = [Window(n, 2, k, stride=k) for n, k in zip(size, (4, 3), strict=True)]
    unfolded = jax.make_jaxpr(lambda x: _patches.unfolded(windows, x, blocks=1))(x)
    assert "concatenate" not in str(unfolded)
    check(operation, w, x, 1, 2, 2**20)


def test_a_3x3_convolution_has_all_ways():
    def operation(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
        )

    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in [(7, 5, 4, 3), (3, 3, 3, 2)])
    # Gram, Pixel-Gram, Direct, Direct split along each axis, and the kernel; seven groups in chunks
    # of some.
    ways = check(operation, w, x, 1, 1, 4000)
    assert len(ways) == 6
    assert sum(way.saved > 0 for way in ways) == 4


@pytest.mark.parametrize("group_size", [1, 2])
@pytest.mark.parametrize("chunk_bytes", [700, 2**20])
@pytest.mark.parametrize(
    ("formula", "w_shape", "x_shape", "position"),
    [
        ("nd,dp->np", (4, 5), (6, 4), 1),
        ("ntd,dp->ntp", (4, 5), (6, 3, 4), 1),
        ("nthd,hdp->ntp", (2, 3, 5), (6, 4, 2, 3), 1),
        ("ntd,pd->ntp", (5, 4), (6, 3, 4), 1),
        ("ntd,dhk->nthk", (4, 2, 3), (6, 3, 4), 1),
    ],
)
def test_products(formula, w_shape, x_shape, position, group_size, chunk_bytes):
    rng = np.random.default_rng(0)
    w, x = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in (w_shape, x_shape))
    left, right = formula.split("->")[0].split(",")
    inner = [letter for letter in left if letter in right]
    numbers = (
        ([left.index(letter) for letter in inner], [right.index(letter) for letter in inner]),
        ((), ()),
    )

    def operation(x, w):
        return jax.lax.dot_general(x, w, numbers, precision="highest")

    check(operation, w, x, position, group_size, chunk_bytes)


@pytest.mark.parametrize("group_size", [1, 2])
@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("primitive", [jax.lax.add, jax.lax.sub, jax.lax.mul])
@pytest.mark.parametrize(
    ("w_shape", "x_shape"),
    [
        ((1, 5), (6, 5)),
        ((1, 3, 4), (6, 3, 4)),
        ((1, 1, 4), (6, 3, 4)),
        ((1, 1, 4), (6, 48, 4)),  # of some groups, too many positions for one sum
        ((1, 3, 1), (6, 3, 4)),
        ((1, 1, 4), (6, 3, 1)),
        ((1, 1, 4), (6, 1, 1)),
        ((1, 3, 1), (6, 1, 4)),
        ((1, 1), (6, 1)),
    ],
)
def test_biases_and_scales(primitive, w_shape, x_shape, position, group_size):
    rng = np.random.default_rng(0)
    w, x = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in (w_shape, x_shape))
    check(primitive, w, x, position, group_size, 2**20)


@pytest.mark.parametrize(
    ("num_positions", "size"), [(196, 392), (784, 784), (3136, 1568), (12_544, 3136)]
)
def test_sums_are_cut_as_xla_cuts_those_of_a_batch(num_positions, size):
    # As found in ResNet-50 compiled for an H200, 256 examples; two of the smallest make one sum.
    assert num_positions // _elementwise.num_parts(256, num_positions) == min(size, num_positions)


@pytest.mark.parametrize("mode", ["fill", "clip", "promise_in_bounds"])
@pytest.mark.parametrize("group_size", [1, 3])
def test_embeddings(mode, group_size):
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(4, 5)), jnp.float32)
    # Few entries, so that an example looks some up more than once; two are out of bounds.
    tokens = jnp.asarray(rng.integers(0, 4, size=(6, 7, 1)), jnp.int32).at[1, 2].set(9)
    tokens = tokens.at[4, 0].set(-3)
    numbers = jax.lax.GatherDimensionNumbers(
        offset_dims=(2,), collapsed_slice_dims=(0,), start_index_map=(0,)
    )

    def operation(table, tokens):
        return jax.lax.gather(table, tokens, numbers, (1, 5), mode=mode)

    ways = check(operation, table, tokens, 0, group_size, 2**20)
    assert len(ways) == 2


def test_tables_longer_than_their_indices_can_count():
    table = jnp.arange(300.0).reshape(300, 1)
    tokens = jnp.array([[[3], [3], [250]], [[0], [1], [2]]], jnp.uint8)
    numbers = jax.lax.GatherDimensionNumbers(
        offset_dims=(2,), collapsed_slice_dims=(0,), start_index_map=(0,)
    )

    def operation(table, tokens):
        return jax.lax.gather(table, tokens, numbers, (1, 1))

    def definition(table, tokens):
        return operation(table, tokens.astype(jnp.int32))

    check(operation, table, tokens, 0, 1, 2**20, definition)


@pytest.mark.parametrize("kind", ["dense", "conv"])
def test_inputs_with_a_large_mean(kind):
    rng = np.random.default_rng(0)
    x = 100 + rng.normal(size=(3, 1, 6, 6, 5))
    g = rng.normal(size=(3, 1, 6, 6, 4))
    # As before a normalisation layer, the cotangents of an example add up to almost nothing.
    g -= g.mean(axis=(2, 3), keepdims=True)
    if kind == "dense":
        x, g = (z.reshape(3, 1, 36, -1) for z in (x, g))
        rule = find_rule("dot_general", DENSE, [(3, 36, 5), (5, 4), (3, 36, 4)], 1)
        patches = x
    else:
        w = jnp.zeros((3, 3, 5, 4))
        jaxpr = jax.make_jaxpr(
            lambda x, w: jax.lax.conv_general_dilated(
                x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        )(jnp.zeros((3, 6, 6, 5)), w)
        rule = find_rule(
            "conv_general_dilated",
            jaxpr.eqns[0].params,
            [(3, 6, 6, 5), w.shape, (3, 6, 6, 4)],
            1,
        )
        padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)))
        patches = np.concatenate(
            [padded[:, :, i : i + 6, j : j + 6] for i in range(3) for j in range(3)], axis=-1
        ).reshape(3, 1, 36, -1)
    rows = np.einsum("nbtd,nbtp->ndp", patches, g.reshape(3, 1, 36, 4))
    expected = np.sum(rows**2, axis=(1, 2))
    arrays = [jnp.asarray(z[:, :, None], jnp.float32) for z in (x, g)]
    if kind == "conv":
        arrays = [z.reshape(3, 1, 1, 6, 6, -1) for z in arrays]
    for way in rule.ways(*arrays, 1.0, DEVICE):
        squares, _ = jax.jit(way.run)()
        np.testing.assert_allclose(squares, expected, rtol=3e-5)


def test_float16_does_not_overflow():
    # The cotangents fit into float16, N times as much does not.
    rule = find_rule("dot_general", DENSE, [(64, 2, 3), (3, 4), (64, 2, 4)], 1)
    x, g = jnp.ones((64, 1, 2, 3), jnp.float16), jnp.full((64, 1, 2, 4), 2e3, jnp.float16)
    for way in rule.ways(x[:, None], g[:, None], 64.0, DEVICE):
        squares, _ = jax.jit(way.run)()
        np.testing.assert_allclose(squares, 12 * (64 * 4e3) ** 2, rtol=1e-3)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_sums_of_low_precision_are_float32(dtype):
    """The products of a group are added up, squared and added up without being rounded."""
    rng = np.random.default_rng(0)
    x, g = (jnp.asarray(rng.normal(size=(3, 1, 40, width)), dtype) for width in (8, 6))
    rule = find_rule("dot_general", DENSE, [(3, 40, 8), (8, 6), (3, 40, 6)], 1)
    rows = np.einsum("nbti,nbto->nio", np.float64(x), np.float64(g))
    (direct,) = (way for way in rule.ways(x[:, None], g[:, None], 1.0, CPU) if way.name == "Direct")
    squares, gradient = jax.jit(direct.run)()
    np.testing.assert_allclose(squares, np.sum(rows**2, axis=(1, 2)), rtol=1e-5)
    np.testing.assert_allclose(gradient, rows.sum(0), rtol=1e-4, atol=1e-4)


def test_no_rule_where_there_is_none():
    gather = {"dimension_numbers": None}
    assert find_rule("exp", {}, [(2,), (2,)], 0) is None
    assert find_rule("mul", {}, [(), (6, 2), (6, 2)], 0) is None
    assert find_rule("gather", gather, [(4, 5), (6, 1), (6, 5)], 1) is None
    assert find_rule("conv_general_dilated", {"batch_group_count": 1}, [], 0) is None


def test_the_cheapest_way():
    def way(**costs):
        costs = {"name": "", "flops": 0.0, "small_flops": 0.0, "moved": 0.0, **costs}
        return Way(run=lambda: Squares(jnp.zeros(1), None), **costs)

    device = Platform(flops_per_byte=10.0, small_factor=2.0, chunk_bytes=1)
    direct = way(flops=100.0, moved=3.0, saved=100.0)
    gram = way(small_flops=20.0)
    # 30 against 40 operations; 130 against 40 where the gradient is not needed.
    assert cheapest([gram, direct], device, needs_gradient=True) is direct
    assert cheapest([gram, direct], device, needs_gradient=False) is gram
    patches, rows = way(unfolded=4.0), way(moved=5.0)
    assert cheapest([rows, patches], device, needs_gradient=True) is patches
    dear = dataclasses.replace(device, unfold_factor=2.0)
    assert cheapest([rows, patches], dear, needs_gradient=True) is rows
    # Arithmetic that is ten times as fast in large products only makes bytes dear.
    costly = Platform(flops_per_byte=math.inf, small_factor=2.0, chunk_bytes=1)
    assert cheapest([gram, way(flops=1.0, moved=1.0)], costly, needs_gradient=True) is gram
