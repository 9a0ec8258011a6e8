"""`from_example_grads` against means and norms taken by NumPy."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

import clars_optax


def spy():
    """A transformation whose updates are what it was handed."""

    def update_fn(updates, state, params=None, *, example_grad_norms, **extra_args):
        return (updates, example_grad_norms, params, extra_args), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update_fn)


shapes = st.lists(st.lists(st.integers(1, 3), max_size=3).map(tuple), min_size=1, max_size=3)


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(shapes, st.integers(1, 4), st.integers(0, 1000))
def test_hands_on_means_and_norms(shapes, n, seed):
    rng = np.random.default_rng(seed)
    params = [np.zeros(shape, np.float32) for shape in shapes]
    example_grads = [rng.normal(size=(n, *shape)).astype(np.float32) for shape in shapes]
    tx = clars_optax.from_example_grads(spy())
    (means, norms, given, extra), _ = tx.update(example_grads, tx.init(params), params, value=3.0)
    assert given is params
    assert extra == {"value": 3.0}
    for g, mean, norm in zip(example_grads, means, norms, strict=True):
        np.testing.assert_allclose(mean, g.astype(np.float64).mean(0), rtol=1e-5, atol=1e-6)
        assert norm.shape == (n,)
        assert norm.dtype == jnp.float32
        expected = [np.sqrt(np.sum(np.square(g_i.astype(np.float64)))) for g_i in g]
        np.testing.assert_allclose(norm, expected, rtol=1e-5)


def test_norms_of_low_precision_are_float32():
    grads = {"w": jnp.full((2, 300), 1.0, jnp.bfloat16)}
    tx = clars_optax.from_example_grads(spy())
    (means, norms, *_), _ = tx.update(grads, tx.init(grads))
    assert means["w"].dtype == jnp.bfloat16
    np.testing.assert_allclose(norms["w"], np.sqrt([300.0, 300.0]), rtol=1e-6)


def test_clars_takes_the_same_step_from_either():
    tx = clars_optax.clars(0.5, weight_decay=0.1)
    params = {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3)}
    xs = jnp.arange(8.0).reshape(4, 2)

    def loss_fn(p, x):
        return jnp.sum((x @ p["kernel"] + p["bias"]) ** 2)

    example_grads = jax.vmap(jax.grad(loss_fn), in_axes=(None, 0))(params, xs)
    norms = jax.tree.map(lambda g: jnp.linalg.norm(g.reshape(4, -1), axis=1), example_grads)
    grads = jax.tree.map(lambda g: g.mean(0), example_grads)
    expected, _ = tx.update(grads, tx.init(params), params, example_grad_norms=norms)
    wrapped = clars_optax.from_example_grads(tx)
    updates, state = jax.jit(wrapped.update)(example_grads, wrapped.init(params), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), updates, expected)
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))


def test_any_transformation_may_be_wrapped():
    tx = clars_optax.from_example_grads(optax.sgd(1.0))
    updates, _ = tx.update(jnp.array([1.0, 3.0]), tx.init(jnp.ones(())), jnp.ones(()))
    assert updates == -2.0


@pytest.mark.parametrize(
    ("grads", "message"),
    [
        ({"a": np.ones((4, 2)), "b": np.ones((3, 2))}, r"\['a'\]: \(4, 2\), \['b'\]: \(3, 2\)"),
        ({"a": np.ones((4, 2)), "b": np.ones(())}, r"\['b'\]: \(\)"),
        ({"a": np.ones(())}, r"examples on their first axis. Got \['a'\]: \(\)"),
        ({"a": np.ones((0, 2))}, r"\['a'\]: \(0, 2\)\. .*jax\.vmap\(jax\.grad"),
        (np.ones(()), r"the root: \(\)"),
        ([np.ones(i) for i in range(10)], r"\[7\]: \(7,\), and 2 more"),
    ],
)
def test_refuses_leaves_without_a_common_leading_axis(grads, message):
    tx = clars_optax.from_example_grads(spy())
    with pytest.raises(ValueError, match=message):
        tx.update(grads, optax.EmptyState())


@pytest.mark.parametrize("dtype", [np.complex64, np.int32])
def test_refuses_leaves_that_are_no_gradients(dtype):
    tx = clars_optax.from_example_grads(spy())
    with pytest.raises(TypeError, match=r"^`updates` at \['a'\] is .*: expected is a real"):
        tx.update({"a": np.ones((4, 2), dtype)}, optax.EmptyState())
