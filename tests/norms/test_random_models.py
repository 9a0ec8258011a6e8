"""Models drawn by hypothesis: the fast rules, the generic method and the definition agree.

The definition is a copy of the parameters for every example, mapped over with an axis name through
which BatchNorm sees the batch.

More models than the default run has time for:

    RANDOM_MODELS=300 python -m pytest tests/norms/test_random_models.py
"""

import math
import os
import unittest.mock
from typing import Any, NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clars_optax
from clars_optax.norms._rules import cheapest

MAX_EXAMPLES = int(os.environ.get("RANDOM_MODELS", "10"))
# No explanation of a failure: it takes long, and a model is small when it is printed.
PHASES = [phase for phase in hypothesis.Phase if phase != hypothesis.Phase.explain]

# A layer is a tuple that says what it is, so that hypothesis prints a model in full. It works on
# values [N, ..., channels]; `shapes` are those of its parameters for one example's input, and
# `apply` knows the batch's axis by name only where each example has parameters of its own.


class Dense(NamedTuple):
    """A matrix product over the channels, in the ways in which people write it."""

    width: int
    how: str
    bias: bool

    def shapes(self, *, channels, **_):
        matrix = (self.width, channels) if self.how == "kernel first" else (channels, self.width)
        return {"w": matrix} | ({"b": (self.width,)} if self.bias else {})

    def apply(self, p, h, axis_name):
        w, b = p["w"], p.get("b", jnp.zeros((), h.dtype))
        match self.how:
            case "matmul":
                return h @ w + b
            case "kernel first":
                # The examples come out on the last axis.
                return jnp.moveaxis(jnp.tensordot(w, h, (1, h.ndim - 1)), 0, -1) + b
            case "batch outside time":
                return (h.reshape(-1, h.shape[-1]) @ w + b).reshape(*h.shape[:-1], -1)
            case "batch inside time":
                h = jnp.moveaxis(h, 0, -2)
                merged = h.reshape(-1, h.shape[-1]) @ w + b
                return jnp.moveaxis(merged.reshape(*h.shape[:-1], -1), -2, 0)
            case "float32 result":
                exact = jnp.dot(h, w, preferred_element_type=jnp.float32)
                return (exact + b.astype(jnp.float32)).astype(h.dtype)
            case "standardised":
                return h @ standardised(w, (0,)) + b
            case "twice":
                h = jnp.tanh(h @ w + b)
                return jnp.tanh(h @ w.T) @ w + b
        raise ValueError(self.how)


class Heads(NamedTuple):
    """Two axes made of one, a matrix for every head, and two axes contracted at once."""

    heads: int
    width: int

    def shapes(self, *, channels, **_):
        one = (channels, self.heads, self.width)
        return {"in": one, "head": (self.heads, self.width, self.width), "out": one}

    def apply(self, p, h, axis_name):
        h = jnp.einsum("n...d,dhe->nh...e", h, p["in"])
        h = jnp.einsum("nh...e,hef->nh...f", jnp.tanh(h), p["head"])
        return jnp.einsum("nh...f,dhf->n...d", jnp.tanh(h), p["out"])


class Attention(NamedTuple):
    """Attention of one head over all positions; one matrix for queries and keys."""

    def shapes(self, *, channels, **_):
        return {"qk": (channels, 3), "v": (channels, channels)}

    def apply(self, p, h, axis_name):
        x = h.reshape(h.shape[0], -1, h.shape[-1])
        q, k, v = x @ p["qk"], x[..., ::-1] @ p["qk"], x @ p["v"]
        return (jax.nn.softmax(jnp.einsum("ntd,nsd->nts", q, k)) @ v).reshape(h.shape)


class Flatten(NamedTuple):
    """All axes of an example contracted at once."""

    width: int

    def shapes(self, *, spatial, channels):
        return {"w": (*spatial, channels, self.width)}

    def apply(self, p, h, axis_name):
        return jnp.tensordot(h, p["w"], h.ndim - 1)


class Elementwise(NamedTuple):
    """A scale or a bias: one for all, per channel, or per position (a position table)."""

    is_scale: bool
    extent: str
    is_spread: bool

    def shapes(self, *, spatial, channels):
        extents = {"scalar": (), "channel": (channels,), "position": (*spatial, channels)}
        return {"s": extents[self.extent]}

    def apply(self, p, h, axis_name):
        s = jnp.broadcast_to(p["s"], h.shape) if self.is_spread else p["s"]
        return h * (1 + s) if self.is_scale else h + s


class ClassToken(NamedTuple):
    """A parameter as one more position of every example."""

    def shapes(self, *, channels, **_):
        return {"token": (channels,)}

    def apply(self, p, h, axis_name):
        token = jnp.broadcast_to(p["token"], (*h.shape[:-2], 1, h.shape[-1]))
        return jnp.concatenate([token, h], axis=-2)


class BatchNorm(NamedTuple):
    """With the statistics of the batch: it couples the examples."""

    def shapes(self, *, channels, **_):
        return {"scale": (channels,), "bias": (channels,)}

    def apply(self, p, h, axis_name):
        def mean(x):
            x = x.astype(jnp.float32).mean(range(h.ndim - 1))
            return (x if axis_name is None else jax.lax.pmean(x, axis_name)).astype(h.dtype)

        centred = h - mean(h)
        return centred * jax.lax.rsqrt(mean(centred**2) + 0.1) * (1 + p["scale"]) + p["bias"]


class LayerNorm(NamedTuple):
    """Over the channels, with a scale and a bias."""

    def shapes(self, *, channels, **_):
        return {"scale": (channels,), "bias": (channels,)}

    def apply(self, p, h, axis_name):
        return standardised(h, (-1,)) * (1 + p["scale"]) + p["bias"]


class Convolution(NamedTuple):
    """One to three dimensions; where the axes lie in images, kernel and result is drawn too."""

    features_per_group: int
    groups: int
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    padding: Any
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    layouts: tuple[str, str, str]
    is_standardised: bool
    is_used_twice: bool

    def shapes(self, *, channels, **_):
        sizes = dict(zip("DHW", self.kernel, strict=False))
        sizes |= {"I": channels // self.groups, "O": self.features_per_group * self.groups}
        return {"k": tuple(sizes[axis] for axis in self.layouts[1])}

    def apply(self, p, h, axis_name):
        axes = "N" + "DHW"[: len(self.kernel)] + "C"
        images, kernel, result = self.layouts
        k = p["k"]
        if self.is_standardised:
            k = standardised(k, tuple(i for i, axis in enumerate(kernel) if axis != "O"))

        def convolved(h):
            h = jax.lax.conv_general_dilated(
                h.transpose([axes.index(axis) for axis in images]),
                k,
                self.strides,
                self.padding,
                self.lhs_dilation,
                self.rhs_dilation,
                dimension_numbers=self.layouts,
                feature_group_count=self.groups,
            )
            return h.transpose([result.index(axis) for axis in axes])

        return convolved(h) + convolved(h[..., ::-1] ** 2) if self.is_used_twice else convolved(h)


class TransposedConvolution(NamedTuple):
    """As the libraries have it: the kernel may be mirrored, with its channels exchanged."""

    features: int
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    padding: str
    transpose_kernel: bool

    def shapes(self, *, channels, **_):
        ends = (channels, self.features)
        return {"k": (*self.kernel, *(ends[::-1] if self.transpose_kernel else ends))}

    def apply(self, p, h, axis_name):
        spatial = "DHW"[: len(self.kernel)]
        return jax.lax.conv_transpose(
            h,
            p["k"],
            self.strides,
            self.padding,
            dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
            transpose_kernel=self.transpose_kernel,
        )


def standardised(x, axes):
    x = x - x.mean(axes, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(axes, keepdims=True) + 0.1)


class Model(NamedTuple):
    """Layers, on a batch of images or of vectors, or of tokens if there is a vocabulary."""

    layers: tuple[Any, ...]
    example_shape: tuple[int, ...]
    vocabulary: int | None = None
    look_up: str = "index"
    is_tied: bool = False
    dtype: str = "float32"

    def shapes(self):
        """The shapes of the parameters, and that of one example's result."""
        parameters, shape = [], self.example_shape
        if self.vocabulary is not None:
            parameters.append({"table": (self.vocabulary, shape[-1])})
        for layer in self.layers:
            named = layer.shapes(spatial=shape[:-1], channels=shape[-1])
            parameters.append(named)
            shape = jax.eval_shape(
                lambda p, h, layer=layer: layer.apply(p, h, None), zeros(named), zeros((1, *shape))
            ).shape[1:]
        return parameters, shape

    def make(self, num_examples):
        """Parameters and a batch."""
        rng = np.random.default_rng(0)

        def normal(shape):
            fan_in = max(1, math.prod(shape[:-1]))
            return jnp.asarray(rng.normal(size=shape) / math.sqrt(fan_in), jnp.float32)

        params = jax.tree.map(normal, self.shapes()[0], is_leaf=is_shape)
        if self.vocabulary is None:
            return params, jnp.asarray(
                rng.normal(size=(num_examples, *self.example_shape)), jnp.float32
            )
        positions = (num_examples, *self.example_shape[:-1])
        return params, jnp.asarray(rng.integers(self.vocabulary, size=positions))

    def losses(self, params, batch, axis_name=None):
        """One loss per example, in float32."""
        params = jax.tree.map(lambda p: p.astype(self.dtype), params)
        if self.vocabulary is None:
            h, table, layers = batch.astype(self.dtype), None, params
        else:
            table, layers = params[0]["table"], params[1:]
            match self.look_up:
                case "index":
                    h = table[batch]
                case "take":
                    h = jnp.take(table, batch, axis=0)
                case "one hot":
                    h = jax.nn.one_hot(batch, self.vocabulary, dtype=self.dtype) @ table
        for layer, p in zip(self.layers, layers, strict=True):
            h = jnp.tanh(layer.apply(p, h, axis_name))
        if self.is_tied:
            h = jax.nn.log_softmax(h @ table.T)
        h = h.reshape(h.shape[0], -1).astype(jnp.float32)
        return jnp.sum(jnp.linspace(0.5, 1.5, h.shape[1]) * h**2, axis=1)


def is_shape(x):
    return isinstance(x, tuple)


def zeros(shapes):
    return jax.tree.map(np.zeros, shapes, is_leaf=is_shape)


class Options(NamedTuple):
    """`way` is which of the ways of every rule to take, modulo their number; None: the cheapest."""

    num_examples: int
    group_size: int
    num_norm_examples: int | None
    loss_reduction: str
    way: int | None


@st.composite
def options(draw):
    num_examples = draw(st.sampled_from([2, 3, 4, 6]))
    group_size = draw(st.sampled_from([b for b in (1, 2, 3, 4, 6) if num_examples % b == 0]))
    groups = draw(st.none() | st.integers(1, num_examples // group_size))
    return Options(
        num_examples,
        group_size,
        None if groups is None else groups * group_size,
        draw(st.sampled_from(["mean", "sum"])),
        draw(st.none() | st.integers(0, 4)),
    )


DENSE_WAYS = (
    "matmul",
    "kernel first",
    "batch outside time",
    "batch inside time",
    "float32 result",
    "standardised",
    "twice",
)
FULL = st.builds(Dense, st.sampled_from([3, 4, 6]), st.sampled_from(DENSE_WAYS), st.booleans())
HEADS = st.builds(Heads, st.integers(1, 3), st.integers(1, 3))
ELEMENTWISE = st.builds(
    Elementwise, st.booleans(), st.sampled_from(["scalar", "channel", "position"]), st.booleans()
)
NORMS = st.sampled_from([BatchNorm(), LayerNorm()])


def shape_after(layers, shape):
    return Model(tuple(layers), shape).shapes()[1]


@st.composite
def convolutions(draw, spatial, channels):
    """Those that fit: every kernel lies inside its padded image."""
    rank = len(spatial)

    def each(strategy):
        return tuple(draw(st.tuples(*[strategy] * rank)))

    kernel, rhs_dilation = each(st.integers(1, 3)), each(st.sampled_from([1, 1, 2]))
    groups = draw(st.sampled_from([1, channels, *(g for g in (2, 3) if channels % g == 0)]))
    lhs_dilation = each(st.sampled_from([1, 1, 2]))
    same = ["SAME", "SAME_LOWER"] if set(lhs_dilation) == {1} else []
    padding = draw(st.sampled_from(["explicit", *same]))
    if padding == "explicit":
        pads = []
        for size, k, before, between in zip(
            spatial, kernel, lhs_dilation, rhs_dilation, strict=True
        ):
            missing = (k - 1) * between + 1 - ((size - 1) * before + 1)
            low = draw(st.integers(-1, 2))
            pads.append((low, max(draw(st.integers(-1, 2)), missing - low)))
        padding = tuple(pads)
    axes = "DHW"[:rank]
    images, result = (
        draw(st.sampled_from([f"N{axes}C", f"NC{axes}", f"{axes}NC", f"C{axes}N"])) for _ in "ab"
    )
    kernel_layout = draw(st.sampled_from([f"{axes}IO", f"OI{axes}", f"{axes}OI", f"I{axes}O"]))
    return Convolution(
        draw(st.integers(1, 3)),
        groups,
        kernel,
        each(st.integers(1, 3)),
        padding,
        lhs_dilation,
        rhs_dilation,
        (images, kernel_layout, result),
        # Of two entries or fewer nothing much is left to standardise.
        math.prod(kernel) * channels // groups > 2 and draw(st.booleans()),
        draw(st.booleans()),
    )


@st.composite
def transposed_convolutions(draw, spatial, channels):
    rank = len(spatial)
    kernel, strides = (draw(st.tuples(*[st.integers(1, 3)] * rank)) for _ in "ab")
    padding = draw(st.sampled_from(["SAME", "VALID"]))
    return TransposedConvolution(
        draw(st.integers(1, 3)), kernel, strides, padding, draw(st.booleans())
    )


def dtypes():
    return st.sampled_from(["float32", "float32", "bfloat16"])


@st.composite
def convolutional(draw):
    rank = draw(st.integers(1, 3))
    spatial = tuple(draw(st.lists(st.integers(2, 5), min_size=rank, max_size=rank)))
    shape = (*spatial, draw(st.sampled_from([1, 2, 3, 4])))
    layers = []
    for _ in range(draw(st.integers(1, 2))):
        here = shape_after(layers, shape)
        kind = draw(st.sampled_from([convolutions, convolutions, transposed_convolutions]))
        layers.append(draw(kind(here[:-1], here[-1])))
        if math.prod(shape_after(layers, shape)) > 300:
            hypothesis.reject()
        layers += draw(st.lists(ELEMENTWISE | st.just(BatchNorm()), max_size=1))
    layers += draw(st.lists(st.builds(Flatten, st.integers(1, 4)), max_size=1))
    return Model(tuple(layers), shape, dtype=draw(dtypes()))


@st.composite
def dense(draw):
    rank = draw(st.integers(0, 2))
    spatial = tuple(draw(st.lists(st.integers(1, 4), min_size=rank, max_size=rank)))
    shape = (*spatial, draw(st.integers(3, 6)))
    some = FULL | FULL | HEADS | ELEMENTWISE | NORMS
    if rank:
        some |= st.just(ClassToken()) | st.just(Attention())
    layers = draw(st.lists(some, min_size=1, max_size=4))
    layers += draw(st.lists(st.builds(Flatten, st.integers(1, 4)), max_size=1))
    return Model(tuple(layers), shape, dtype=draw(dtypes()))


@st.composite
def tokens(draw):
    """With few words, which are repeated within an example and between examples."""
    model = draw(dense())
    if len(model.example_shape) == 1:
        model = model._replace(example_shape=(draw(st.integers(1, 4)), *model.example_shape))
    ends_as_it_began = shape_after(model.layers, model.example_shape)[-1] == model.example_shape[-1]
    return model._replace(
        vocabulary=draw(st.integers(2, 8)),
        look_up=draw(st.sampled_from(["index", "take", "one hot"])),
        is_tied=ends_as_it_began and draw(st.booleans()),
    )


# In bfloat16 the three ways round the same numbers at different places: each entry of a gradient
# by 2^-9 of its size, a few times over in the sums over uses and positions. A wrong rule is wrong
# by far more.
TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-2}


def check(model, options):
    num_examples, group_size, num_norm_examples, loss_reduction, which = options
    reduce = {"mean": jnp.mean, "sum": jnp.sum}[loss_reduction]
    params, batch = model.make(num_examples)

    def loss(params, batch):
        return reduce(model.losses(params, batch))

    def loss_of_copies(copies, batch):
        return reduce(
            jax.vmap(lambda p, x: model.losses(p, x[None], "batch")[0], axis_name="batch")(
                copies, batch
            )
        )

    def of_method(method):
        return clars_optax.value_and_grad_and_norms(
            loss,
            group_size=group_size,
            num_norm_examples=num_norm_examples,
            loss_reduction=loss_reduction,
            method=method,
        )

    def everything(params, batch):
        copies = jax.tree.map(lambda p: jnp.broadcast_to(p, (num_examples, *p.shape)), params)
        return (
            of_method("auto")(params, batch),
            of_method("generic")(params, batch),
            jax.value_and_grad(loss)(params, batch),
            jax.grad(loss_of_copies)(copies, batch),
        )

    def chosen(ways, device, **kwargs):
        return cheapest(ways, device, **kwargs) if which is None else ways[which % len(ways)]

    with unittest.mock.patch("clars_optax.norms._taps.cheapest", chosen):
        results = jax.jit(everything)(params, batch)
    auto, generic, plain, rows = jax.tree.map(np.asarray, results)

    scale = num_examples if loss_reduction == "mean" else 1
    rows = [scale * g.reshape(num_examples, -1).astype(np.float64) for g in jax.tree.leaves(rows)]
    # Rounding errors are relative to what is added up: gradients of examples, which may cancel in
    # a group, and cotangents, which may cancel in one leaf and be large in another.
    largest = np.array([np.max(np.linalg.norm(g, axis=1)) for g in rows])
    bounds = TOLERANCES[model.dtype] * (largest + 0.1 * np.max(largest)) + 1e-30
    addends = num_examples if loss_reduction == "sum" else 1
    kept = (num_norm_examples or num_examples) // group_size
    for value, grads, norms in (auto, generic):
        np.testing.assert_allclose(value, plain[0], rtol=TOLERANCES[model.dtype])
        leaves = (jax.tree.leaves(tree) for tree in (grads, plain[1], norms, generic[2]))
        for grad, plain_grad, norm, generic_norm, g, bound in zip(
            *leaves, rows, bounds, strict=True
        ):
            assert np.max(np.abs(grad - plain_grad)) <= bound * addends
            expected = np.linalg.norm(g.reshape(-1, group_size, g.shape[1]).mean(1), axis=1)
            assert norm.shape == (kept,)
            assert norm.dtype == np.float32
            assert np.max(np.abs(norm - generic_norm)) <= bound
            assert np.max(np.abs(norm - expected[:kept])) <= bound


@pytest.mark.parametrize(
    "models", [convolutional, dense, tokens], ids=lambda strategy: strategy.__name__
)
def test_rules_match_the_generic_method_and_the_definition(models):
    @hypothesis.settings(max_examples=MAX_EXAMPLES, deadline=None, phases=PHASES)
    @hypothesis.given(models(), options())
    def matches(model, options):
        for layer in model.layers:
            hypothesis.event(type(layer).__name__)
        check(model, options)

    matches()
