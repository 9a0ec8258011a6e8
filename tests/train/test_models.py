import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.models import MODELS


@pytest.fixture(scope="module")
def model():
    return MODELS["resnet8"](num_classes=10)


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(1), (6, 8, 8, 1))


@pytest.fixture(scope="module")
def variables(model, images):
    return jax.jit(functools.partial(model.init, train=True))(jax.random.key(0), images)


def test_number_of_parameters(variables):
    stem = 3 * 3 * 1 * 16 + 2 * 16
    stage1 = 2 * (3 * 3 * 16 * 16 + 2 * 16)
    stage2 = 3 * 3 * 16 * 32 + 3 * 3 * 32 * 32 + 16 * 32 + 3 * 2 * 32
    stage3 = 3 * 3 * 32 * 64 + 3 * 3 * 64 * 64 + 32 * 64 + 3 * 2 * 64
    head = 64 * 10 + 10

    count = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))

    assert count == stem + stage1 + stage2 + stage3 + head


def test_stages_halve_the_resolution_and_double_the_filters(model, variables, images):
    _, state = model.apply(variables, images, train=False, capture_intermediates=True)

    shapes = [
        state["intermediates"][f"stage{stage}_block1"]["__call__"][0].shape for stage in (1, 2, 3)
    ]
    assert shapes == [(6, 8, 8, 16), (6, 4, 4, 32), (6, 2, 2, 64)]


def test_logits(model, variables, images):
    logits = model.apply(variables, images, train=False)

    assert logits.shape == (6, 10)
    assert logits.dtype == jnp.float32


def test_training_moves_the_running_averages_towards_the_batch(model, variables, images):
    _, updated = model.apply(variables, images, train=True, mutable=["batch_stats"])
    kernel = variables["params"]["stem_conv"]["kernel"]
    y = jax.lax.conv_general_dilated(
        images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )

    stem = updated["batch_stats"]["stem_norm"]

    np.testing.assert_allclose(stem["mean"], 0.1 * y.mean((0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(stem["var"], 0.9 + 0.1 * y.var((0, 1, 2)), atol=1e-5)


def test_evaluation_uses_the_running_averages(model, variables, images):
    alone = model.apply(variables, images[:1], train=False)
    together = model.apply(variables, images, train=False)

    np.testing.assert_allclose(alone[0], together[0], atol=1e-5)
