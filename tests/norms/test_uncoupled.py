"""Where nothing couples the examples, `jax.vmap(jax.grad)` has the norms."""

import functools

import chex
import jax
import jax.numpy as jnp
import pytest

import clars_optax
from tests.norms.models import MODELS, NUM_EXAMPLES


@functools.cache
def model_and_example_grads(name):
    model = MODELS[name]()
    with jax.default_matmul_precision("highest"):
        grads = jax.jit(jax.vmap(lambda p, x: jax.grad(model.loss)(p, x[None]), in_axes=(None, 0)))(
            model.params, model.batch
        )
    return model, grads


def norms_of_groups(grads, group_size):
    def norm(g):
        g = g.reshape(-1, group_size, *g.shape[1:]).mean(1)
        return jnp.sqrt(jnp.sum(g**2, axis=tuple(range(1, g.ndim))))

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
    model, grads = model_and_example_grads(name)
    step = clars_optax.value_and_grad_and_norms(model.loss, **options)
    value, grad, norms = jax.jit(step)(model.params, model.batch)
    expected_value, expected_grad = jax.jit(jax.value_and_grad(model.loss))(
        model.params, model.batch
    )
    chex.assert_trees_all_close(value, expected_value, rtol=1e-6)
    chex.assert_trees_all_close(grad, expected_grad, rtol=1e-5, atol=1e-6)
    group_size = options.get("group_size", 1)
    kept = options.get("num_norm_examples", NUM_EXAMPLES) // group_size
    expected = jax.tree.map(lambda n: n[:kept], norms_of_groups(grads, group_size))
    chex.assert_trees_all_equal_shapes_and_dtypes(norms, expected)
    for found, wanted in zip(jax.tree.leaves(norms), jax.tree.leaves(expected), strict=True):
        assert jnp.max(jnp.abs(found - wanted)) <= 1e-5 * jnp.max(wanted) + 1e-7
