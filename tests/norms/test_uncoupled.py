"""Where nothing couples the examples, `jax.vmap(jax.grad)` has the norms."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clars_optax
from tests.norms.models import MODELS, NUM_EXAMPLES


@functools.cache
def model_and_grads(name):
    """The model, the gradient of every example, and the value and gradient of them all."""
    model = MODELS[name]()
    with jax.default_matmul_precision("highest"):
        grads = jax.jit(jax.vmap(lambda p, x: jax.grad(model.loss)(p, x[None]), in_axes=(None, 0)))(
            model.params, model.batch
        )
    plain = jax.jit(jax.value_and_grad(model.loss))(model.params, model.batch)
    return model, grads, plain


def norms_of_groups(grads, group_size):
    def norm(g):
        g = np.asarray(g)
        g = g.reshape(len(g) // group_size, group_size, *g.shape[1:]).mean(1)
        return np.sqrt(np.sum(g**2, axis=tuple(range(1, g.ndim))))

    return jax.tree.map(norm, grads)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"group_size": 2},
        {"group_size": NUM_EXAMPLES},
        {"num_norm_examples": 4, "group_size": 2},
        {"num_norm_examples": 1},
        {"microbatch_size": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", sorted(MODELS))
def test_matches_vmap_of_grad(name, options):
    model, grads, (expected_value, expected_grad) = model_and_grads(name)
    step = clars_optax.value_and_grad_and_norms(model.loss, **options)
    value, grad, norms = jax.jit(step)(model.params, model.batch)
    chex.assert_trees_all_close(value, expected_value, rtol=1e-6)
    chex.assert_trees_all_close(grad, expected_grad, rtol=1e-5, atol=1e-6)
    group_size = options.get("group_size", 1)
    kept = options.get("num_norm_examples", NUM_EXAMPLES) // group_size
    expected = jax.tree.map(lambda n: n[:kept], norms_of_groups(grads, group_size))
    chex.assert_trees_all_equal_shapes_and_dtypes(norms, expected)
    for found, wanted in zip(jax.tree.leaves(norms), jax.tree.leaves(expected), strict=True):
        assert np.max(np.abs(found - wanted)) <= 1e-5 * np.max(wanted) + 1e-7


def expect_vmap_of_grad(loss, params, x):
    _, grad, norms = jax.jit(clars_optax.value_and_grad_and_norms(loss))(params, x)
    grads = jax.jit(jax.vmap(lambda p, x: jax.grad(loss)(p, x[None]), in_axes=(None, 0)))(params, x)
    chex.assert_trees_all_close(norms, norms_of_groups(grads, 1), rtol=1e-5)
    expected = jax.grad(loss)(params, x)
    chex.assert_trees_all_equal_dtypes(grad, expected)
    return grad, expected


@pytest.mark.parametrize(
    "use",
    [
        lambda p, x: jnp.abs(jnp.fft.rfft(x) @ p["w"]) ** 2,
        lambda p, x: jnp.fft.irfft(jnp.fft.rfft(x) @ p["w"]),
        lambda p, x: jnp.abs(jnp.fft.rfft(x) * p["w"][0, 0]) ** 2,
    ],
)
def test_parameters_that_meet_complex_values(use):
    params = {"w": jax.random.normal(jax.random.key(0), (3, 3))}
    x = jax.random.normal(jax.random.key(1), (NUM_EXAMPLES, 4))
    grad, expected = expect_vmap_of_grad(
        lambda p, x: jnp.mean(jnp.sum(use(p, x), axis=1)), params, x
    )
    chex.assert_trees_all_close(grad, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "add",
    [
        lambda loss, penalty: jnp.stack([loss, penalty]).sum(),
        lambda loss, penalty: jnp.array([loss, penalty]) @ jnp.array([1.0, 0.5]),
        lambda loss, penalty: jnp.concatenate([loss[None], penalty[None]])[0] + penalty,
        lambda loss, penalty: jnp.where(jnp.isfinite(loss + penalty), loss + penalty, 0.0),
        lambda loss, penalty: jnp.nan_to_num(loss + penalty),
    ],
)
def test_terms_of_parameters_come_in_any_linear_way(add):
    def loss(w, x):
        return add(jnp.mean((x @ w) ** 2), jnp.sum(w**2))

    w = jax.random.normal(jax.random.key(0), (4,))
    x = jax.random.normal(jax.random.key(1), (NUM_EXAMPLES, 4))
    grad, expected = expect_vmap_of_grad(loss, w, x)
    chex.assert_trees_all_close(grad, expected, rtol=1e-5)


def test_parameters_without_entries():
    def loss(p, x):
        wide = jnp.concatenate([x @ p["in"], x], axis=1)
        return jnp.mean(jnp.sum((wide + x[:, :0] @ p["none"] + p["b"]) ** 2, axis=1))

    params = {"in": jnp.ones((4, 0)), "none": jnp.ones((0, 4)), "b": jnp.ones(4)}
    x = jax.random.normal(jax.random.key(1), (NUM_EXAMPLES, 4))
    grad, expected = expect_vmap_of_grad(loss, params, x)
    chex.assert_trees_all_close(grad, expected, rtol=1e-5)


def test_float64_keeps_its_precision():
    with jax.enable_x64(True):
        params = {"w": jax.random.normal(jax.random.key(0), (4, 5), jnp.float64)}
        x = jax.random.normal(jax.random.key(1), (NUM_EXAMPLES, 3, 4), jnp.float64)

        def loss(p, x):
            return jnp.mean(jnp.sum(jnp.sin(x @ p["w"]), axis=(1, 2)))

        grad, expected = expect_vmap_of_grad(loss, params, x)
        chex.assert_trees_all_close(grad, expected, rtol=1e-13)
