import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.optimizers import make_optimizer

LEARNING_RATE, MOMENTUM, DECAY = 0.5, 0.9, 0.1


@pytest.fixture
def params():
    return {
        "dense": {"kernel": jnp.array([[3.0, 0.0], [0.0, 4.0]]), "bias": jnp.array([1.0, -2.0])},
        "norm": {"scale": jnp.array([1.0, 1.0])},
    }


def gradients(step):
    return {
        "dense": {
            "kernel": np.array([[1.0, 2.0], [-2.0, 0.5]], np.float32) * (step + 1),
            "bias": np.array([0.5, 0.25], np.float32),
        },
        "norm": {"scale": np.array([-1.0, 2.0], np.float32) / (step + 1)},
    }


def make(name):
    return make_optimizer(
        name,
        LEARNING_RATE,
        momentum=MOMENTUM,
        weight_decay=DECAY,
        batch_size=4,
        group_size=1,
    )


def trajectory(name, params, num_steps=3):
    optimizer = make(name).transformation
    state = optimizer.init(params)
    for step in range(num_steps):
        norms = jax.tree.map(lambda leaf: jnp.full(4, 2.0), params)
        updates, state = optimizer.update(gradients(step), state, params, example_grad_norms=norms)
        params = jax.tree.map(jnp.add, params, updates)
    return params


def by_hand(params, ratio, num_steps=3):
    """The kernel decays and has the layer-wise ratio, the bias and the scale have neither."""
    kernel, bias, scale = (
        np.asarray(leaf, np.float64)
        for leaf in (params["dense"]["kernel"], params["dense"]["bias"], params["norm"]["scale"])
    )
    m_kernel, m_bias, m_scale = np.zeros_like(kernel), np.zeros_like(bias), np.zeros_like(scale)
    for step in range(num_steps):
        grads = gradients(step)
        decayed = grads["dense"]["kernel"] + DECAY * kernel
        m_kernel = MOMENTUM * m_kernel + decayed
        m_bias = MOMENTUM * m_bias + grads["dense"]["bias"]
        m_scale = MOMENTUM * m_scale + grads["norm"]["scale"]
        kernel = kernel - LEARNING_RATE * ratio(kernel, decayed) * m_kernel
        bias = bias - LEARNING_RATE * m_bias
        scale = scale - LEARNING_RATE * m_scale
    return {"dense": {"kernel": kernel, "bias": bias}, "norm": {"scale": scale}}


RATIOS = {
    "clars": lambda w, decayed: min(0.1, 0.01 * np.sqrt(np.sum(w**2)) / (2.0 + 1e-6)),
    "lars": lambda w, decayed: 0.001 * np.sqrt(np.sum(w**2)) / np.sqrt(np.sum(decayed**2)),
    "sgd": lambda w, decayed: 1.0,
}


@pytest.mark.parametrize("name", RATIOS)
def test_trajectory_by_hand(name, params):
    expected = by_hand(params, RATIOS[name])

    actual = trajectory(name, params)

    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5), actual, expected)


def test_lars_has_no_cap(params):
    grads = jax.tree.map(lambda leaf: -DECAY * leaf + 1e-5, params)

    ratio = make("lars").diagnose(params, grads, None, None)["trust_ratio"]["dense"]["kernel"]

    np.testing.assert_allclose(ratio, 0.001 * 5 / 2e-5, rtol=0.1)


@pytest.mark.parametrize("name", RATIOS)
def test_diagnosed_ratio_is_the_one_of_the_update(name, params):
    norms = jax.tree.map(lambda leaf: jnp.full(4, 2.0), params)
    decayed = gradients(0)["dense"]["kernel"] + DECAY * np.asarray(params["dense"]["kernel"])

    ratios = make(name).diagnose(params, gradients(0), norms, None)["trust_ratio"]

    expected = RATIOS[name](np.asarray(params["dense"]["kernel"]), decayed)
    np.testing.assert_allclose(ratios["dense"]["kernel"], expected, rtol=1e-5)
    assert ratios["dense"]["bias"] == 1
    assert ratios["norm"]["scale"] == 1


def test_unknown_name():
    with pytest.raises(ValueError, match="'adam', but must be 'clars', 'lars' or 'sgd'"):
        make("adam")
