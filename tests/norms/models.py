"""Losses that couple no examples, so that `jax.vmap(jax.grad)` says what their norms are.

Each entry makes a loss `loss(params, x)` that is a mean over axis 0 of `x`, with its parameters and
a batch.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

NUM_EXAMPLES = 6


class Model(NamedTuple):
    loss: Callable[[Any, Any], jax.Array]
    params: Any
    batch: Any


MODELS: dict[str, Callable[[], Model]] = {}


def model(function):
    MODELS[function.__name__] = function
    return function


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def squared(outputs):
    """A loss of every example's outputs that is no symmetric function of them."""
    flat = outputs.reshape(outputs.shape[0], -1)
    weights = jnp.linspace(0.5, 1.5, flat.shape[1])
    return jnp.mean(jnp.sum(weights * flat**2, axis=1))


@model
def dense():
    params = {"w": normal(0, 4, 5), "b": normal(1, 5)}
    return Model(
        lambda p, x: squared(jax.nn.relu(x @ p["w"] + p["b"])), params, normal(2, NUM_EXAMPLES, 4)
    )


@model
def dense_transposed():
    def loss(p, x):
        return squared(jnp.tanh(p["w"] @ x.T).T)

    return Model(loss, {"w": normal(0, 5, 4)}, normal(2, NUM_EXAMPLES, 4))


@model
def dense_on_sequences():
    def loss(p, x):
        return squared(jnp.tanh(x @ p["w"] + p["b"]) @ p["v"])

    params = {"w": normal(0, 4, 5), "b": normal(1, 5), "v": normal(3, 5, 2)}
    return Model(loss, params, normal(2, NUM_EXAMPLES, 3, 4))


@model
def batch_merged_with_time():
    def loss(p, x):
        n, t, d = x.shape
        h = jax.nn.gelu(x.reshape(n * t, d) @ p["w"] + jnp.broadcast_to(p["b"], (n * t, 5)))
        return squared((h * p["s"]).reshape(n, t, -1))

    params = {"w": normal(0, 4, 5), "b": normal(1, 5), "s": normal(3, 5)}
    return Model(loss, params, normal(2, NUM_EXAMPLES, 3, 4))


@model
def picked_from_the_batch_merged_with_time():
    def loss(p, x):
        n, t, d = x.shape
        h = jax.scipy.special.i0e(x.reshape(n * t, d))
        picked = h[jnp.arange(n * t), h.argmax(-1)]
        return squared((picked[:, None] * p["s"]).reshape(n, -1))

    return Model(loss, {"s": normal(3, 5)}, normal(2, NUM_EXAMPLES, 3, 4))


@model
def parts_of_what_the_loss_makes():
    def loss(p, x):
        n, t, _ = x.shape
        places = jnp.broadcast_to(jnp.arange(t), (n, t))
        mask = places[:, :, None] >= places[:, None, :]
        weights = jax.nn.softmax(jnp.where(mask[0], p["w"], -9.0))
        return squared(jnp.tanh(weights @ x + p["places"][places[0]]))

    params = {"w": normal(0, 3, 3), "places": normal(1, 3, 4)}
    return Model(loss, params, normal(2, NUM_EXAMPLES, 3, 4))


@model
def written_to_the_batch_merged_with_time():
    def loss(p, x):
        n, t, d = x.shape
        places = jnp.arange(n) * t + jnp.argmax(x[..., 0], axis=1)
        h = (x.reshape(n * t, d) @ p["w"]).at[places].set(0.5)
        return squared((h @ p["v"]).reshape(n, -1))

    return Model(loss, {"w": normal(0, 4, 5), "v": normal(1, 5, 2)}, normal(2, NUM_EXAMPLES, 3, 4))


@model
def time_merged_with_batch():
    def loss(p, x):
        n, t, d = x.shape
        h = jax.nn.relu(x.swapaxes(0, 1).reshape(t * n, d) @ p["w"] + p["b"])
        return squared(h.reshape(t, n, -1).swapaxes(0, 1))

    return Model(loss, {"w": normal(0, 4, 5), "b": normal(1, 5)}, normal(2, NUM_EXAMPLES, 3, 4))


@model
def einsum_and_attention():
    def loss(p, x):
        x = x + p["position"]
        token = jnp.broadcast_to(p["class"], (x.shape[0], 1, x.shape[2]))
        x = jnp.concatenate([token, x], axis=1)
        q, k, v = (jnp.einsum("ntd,dhe->nhte", x, p[name]) for name in "qkv")
        weights = jax.nn.softmax(jnp.einsum("nhte,nhse->nhts", q, k) / np.sqrt(2))
        h = jnp.einsum("nhts,nhse,hed->ntd", weights, v, p["out"])
        return squared(h[:, 0])

    params = {name: normal(i, 4, 2, 2) for i, name in enumerate("qkv")}
    params |= {"out": normal(4, 2, 2, 4), "class": normal(5, 4), "position": normal(6, 3, 4)}
    return Model(loss, params, normal(7, NUM_EXAMPLES, 3, 4))


@model
def class_token_by_tile_and_zeros():
    def loss(p, x):
        n = x.shape[0]
        token = jnp.tile(p["class"][None, None], (n, 1, 1))
        other = jnp.zeros((n, 1, 4)) + p["other"]
        h = jnp.concatenate([token, x, other], axis=1)
        return squared(jnp.tanh(h @ p["w"]).mean(1))

    params = {"class": normal(0, 4), "other": normal(1, 4), "w": normal(2, 4, 3)}
    return Model(loss, params, normal(7, NUM_EXAMPLES, 2, 4))


@model
def embedding_tied_with_the_output():
    def loss(p, x):
        h = jnp.tanh(p["table"][x] @ p["w"])
        logits = h @ p["table"].T
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), x[..., None], axis=-1)
        return -jnp.mean(picked)

    params = {"table": normal(0, 7, 3), "w": normal(1, 3, 3)}
    return Model(loss, params, jnp.arange(NUM_EXAMPLES * 4).reshape(NUM_EXAMPLES, 4) ** 2 % 7)


@model
def norms_and_standardised_kernels():
    def layer_norm(x, axes):
        x = x - x.mean(axes, keepdims=True)
        return x * jax.lax.rsqrt(jnp.square(x).mean(axes, keepdims=True) + 1e-5)

    def loss(p, x):
        kernel = layer_norm(p["w"], (0,)) * jnp.exp(p["gain"])
        h = layer_norm(x @ kernel, (-1,)) * p["scale"] + p["bias"]
        grouped = layer_norm(h.reshape(*h.shape[:-1], 2, 3), (1, 3)).reshape(h.shape)
        return squared(jnp.sin(grouped * p["group_scale"]) + p["w"].sum() * 0.1 * h)

    params = {
        "w": normal(0, 4, 6),
        "gain": normal(1, 6),
        "scale": normal(2, 6),
        "bias": normal(3, 6),
        "group_scale": normal(4, 6),
    }
    return Model(loss, params, normal(5, NUM_EXAMPLES, 3, 4))


@model
def shared_weights_and_l2():
    def loss(p, x):
        h = x
        for _ in range(3):
            h = jnp.tanh(h @ p["w"] + p["b"])
        penalty = 0.1 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(p))
        return 0.5 * (squared(h) + penalty) - jnp.sum(p["b"] ** 3)

    return Model(loss, {"w": normal(0, 4, 4), "b": normal(1, 4)}, normal(2, NUM_EXAMPLES, 4))


@model
def functions_with_derivatives_of_their_own():
    def loss(p, x):
        h = jnp.logaddexp(x @ p["w"], p["b"]) * jax.nn.silu(p["gate"])
        return squared(jax.nn.softmax(h * p["temperature"], where=h > -2, axis=-1) + h)

    params = {
        "w": normal(0, 4, 5),
        "b": normal(1, 5),
        "gate": normal(2, 5),
        "temperature": jnp.float32(1.5),
    }
    return Model(loss, params, normal(3, NUM_EXAMPLES, 4))


@model
def unused_and_stopped():
    def loss(p, x):
        return squared(x @ p["w"] * jax.lax.stop_gradient(p["stopped"]))

    params = {"w": normal(0, 4, 5), "stopped": normal(1, 5), "unused": normal(2, 3)}
    return Model(loss, params, normal(3, NUM_EXAMPLES, 4))


@model
def nested_jit():
    @jax.jit
    def layer(p, x):
        return jax.jit(jnp.tanh)(x @ p["w"]) + p["b"]

    @jax.jit
    def loss(p, x):
        return squared(layer(p, layer(p, x))) + 0.01 * jnp.sum(p["w"] ** 2)

    return Model(loss, {"w": normal(0, 4, 4), "b": normal(1, 4)}, normal(2, NUM_EXAMPLES, 4))


@model
def two_views():
    def loss(p, x):
        h = jnp.concatenate([x, x[:, ::-1]], axis=0)
        h = jnp.tanh(h @ p["w"] + p["b"])
        one, two = jnp.split(h, 2)
        return squared(one * two + one)

    return Model(loss, {"w": normal(0, 4, 4), "b": normal(1, 4)}, normal(2, NUM_EXAMPLES, 4))


@model
def scanned_recurrence_without_parameters():
    def loss(p, x):
        h = x @ p["w"]
        _, outputs = jax.lax.scan(
            lambda carry, now: (jnp.tanh(carry + now),) * 2,
            jnp.zeros_like(h[:, 0]),
            h.swapaxes(0, 1),
        )
        return squared(outputs.swapaxes(0, 1) * p["s"])

    return Model(loss, {"w": normal(0, 4, 5), "s": normal(1, 5)}, normal(2, NUM_EXAMPLES, 3, 4))


@model
def scan_that_makes_a_parameter():
    def loss(p, x):
        power, _ = jax.lax.scan(lambda carry, _: (carry @ p["w"], None), jnp.eye(4), None, length=3)
        return squared(x @ power)

    return Model(loss, {"w": normal(0, 4, 4)}, normal(2, NUM_EXAMPLES, 4))


@model
def written_for_one_example():
    def of_one(p, x):
        h = jax.lax.conv_general_dilated(x[None], p["k"], (1,), "SAME")[0]
        return jnp.sum(jnp.tanh(h + p["b"][:, None]) @ p["v"])

    def loss(p, x):
        return jnp.mean(jax.vmap(of_one, in_axes=(None, 0))(p, x) ** 2)

    params = {"k": normal(0, 3, 2, 3), "b": normal(1, 3), "v": normal(2, 5, 2)}
    return Model(loss, params, normal(3, NUM_EXAMPLES, 2, 5))


@model
def frames():
    """The same convolutions for every frame, mapped over; then pooled, merged with the batch."""

    def loss(p, x):
        def of_frame(x):
            return conv(jnp.tanh(conv(x, p["k"]) + p["b"]), p["l"])

        h = jnp.tanh(jax.vmap(of_frame, in_axes=1, out_axes=1)(x))
        h = h.reshape(-1, *h.shape[2:])
        h = jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        return squared((h.reshape(len(h), -1, order="F") @ p["w"]).reshape(len(x), -1))

    params = {"k": normal(0, 3, 3, 2, 3), "b": normal(1, 3), "l": normal(2, 3, 3, 3, 3)}
    return Model(loss, params | {"w": normal(3, 12, 2)}, normal(4, NUM_EXAMPLES, 2, 4, 4, 2))


@model
def kernels_of_examples():
    """A mixture of kernels for every example, and of experts for every token."""

    def loss(p, x):
        mix = jax.nn.softmax(x.mean((1, 2)) @ p["route"])
        kernels = jnp.einsum("ne,ehwio->nhwio", mix, p["kernels"])
        h = jnp.tanh(jax.vmap(lambda x, k: conv(x[None], k)[0])(x, kernels))
        tokens = h.reshape(-1, h.shape[-1])
        weights, experts = jax.lax.top_k(jax.nn.softmax(tokens @ p["router"]), 2)
        tokens = jnp.einsum("tk,td,tkde->te", weights, tokens, p["experts"][experts])
        return squared(jnp.tanh(tokens).reshape(len(x), -1))

    params = {"route": normal(0, 2, 2), "kernels": normal(1, 2, 3, 3, 2, 3)}
    params |= {"router": normal(2, 3, 3), "experts": normal(3, 3, 3, 2)}
    return Model(loss, params, normal(4, NUM_EXAMPLES, 3, 3, 2))


def conv(x, kernel):
    """Keeps the size."""
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=NHWC)


def convolution(spatial, kernel, layout, padding="SAME", window_strides=None, **options):
    """One convolution on images of 4 channels, then a bias and a nonlinearity."""

    def loss(p, x):
        strides = window_strides or (1,) * len(spatial)
        h = jax.lax.conv_general_dilated(
            x, p["k"], strides, padding, dimension_numbers=layout, **options
        )
        bias = jnp.expand_dims(p["b"], [i for i, c in enumerate(layout[2]) if c != "C"])
        return squared(jnp.tanh(h + bias))

    sizes = iter(spatial)
    image = [NUM_EXAMPLES if c == "N" else 4 if c == "C" else next(sizes) for c in layout[0]]
    params = {"k": normal(0, *kernel), "b": normal(1, kernel[layout[1].index("O")])}
    return Model(loss, params, normal(2, *image))


NHWC = ("NHWC", "HWIO", "NHWC")
CONVOLUTIONS = {
    "strided": ((5, 6), (3, 2, 4, 3), NHWC, {"window_strides": (2, 1)}),
    "pointwise": ((3, 3), (1, 1, 4, 6), NHWC, {"padding": "VALID"}),
    "grouped": ((4, 4), (3, 3, 2, 6), NHWC, {"feature_group_count": 2}),
    "depthwise": (
        (4, 4),
        (3, 3, 1, 8),
        NHWC,
        {"window_strides": (2, 2), "feature_group_count": 4},
    ),
    "dilated": ((6, 6), (2, 2, 4, 3), NHWC, {"padding": "VALID", "rhs_dilation": (2, 3)}),
    "transposed": (
        (3, 3),
        (2, 2, 4, 3),
        NHWC,
        {"padding": ((1, 1), (1, 1)), "lhs_dilation": (2, 2)},
    ),
    "one_dimensional": ((7,), (3, 4, 2), ("NCH", "HIO", "NCH"), {"window_strides": (2,)}),
    "three_dimensional": (
        (3, 4, 3),
        (2, 4, 2, 2, 2),
        ("NCDHW", "OIDHW", "NCDHW"),
        {"window_strides": (1, 2, 1)},
    ),
}
MODELS |= {
    f"{name}_convolution": functools.partial(convolution, *shapes, **options)
    for name, (*shapes, options) in CONVOLUTIONS.items()
}
