"""The networks against `keras.applications`, with Keras's weights carried over to ours.

Keras runs on JAX; it needs no TensorFlow. It is imported inside of a fixture, so that this module
can be collected without it, and so that its backend can be chosen first.
"""

import functools
import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from flax import traverse_util

from train.models import make_model

NUM_CLASSES = 10
EPSILON = 1e-5  # ours; Keras's networks have several
MOMENTUM = 0.9

pytestmark = [pytest.mark.keras, pytest.mark.usefixtures("compiled_fast")]


class Network(NamedTuple):
    """A network of ours, its counterpart, and which module is which layer.

    `block_sizes` are other ones than those of the two networks.
    """

    name: str
    keras_name: str
    layers: dict[tuple[str, ...], str]
    block_sizes: tuple[int, ...] | None = None
    # Odd in one direction and even in the other: which side is padded differs.
    image_size: tuple[int, int] = (64, 45)
    options: Mapping[str, Any] = MappingProxyType({})


def densenet(name, keras_name, block_sizes, in_full=True):
    layers = {
        ("stem_conv",): "conv1_conv",
        ("stem_norm",): "conv1_bn",
        ("head_norm",): "bn",
        ("head",): "predictions",
    }
    for block, num_layers in enumerate(block_sizes, start=1):
        for layer in range(1, num_layers + 1):
            ours, theirs = f"block{block}_layer{layer}", f"conv{block + 1}_block{layer}"
            layers[ours, "norm1"] = f"{theirs}_0_bn"
            layers[ours, "conv1"] = f"{theirs}_1_conv"
            layers[ours, "norm2"] = f"{theirs}_1_bn"
            layers[ours, "conv2"] = f"{theirs}_2_conv"
        if block < len(block_sizes):
            layers[f"transition{block}", "norm"] = f"pool{block + 1}_bn"
            layers[f"transition{block}", "conv"] = f"pool{block + 1}_conv"
    return Network(name, keras_name, layers, None if in_full else block_sizes)


def mobilenet_v1():
    layers = {("stem_conv",): "conv1", ("stem_norm",): "conv1_bn", ("head",): "conv_preds"}
    for block in range(1, 14):
        for ours, theirs in (("depthwise", "dw"), ("pointwise", "pw")):
            layers[f"block{block}", f"{ours}_conv"] = f"conv_{theirs}_{block}"
            layers[f"block{block}", f"{ours}_norm"] = f"conv_{theirs}_{block}_bn"
    # Keras's strided depthwise convolutions drop the last pixel of an odd size, unlike "SAME". From
    # 63 pixels they see even sizes only. Other sizes are tested against PyTorch.
    return Network("mobilenet_v1", "MobileNet", layers, None, (64, 63), {"dropout": 0.0})


def mobilenet_v2():
    layers = {
        ("stem_conv",): "Conv1",
        ("stem_norm",): "bn_Conv1",
        ("head_conv",): "Conv_1",
        ("head_norm",): "Conv_1_bn",
        ("head",): "predictions",
    }
    block_names = [
        f"stage{stage}_block{block}"
        for stage, num_blocks in enumerate((1, 2, 3, 4, 3, 3, 1), start=1)
        for block in range(1, num_blocks + 1)
    ]
    for i, ours in enumerate(block_names):
        theirs = f"block_{i}" if i > 0 else "expanded_conv"
        for part in ("expand", "depthwise", "project") if i > 0 else ("depthwise", "project"):
            layers[ours, f"{part}_conv"] = f"{theirs}_{part}"
            layers[ours, f"{part}_norm"] = f"{theirs}_{part}_BN"
    return Network("mobilenet_v2", "MobileNetV2", layers)


@pytest.fixture(scope="module")
def keras(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_BACKEND", "jax")
        patch.setenv("KERAS_HOME", str(tmp_path_factory.mktemp("keras")))
        keras = importlib.import_module("keras")
        # Values that are replaced need not be drawn, which takes JAX long.
        patch.setattr(
            keras.initializers.GlorotUniform,
            "__call__",
            lambda self, shape, dtype=None, **_: np.zeros(shape, dtype),
        )
        yield keras


def random_values(model):
    """Values for all weights of Keras's model, by path."""
    rng = np.random.default_rng(0)
    values = {}
    for variable in model.variables:
        shape = variable.shape
        match variable.path.rpartition("/")[-1]:
            case "kernel":
                is_depthwise = len(shape) == 4 and shape[-1] == 1
                fan_in = np.prod(shape[:2] if is_depthwise else shape[:-1])
                value = rng.normal(0, np.sqrt(2 / fan_in), shape)
            case "gamma" | "moving_variance":
                value = rng.uniform(0.5, 1.5, shape)
            case "beta" | "bias" | "moving_mean":
                value = rng.normal(0, 0.3, shape)
            case unknown:
                raise AssertionError(unknown)
        values[variable.path] = value.astype(np.float32)
    assert len(values) == len(model.variables)
    return values


PLACES = {
    "kernel": ("params", "kernel"),
    "bias": ("params", "bias"),
    "gamma": ("params", "scale"),
    "beta": ("params", "bias"),
    "moving_mean": ("batch_stats", "mean"),
    "moving_variance": ("batch_stats", "var"),
}


def to_ours(layers, values):
    """Our variables with Keras's values, each of which has exactly one place."""
    paths = {layer: path for path, layer in layers.items()}
    assert len(paths) == len(layers)
    flat = {}
    for name, value in values.items():
        layer, _, weight = name.rpartition("/")
        path = paths[layer]
        if path[-1] == "depthwise_conv":
            value = np.swapaxes(value, 2, 3)
        if layer == "conv_preds" and weight == "kernel":  # a 1x1 convolution
            value = np.squeeze(value, (0, 1))
        collection, leaf = PLACES[weight]
        flat[collection, *path, leaf] = value
    assert len(flat) == len(values)
    return traverse_util.unflatten_dict(flat)


def check_equal(got, wanted):
    assert got.shape == wanted.shape
    assert np.max(np.abs(got - wanted)) < 1e-4 * np.max(np.abs(wanted))


@pytest.mark.parametrize(
    "network",
    [
        # In full they take long to compile. `test_models.py` counts their parameters.
        densenet("densenet121", "DenseNet121", (2, 3, 1, 2), in_full=False),
        *(
            pytest.param(densenet(*of_full), marks=pytest.mark.long, id=of_full[0])
            for of_full in (
                ("densenet121", "DenseNet121", (6, 12, 24, 16)),
                ("densenet169", "DenseNet169", (6, 12, 32, 32)),
            )
        ),
        mobilenet_v1(),
        mobilenet_v2(),
    ],
    ids=lambda network: network.name + "-shallow" * (network.block_sizes is not None),
)
def test_logits_are_those_of_keras(keras, network):
    """In evaluation and in training, and the running averages after it."""
    ours = make_model(network.name, num_classes=NUM_CLASSES, norm_momentum=MOMENTUM)
    make_theirs = getattr(keras.applications, network.keras_name)
    if network.block_sizes is not None:
        ours = ours.clone(block_sizes=network.block_sizes)
        family = importlib.import_module(make_theirs.__module__)
        make_theirs = functools.partial(family.DenseNet, network.block_sizes)
    theirs = make_theirs(
        weights=None,
        input_shape=(*network.image_size, 3),
        classes=NUM_CLASSES,
        classifier_activation=None,
        **network.options,
    )
    for layer in theirs.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.epsilon, layer.momentum = EPSILON, MOMENTUM
    values = random_values(theirs)
    trainable, others = (
        [variable.path for variable in variables]
        for variables in (theirs.trainable_variables, theirs.non_trainable_variables)
    )

    variables = to_ours(network.layers, values)
    images = np.random.default_rng(1).normal(size=(4, *network.image_size, 3)).astype(np.float32)
    shapes = jax.eval_shape(lambda: ours.init(jax.random.key(0), images, train=False))
    assert jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, shapes)

    @jax.jit
    def run_theirs(values, images):
        arguments = [values[path] for path in trainable], [values[path] for path in others]
        evaluated, _ = theirs.stateless_call(*arguments, images, training=False)
        trained, updated = theirs.stateless_call(*arguments, images, training=True)
        return evaluated, trained, dict(zip(others, updated, strict=True))

    @jax.jit
    def run_ours(variables, images):
        evaluated = ours.apply(variables, images, train=False)
        return evaluated, *ours.apply(variables, images, train=True, mutable=["batch_stats"])

    *logits, updated = run_ours(variables, images)
    *wanted_logits, wanted = run_theirs(values, images)
    for got, expected in zip(logits, wanted_logits, strict=True):
        check_equal(got, expected)
    jax.tree.map(check_equal, updated, to_ours(network.layers, wanted))
