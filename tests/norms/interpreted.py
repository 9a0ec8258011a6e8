"""The kernels in Pallas's interpreter, and a network that has all of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from clars_optax.norms._rules import Platform

# Its operations and all bytes are free there, so that it is chosen wherever it can be.
INTERPRETED = Platform(
    0.0, 1.0, 2**20, kernel_factor=0.0, makes_all=True, kernels="gpu", interprets=True
)


def conv(x, w, **options):
    options = {"window_strides": (1, 1), "padding": "SAME", **options}
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, w, dimension_numbers=numbers, **options)


def network(params, x):
    """Convolutions with normalisation between them, attention's products, and a loop of layers."""
    h = conv(x, params["stem"], window_strides=(2, 2))
    h = jnp.tanh((h - h.mean((0, 1, 2))) / (h.std((0, 1, 2)) + 0.1))
    h = jax.checkpoint(functools.partial(conv, feature_group_count=2))(h, params["groups"])
    h = conv(jnp.tanh(h), params["depthwise"], feature_group_count=6)
    h = jnp.tanh(h).reshape(len(h), -1, h.shape[-1])
    h = jnp.einsum("ntd,dhk->nthk", h, params["heads"]).reshape(*h.shape[:2], -1)

    def layer(h, w):
        return jnp.tanh(h @ w), None

    h, _ = jax.lax.scan(layer, h, params["layers"])
    return jnp.mean(jnp.sum(jnp.square(h @ params["out"]), axis=(1, 2)))


def make_problem():
    """Its parameters, and a batch."""
    shapes = {
        "stem": (3, 3, 2, 4),
        "groups": (3, 3, 2, 6),
        "depthwise": (3, 3, 1, 6),
        "heads": (6, 2, 3),
        "layers": (2, 6, 6),
        "out": (6, 3),
    }
    keys = iter(jax.random.split(jax.random.key(0), 7))
    params = {name: jax.random.normal(next(keys), shape) for name, shape in shapes.items()}
    return params, jax.random.normal(next(keys), (8, 6, 6, 2))


def assert_same(found, expected, atol=1e-5):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=atol), found, expected
    )


def unchanged(*found):
    return found


def interpret(monkeypatch, kernels, change=unchanged):
    """Lets the trials of kernels run in the interpreter, with what is done to their results."""
    for module, name in kernels:
        kernel = getattr(module, name)

        def interpreted(*args, kernel=kernel, **options):
            return change(*kernel(*args, **(options | {"interpret": True})))

        monkeypatch.setattr(module, name, interpreted)
