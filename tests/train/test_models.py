import functools
import itertools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.models import MODELS, densenet, make_model, mobilenet_v1, mobilenet_v2, resnet

pytestmark = pytest.mark.usefixtures("compiled_fast")

GROUPS = ((0, 1, 2, 3), (4, 5, 6, 7))


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


class Traced(NamedTuple):
    """A network in training, by shapes and dtypes alone."""

    variables: Any
    logits: jax.ShapeDtypeStruct
    intermediates: Any


@functools.cache
def traced(name):
    """A network of a thousand classes, in bfloat16 on images of an odd shape.

    Tracing takes long, and neither size nor dtype has an influence on the parameters.
    """
    model = make_model(name, num_classes=1000, dtype=jnp.bfloat16)

    def run(images):
        variables = model.init(jax.random.key(0), images, train=True)
        logits, state = model.apply(
            variables,
            images,
            train=True,
            capture_intermediates=True,
            mutable=["batch_stats", "intermediates"],
        )
        return Traced(variables, logits, state["intermediates"])

    return jax.eval_shape(run, jnp.zeros((2, 45, 70, 3)))


def number_of_parameters(name, num_classes):
    params = traced(name).variables["params"]
    size_of_head = sum(leaf.size for leaf in jax.tree.leaves(params["head"]))
    others = sum(leaf.size for leaf in jax.tree.leaves(params)) - size_of_head
    return others + size_of_head * num_classes // 1000


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
    assert number_of_parameters(name, 1000) == count


def test_number_of_parameters_of_mobilenet_v1_is_that_of_keras():
    assert number_of_parameters("mobilenet_v1", 1000) == 4_231_976


def test_the_form_of_mobilenet_v2_for_small_images_has_the_same_parameters():
    count = number_of_parameters("mobilenet_v2", 10)
    assert number_of_parameters("mobilenet_v2_small", 10) == count


@pytest.mark.parametrize(
    ("name", "n", "count"), [("resnet20", 3, 269_722), ("resnet56", 9, 853_018)]
)
def test_number_of_parameters_of_resnets_for_small_images(name, n, count):
    """6n + 2 layers, no parameters in shortcuts (section 4.2): counted layer by layer."""
    widths = [3, *[16] * (2 * n + 1), *[32] * (2 * n), *[64] * (2 * n)]
    convolutions = sum(9 * i * o for i, o in itertools.pairwise(widths))
    norms = 2 * sum(widths[1:])

    assert convolutions + norms + 64 * 10 + 10 == count
    assert number_of_parameters(name, 10) == count


@pytest.mark.parametrize(
    ("name", "depth", "count"), [("densenet_bc40", 40, 176_122), ("densenet_bc", 100, 769_162)]
)
def test_number_of_parameters_of_densenets_for_small_images(name, depth, count):
    """Growth rate 12, published as 0.18 and 0.8 million: counted layer by layer."""
    growth_rate, channels = 12, 24
    expected = 9 * 3 * channels
    for block in range(3):
        if block > 0:
            expected += 2 * channels + channels * (channels // 2)
            channels //= 2
        for _ in range((depth - 4) // 6):
            bottleneck = 4 * growth_rate
            expected += 2 * channels + channels * bottleneck
            expected += 2 * bottleneck + 9 * bottleneck * growth_rate
            channels += growth_rate
    expected += 2 * channels + channels * 10 + 10

    assert expected == count
    assert number_of_parameters(name, 10) == count


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
    variables, logits, intermediates = traced(name)

    assert logits.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    assert {leaf.dtype for leaf in jax.tree.leaves(intermediates)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("name", MODELS)
def test_any_size_of_image_will_do(name):
    assert traced(name).logits.shape == (2, 1000)


def test_mobilenet_for_small_images_keeps_a_feature_map():
    model = make_model("mobilenet_v2_small", num_classes=10)

    def run(images):
        variables = model.init(jax.random.key(0), images, train=False)
        return model.apply(variables, images, train=False, capture_intermediates=True)[1]

    state = jax.eval_shape(run, jnp.zeros((1, 32, 32, 3)))
    assert state["intermediates"]["head_conv"]["__call__"][0].shape[1:3] == (4, 4)


def test_unknown_models_are_refused():
    with pytest.raises(ValueError, match=r"--model is 'resnet9', .* resnet8, .*mobilenet_v2_small"):
        make_model("resnet9", num_classes=10)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "resnet50",
            {"dropout_rate": 0.1},
            r"--dropout-rate is 0.1, but resnet50 .* say --dropout-rate 0, .* densenet_bc40, ",
        ),
        (
            "densenet121",
            {"zero_init_residual": True},
            r"--zero-init-residual is True, .* say --no-zero-init-residual, .*resnet8, .*_small\.$",
        ),
        (
            "mobilenet_v1",
            {"zero_init_residual": True},
            r"--zero-init-residual .* mobilenet_v1 .*, mobilenet_v2, mobilenet_v2_small\.$",
        ),
    ],
)
def test_options_that_a_model_has_no_place_for_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_model(name, num_classes=10, **options)


def test_options_reach_the_model():
    model = make_model(
        "mobilenet_v2",
        num_classes=7,
        norm_momentum=0.8,
        axis_name="devices",
        axis_index_groups=GROUPS,
        dtype=jnp.bfloat16,
        dropout_rate=0.3,
        zero_init_residual=True,
    )
    assert model == mobilenet_v2.MobileNetV2(
        num_classes=7,
        norm_momentum=0.8,
        axis_name="devices",
        axis_index_groups=GROUPS,
        dtype=jnp.bfloat16,
        dropout_rate=0.3,
        zero_init_residual=True,
    )


def make_variables(model, images):
    """Variables as initialised, but kernels from NumPy: JAX's take long to compile."""

    def init(key, without_kernels):
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: None if without_kernels and path[-1].key == "kernel" else leaf,
            model.init(key, images, train=False),
        )

    key, rng = jax.random.key(0), np.random.default_rng(0)
    shapes = jax.eval_shape(functools.partial(init, without_kernels=False), key)
    others = jax.jit(functools.partial(init, without_kernels=True))(key)
    return jax.tree.map(
        lambda shape, leaf: (
            rng.normal(0, np.prod(shape.shape[:-1]) ** -0.5, shape.shape).astype(np.float32)
            if leaf is None
            else leaf
        ),
        shapes,
        others,
    )


def test_shortcuts_without_parameters_subsample_and_fill_up_with_zeros():
    block = resnet.BasicBlock(
        filters=6,
        stride=2,
        norm=functools.partial(
            nn.BatchNorm, use_running_average=True, scale_init=nn.initializers.zeros
        ),
        projection=False,
    )
    x = jax.random.uniform(jax.random.key(0), (2, 5, 4, 3))

    y, _ = jax.jit(block.init_with_output)(jax.random.key(1), x)

    np.testing.assert_array_equal(y[..., :3], x[:, ::2, ::2])
    np.testing.assert_array_equal(y[..., 3:], 0)


@pytest.mark.parametrize(
    ("name", "last_norm"),
    [
        ("resnet8", "norm2"),
        ("resnet20", "norm2"),
        ("resnet50", "norm3"),
        ("mobilenet_v2", "project_norm"),
    ],
)
def test_scales_that_start_at_zero(name, last_norm):
    def scales_of_zero(**options):
        model = make_model(name, num_classes=10, **options)
        params = make_variables(model, jnp.zeros((1, 32, 32, 3)))["params"]
        blocks = {block for block in params if "_block" in block}
        return blocks, {
            tuple(key.key for key in path[:-1])
            for path, leaf in jax.tree_util.tree_leaves_with_path(params)
            if path[-1].key == "scale" and not leaf.any()
        }

    blocks, found = scales_of_zero(zero_init_residual=True)
    if name == "mobilenet_v2":
        # The first block of a stage changes the shape, and has no shortcut.
        blocks = {block for block in blocks if not block.endswith("_block1")}
    assert found == {(block, last_norm) for block in blocks}
    assert not scales_of_zero()[1]


def convolved(x, kernel, stride=1):
    padding = [((size - 1) // 2,) * 2 for size in kernel.shape[:2]]
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=numbers
    )


def normalised(x, weights, averages):
    x = (x - averages["mean"]) / np.sqrt(averages["var"] + 1e-5)
    return x * weights["scale"] + weights["bias"]


def random_variables(module, *args, **options):
    shapes = jax.eval_shape(functools.partial(module.init, **options), jax.random.key(0), *args)
    rng = np.random.default_rng(0)

    def draw(leaf):
        values = rng.uniform(0.5, 1, leaf.shape)
        # Variances are positive; kernels have both signs.
        return values - 0.5 * rng.integers(0, 3, leaf.shape) if leaf.ndim > 1 else values

    return jax.tree.map(draw, shapes)


@pytest.mark.parametrize(
    ("block", "strides"), [(resnet.BasicBlock, (2, 1)), (resnet.Bottleneck, (1, 2, 1))]
)
def test_residual_blocks_by_hand(block, strides):
    """Figure 5 of the paper; a bottleneck has its stride in the 3x3 convolution."""
    block = block(filters=4, stride=2, norm=functools.partial(nn.BatchNorm, True))
    x = np.random.default_rng(1).normal(size=(2, 6, 6, 3)).astype(np.float32)
    variables = random_variables(block, x)
    params, averages = variables["params"], variables["batch_stats"]

    h = x
    for i, stride in enumerate(strides, start=1):
        h = convolved(nn.relu(h) if i > 1 else h, params[f"conv{i}"]["kernel"], stride)
        h = normalised(h, params[f"norm{i}"], averages[f"norm{i}"])
    shortcut = convolved(x, params["shortcut_conv"]["kernel"], 2)
    shortcut = normalised(shortcut, params["shortcut_norm"], averages["shortcut_norm"])

    np.testing.assert_allclose(
        jax.jit(block.apply)(variables, x), nn.relu(h + shortcut), rtol=1e-4, atol=1e-4
    )


def test_residual_network_without_blocks_by_hand():
    """The stem for small images, pooling and the classifier."""
    network = resnet.ResNet(stage_sizes=(), num_classes=5, width=4)
    x = np.random.default_rng(1).normal(size=(2, 6, 6, 3)).astype(np.float32)
    variables = random_variables(network, x, train=False)
    params, averages = variables["params"], variables["batch_stats"]

    h = convolved(x, params["stem_conv"]["kernel"])
    h = nn.relu(normalised(h, params["stem_norm"], averages["stem_norm"])).mean((1, 2))

    np.testing.assert_allclose(
        network.apply(variables, x, train=False),
        h @ params["head"]["kernel"] + params["head"]["bias"],
        rtol=1e-4,
        atol=1e-4,
    )


# The families with fewer layers than any of `MODELS`, for they take long to compile.
SHALLOW = {
    "resnet": functools.partial(resnet.ResNet, stage_sizes=(2, 2), width=4),
    "resnet without projections": functools.partial(
        resnet.ResNet,
        stage_sizes=(2, 2),
        width=4,
        block=functools.partial(resnet.BasicBlock, projection=False),
    ),
    "bottleneck": functools.partial(
        resnet.ResNet, stage_sizes=(2, 2), width=4, block=resnet.Bottleneck
    ),
    "densenet": functools.partial(
        densenet.DenseNet, block_sizes=(2, 1), growth_rate=8, large_images=True
    ),
    "mobilenet_v1": mobilenet_v1.MobileNetV1,
    "mobilenet_v2": mobilenet_v2.MobileNetV2,
}


@pytest.fixture
def make_shallow(monkeypatch):
    monkeypatch.setattr(mobilenet_v1, "_BLOCKS", ((8, 1), (64, 2)))
    monkeypatch.setattr(mobilenet_v2, "_STAGES", ((1, 8, 1, 1), (6, 12, 2, 2)))
    return lambda name, **options: SHALLOW[name](num_classes=10, **options)


@pytest.mark.parametrize(
    "name", ["resnet", "resnet without projections", "bottleneck", "mobilenet_v2"]
)
def test_residual_blocks_start_as_their_shortcut(make_shallow, name):
    images = jax.random.normal(jax.random.key(1), (4, 16, 16, 3))

    @jax.jit
    def run(variables):
        _, state = make_shallow(name).apply(
            variables,
            images,
            train=True,
            capture_intermediates=lambda module, _: "_block" in (module.name or ""),
            mutable=["batch_stats", "intermediates"],
        )
        return {block: outputs["__call__"][0] for block, outputs in state["intermediates"].items()}

    outputs = run(make_variables(make_shallow(name, zero_init_residual=True), images))
    usual = run(make_variables(make_shallow(name), images))

    for block in outputs:
        before, is_second, _ = block.partition("_block2")
        if is_second:
            np.testing.assert_array_equal(outputs[block], outputs[before + "_block1"])
            assert not np.array_equal(usual[block], usual[before + "_block1"])


@pytest.mark.parametrize(
    ("name", "places"),
    [
        # After each convolution but the first.
        (
            "densenet",
            {
                *itertools.product(
                    ("block1_layer1", "block1_layer2", "block2_layer1"), ("Dropout_0", "Dropout_1")
                ),
                ("transition1", "Dropout_0"),
            },
        ),
        # Before the classifier.
        ("mobilenet_v1", {("Dropout_0",)}),
        ("mobilenet_v2", {("Dropout_0",)}),
    ],
)
def test_dropout_is_for_training(make_shallow, name, places):
    images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    model, without = make_shallow(name, dropout_rate=0.2), make_shallow(name)
    variables = make_variables(model, images)

    @functools.partial(jax.jit, static_argnames=("model", "train"))
    def run(model, rngs, train):
        logits, state = model.apply(
            variables,
            images,
            train=train,
            capture_intermediates=lambda module, _: isinstance(module, nn.Dropout),
            mutable=["batch_stats", "intermediates"],
            rngs=rngs,
        )
        return logits, state["intermediates"]

    first, second = ({"dropout": key} for key in jax.random.split(jax.random.key(2)))
    logits, outputs = run(model, first, True)

    np.testing.assert_array_equal(run(model, first, True)[0], logits)
    assert not np.any(run(model, second, True)[0] == logits)
    np.testing.assert_array_equal(run(model, {}, False)[0], run(without, {}, False)[0])
    jax.eval_shape(functools.partial(run, without, train=True), {})  # needs no key
    dropped = {
        tuple(key.key for key in path[:-2]): np.mean(leaf == 0)
        for path, leaf in jax.tree_util.tree_leaves_with_path(outputs)
    }
    assert set(dropped) == places
    np.testing.assert_allclose(list(dropped.values()), 0.2, atol=0.1)


def test_batchnorm_over_groups_of_devices():
    """Two groups of four devices are two batches on one device each."""
    make = functools.partial(resnet.ResNet, stage_sizes=(1,), num_classes=10, width=4)
    grouped, alone = make(axis_name="devices", axis_index_groups=GROUPS), make()
    images = jax.random.normal(jax.random.key(1), (2, 4, 3, 8, 8, 3))  # group, device, example
    images += jnp.arange(2).reshape(2, 1, 1, 1, 1, 1)
    variables = make_variables(alone, images[0, 0])

    def run(model, images):
        return model.apply(variables, images, train=True, mutable=["batch_stats"])

    mapped = jax.pmap(functools.partial(run, grouped), axis_name="devices")
    together = jax.jit(functools.partial(run, alone))
    logits, updated = mapped(images.reshape(8, 3, 8, 8, 3))

    for group, devices in enumerate(GROUPS):
        expected_logits, expected = together(images[group].reshape(12, 8, 8, 3))
        of_group = logits[np.array(devices)].reshape(12, 10)
        np.testing.assert_allclose(of_group, expected_logits, atol=2e-5)
        for device in devices:
            jax.tree.map(
                lambda got, wanted, i=device: np.testing.assert_allclose(got[i], wanted, atol=1e-5),
                updated,
                expected,
            )


# The networks that differ from these in sizes alone are left out.
@pytest.mark.parametrize(
    "name", ["resnet20", "resnet18", "resnet50", "densenet_bc40", "mobilenet_v1", "mobilenet_v2"]
)
def test_all_normalisations_take_their_statistics_over_the_groups(name):
    model = make_model(name, num_classes=1000, axis_name="devices", axis_index_groups=GROUPS)
    images, variables = jnp.zeros((2, 32, 32, 3)), traced(name).variables

    def run(variables, images):
        return model.apply(variables, images, train=True, mutable=["batch_stats"])

    jaxpr = jax.make_jaxpr(run, axis_env=[("devices", 8)])(variables, images)
    sums = [equation.params for equation in jaxpr.eqns if equation.primitive.name == "psum"]

    assert sums == [{"axes": ("devices",), "axis_index_groups": GROUPS}] * len(sums)
    # Each has a mean and a variance, and sums both at once.
    assert len(sums) == len(jax.tree.leaves(variables["batch_stats"])) // 2
