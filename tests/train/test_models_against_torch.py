"""The networks against those of `transformers` in PyTorch, with its weights carried over to ours.

They are left out of the default run, which needs no PyTorch:

    pip install -e '.[test,torch]' && python -m pytest -m torch

PyTorch is imported inside of functions, so that this module can be collected without it.
"""

import functools
import importlib
import re

import jax
import numpy as np
import pytest
from flax import traverse_util

from train.models import make_model

NUM_CLASSES = 10

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("compiled_fast")]


def make_resnet(transformers, block, depths):
    """With the stride in the 3x3 convolution of a bottleneck: version 1.5."""
    width = 64 if block == "basic" else 256
    config = transformers.ResNetConfig(
        layer_type=block,
        depths=depths,
        hidden_sizes=[width, 2 * width, 4 * width, 8 * width],
        downsample_in_bottleneck=False,
        num_labels=NUM_CLASSES,
    )
    return transformers.ResNetForImageClassification(config)


def resnet_module(name):
    """Our module for a module of theirs."""
    if name == "classifier.1":
        return ("head",)
    kind = {"convolution": "conv", "normalization": "norm"}[name.rpartition(".")[-1]]
    if name.startswith("resnet.embedder.embedder."):
        return (f"stem_{kind}",)
    pattern = r"resnet\.encoder\.stages\.(\d)\.layers\.(\d+)\.(shortcut|layer\.(\d))\.\w+"
    stage, block, _, layer = re.fullmatch(pattern, name).groups()
    part = f"shortcut_{kind}" if layer is None else f"{kind}{int(layer) + 1}"
    return (f"stage{int(stage) + 1}_block{int(block) + 1}", part)


def make_mobilenet(transformers):
    config = transformers.MobileNetV1Config(
        num_labels=NUM_CLASSES, layer_norm_eps=1e-5, classifier_dropout_prob=0.0
    )
    return transformers.MobileNetV1ForImageClassification(config)


def mobilenet_module(name):
    """Our module for a module of theirs."""
    if name == "classifier":
        return ("head",)
    kind = {"convolution": "conv", "normalization": "norm"}[name.rpartition(".")[-1]]
    if name.startswith("mobilenet_v1.conv_stem."):
        return (f"stem_{kind}",)
    layer = int(re.fullmatch(r"mobilenet_v1\.layer\.(\d+)\.\w+", name)[1])
    part = "depthwise" if layer % 2 == 0 else "pointwise"
    return (f"block{layer // 2 + 1}", f"{part}_{kind}")


NETWORKS = {
    "resnet18": (functools.partial(make_resnet, block="basic", depths=[2, 2, 2, 2]), resnet_module),
    "resnet34": (functools.partial(make_resnet, block="basic", depths=[3, 4, 6, 3]), resnet_module),
    "resnet50": (
        functools.partial(make_resnet, block="bottleneck", depths=[3, 4, 6, 3]),
        resnet_module,
    ),
    "resnet101": (
        functools.partial(make_resnet, block="bottleneck", depths=[3, 4, 23, 3]),
        resnet_module,
    ),
    "mobilenet_v1": (make_mobilenet, mobilenet_module),
}


def randomise(torch, model):
    """Values that no layer has at the start, and the gain of 2 that relu asks for."""
    generator = torch.Generator().manual_seed(0)
    for name, value in model.state_dict().items():  # shares memory with the model
        leaf = name.rpartition(".")[-1]
        if value.ndim > 1:
            value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=generator)
        elif leaf in ("weight", "running_var"):
            value.uniform_(0.5, 1.5, generator=generator)
        elif leaf in ("bias", "running_mean"):
            value.normal_(0, 0.3, generator=generator)
        else:
            assert leaf == "num_batches_tracked"


def to_ours(model, module_of):
    """Our variables with PyTorch's values, each of which has exactly one place."""
    flat = {}
    weights = {
        name: value.numpy().copy()
        for name, value in model.state_dict().items()
        if not name.endswith(".num_batches_tracked")
    }
    for name, value in weights.items():
        module, _, leaf = name.rpartition(".")
        collection, ours = {
            "weight": ("params", "scale" if value.ndim == 1 else "kernel"),
            "bias": ("params", "bias"),
            "running_mean": ("batch_stats", "mean"),
            "running_var": ("batch_stats", "var"),
        }[leaf]
        # Output, input, height, width; and output, input.
        axes = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[value.ndim]
        flat[collection, *module_of(module), ours] = np.transpose(value, axes)
    assert len(flat) == len(weights)
    return traverse_util.unflatten_dict(flat)


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_are_those_of_transformers(monkeypatch, name):
    """In evaluation and in training."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch, transformers = map(importlib.import_module, ("torch", "transformers"))
    make, module_of = NETWORKS[name]
    theirs = make(transformers)
    randomise(torch, theirs)
    variables = to_ours(theirs, module_of)

    ours = make_model(name, num_classes=NUM_CLASSES)
    # Odd in one direction and even in the other: which side is padded differs.
    images = np.random.default_rng(1).normal(size=(8, 64, 45, 3)).astype(np.float32)
    shapes = jax.eval_shape(lambda: ours.init(jax.random.key(0), images, train=False))
    assert jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, shapes)

    @jax.jit
    def run(variables, images):
        evaluated = ours.apply(variables, images, train=False)
        trained, _ = ours.apply(variables, images, train=True, mutable=["batch_stats"])
        return evaluated, trained

    evaluated, trained = run(variables, images)
    pixels = torch.tensor(images).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = [theirs.train(train)(pixels).logits.numpy() for train in (False, True)]
    # Each normalisation by a batch's own statistics magnifies rounding errors.
    for got, wanted, tolerance in zip((evaluated, trained), expected, (1e-4, 1e-3), strict=True):
        assert got.shape == wanted.shape
        assert np.max(np.abs(got - wanted)) < tolerance * np.max(np.abs(wanted))
