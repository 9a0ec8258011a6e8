import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.models import MODELS, densenet


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


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("resnet18", 11_689_512),
        ("resnet34", 21_797_672),
        ("resnet50", 25_557_032),
        ("resnet101", 44_549_160),
        ("densenet121", 7_978_856),
        ("densenet169", 14_149_480),
        ("mobilenet_v2", 3_504_872),
    ],
)
def test_number_of_parameters_is_that_of_torchvision(name, count):
    shapes = jax.eval_shape(
        functools.partial(MODELS[name](num_classes=1000).init, train=True),
        jax.random.key(0),
        jnp.zeros((1, 224, 224, 3)),
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == count


def test_densenet_bc_for_small_images():
    """Depth 100 and growth rate 12: 0.8 million parameters (table 2 of the paper)."""
    small = densenet.DenseNet(block_sizes=(16, 16, 16), num_classes=10, growth_rate=12)
    shapes = jax.eval_shape(
        functools.partial(small.init, train=True), jax.random.key(0), jnp.zeros((1, 32, 32, 3))
    )
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    assert round(count / 1e6, 1) == 0.8


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("resnet50", "stage4_block1"),
        ("densenet121", "block4_layer1"),
        ("mobilenet_v2", "head_conv"),
    ],
)
def test_networks_for_imagenet_reduce_the_resolution_by_32(name, layer):
    model = MODELS[name](num_classes=10)

    def run(images):
        variables = model.init(jax.random.key(0), images, train=False)
        return model.apply(variables, images, train=False, capture_intermediates=True)[1]

    state = jax.eval_shape(run, jnp.zeros((1, 64, 64, 3)))
    assert state["intermediates"][layer]["__call__"][0].shape[1:3] == (2, 2)


@pytest.mark.parametrize("name", MODELS)
def test_computes_in_bfloat16_with_float32_parameters(name):
    model = MODELS[name](num_classes=10, dtype=jnp.bfloat16)

    def run(images):
        variables = model.init(jax.random.key(0), images, train=True)
        return variables, *model.apply(
            variables,
            images,
            train=True,
            capture_intermediates=True,
            mutable=["batch_stats", "intermediates"],
        )

    variables, logits, state = jax.eval_shape(run, jnp.zeros((2, 64, 64, 3)))

    assert logits.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    assert {leaf.dtype for leaf in jax.tree.leaves(state["intermediates"])} == {
        jnp.dtype(jnp.bfloat16)
    }
