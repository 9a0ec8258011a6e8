"""Rows of biases and scales, which the engine makes by a rule wherever they meet the batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clars_optax
from clars_optax.norms import _taps
from clars_optax.norms._rules import platform


def normalised(params, x):
    """BatchNorm's scale meets the batch together with its statistics; the bias is used twice."""
    h = jnp.tanh(x + params["bias"])
    mean, variance = h.mean((0, 1, 2)), h.var((0, 1, 2))
    h = (h - mean) * (jax.lax.rsqrt(variance + 1e-3) * params["scale"]) - params["bias"]
    return jnp.mean(jnp.sum(jnp.sin(h), axis=(1, 2, 3)))


def ghost(params, x):
    """The same for every two examples."""
    h = x.reshape(-1, 2, *x.shape[1:]) + params["bias"]
    h = h / (h.std((1, 2, 3), keepdims=True) + 0.1) * params["scale"]
    return jnp.mean(jnp.sum(jnp.sin(h), axis=(2, 3, 4)))


@pytest.fixture
def problem():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"bias": jax.random.normal(keys[0], (3,)), "scale": jax.random.normal(keys[1], (3,))}
    return params, jax.random.normal(keys[2], (8, 16, 8, 3))


@pytest.mark.parametrize(
    ("loss_fn", "method", "number"),
    [
        (normalised, "auto", 3),
        (normalised, "generic", 0),
        (ghost, "auto", 2),
        (ghost, "generic", 0),
    ],
)
def test_rows_are_kept_apart(problem, loss_fn, method, number):
    step = clars_optax.value_and_grad_and_norms(loss_fn, method=method)
    text = str(jax.make_jaxpr(step)(*problem))
    # For their squares and their sum, which XLA would otherwise make from all cotangents again.
    assert text.count("optimization_barrier") == number


@pytest.mark.parametrize("loss_fn", [normalised, ghost])
@pytest.mark.parametrize(
    "options", [{}, {"group_size": 2}, {"num_norm_examples": 4}, {"microbatch_size": 4}]
)
def test_sums_in_parts(monkeypatch, problem, loss_fn, options):
    step, generic = (
        clars_optax.value_and_grad_and_norms(loss_fn, method=method, **options)
        for method in ("auto", "generic")
    )
    expected = jax.jit(generic)(*problem)
    device = dataclasses.replace(platform(), splits_sums=True)
    monkeypatch.setattr(_taps, "platform", lambda: device)
    mapped = jax.jit(jax.vmap(step, in_axes=(None, 0)))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x[0], y, rtol=1e-4, atol=1e-5),
        mapped(problem[0], problem[1][None]),
        expected,
    )
