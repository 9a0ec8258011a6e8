"""The per-example gradients of PyTorch's libraries, on layers that they get right.

They are left out of the default run, which needs no PyTorch:

    pip install -e '.[test,torch]' && python -m pytest -m torch

PyTorch is imported inside of functions, so that this module can be collected without it.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clars_optax
from tests.norms.models import normal

NUM_EXAMPLES = 6
NUM_CLASSES = 5
LABELS = np.arange(NUM_EXAMPLES) % NUM_CLASSES

# What the libraries warn of (backward hooks that are to change) is theirs.
pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]


class Layer(NamedTuple):
    """A layer of `torch.nn` with its arguments, and the same in plain JAX on PyTorch's arrays."""

    name: str
    options: dict[str, Any]
    example_shape: tuple[int, ...]
    apply: Callable[..., jax.Array]


def linear(p, x):
    return x @ p["weight"].T + p["bias"]


def embedding(p, x):
    return p["weight"][x]


def normalised(x, axes):
    x = x - x.mean(axes, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(axes, keepdims=True) + 1e-5)


def layer_norm(p, x):
    return normalised(x, (-1,)) * p["weight"] + p["bias"]


def group_norm(p, x):
    n, c, h, w = x.shape
    x = normalised(x.reshape(n, 2, c // 2, h, w), (2, 3, 4)).reshape(x.shape)
    return x * p["weight"][:, None, None] + p["bias"][:, None, None]


def instance_norm(p, x):
    return normalised(x, (2, 3)) * p["weight"][:, None, None] + p["bias"][:, None, None]


def convolution(rank, *, stride=1, padding=0, dilation=1, groups=1, kernel_size=3):
    def apply(p, x):
        axes = "DHW"[:rank]
        h = jax.lax.conv_general_dilated(
            x,
            p["weight"],
            np.broadcast_to(stride, rank).tolist(),
            [(pad, pad) for pad in np.broadcast_to(padding, rank).tolist()],
            rhs_dilation=np.broadcast_to(dilation, rank).tolist(),
            dimension_numbers=(f"NC{axes}", f"OI{axes}", f"NC{axes}"),
            feature_group_count=groups,
        )
        return h + p["bias"].reshape(-1, *[1] * rank)

    options = {
        "in_channels": 4,
        "out_channels": 8,
        "kernel_size": kernel_size,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
    }
    return Layer(f"Conv{rank}d", options, (4, *(7, 6, 5)[-rank:]), apply)


CONVOLUTIONS = {
    "conv1d": convolution(1, stride=2, padding=1),
    "conv1d dilated": convolution(1, dilation=2, padding=2),
    "conv1d grouped": convolution(1, dilation=2, padding=1, groups=2),
    "conv2d": convolution(2, padding=1),
    "conv2d pointwise": convolution(2, kernel_size=1),
    "conv2d strided": convolution(2, kernel_size=(3, 2), stride=(2, 1), padding=(1, 0)),
    "conv2d dilated": convolution(2, kernel_size=2, dilation=(2, 3), padding=1),
    "conv2d grouped": convolution(2, stride=2, padding=1, groups=2),
    "conv3d": convolution(3, kernel_size=(2, 3, 2), stride=(1, 2, 1), padding=(0, 1, 1)),
    "conv3d grouped": convolution(3, kernel_size=2, stride=2, dilation=2, padding=1, groups=2),
}
LINEAR = Layer("Linear", {"in_features": 5, "out_features": 4}, (5,), linear)

OPACUS = CONVOLUTIONS | {
    "linear": LINEAR,
    "linear on sequences": LINEAR._replace(example_shape=(3, 5)),
    "conv1d depthwise": convolution(1, padding=2, groups=4),
    "conv2d depthwise": convolution(2, stride=(2, 1), padding=1, groups=4),
    "embedding": Layer("Embedding", {"num_embeddings": 7, "embedding_dim": 4}, (4,), embedding),
    "layer norm": Layer("LayerNorm", {"normalized_shape": 5}, (3, 5), layer_norm),
    "group norm": Layer("GroupNorm", {"num_groups": 2, "num_channels": 4}, (4, 3, 3), group_norm),
    "instance norm": Layer(
        "InstanceNorm2d", {"num_features": 4, "affine": True}, (4, 3, 3), instance_norm
    ),
}
# BackPACK has no such rule for normalisations, and is wrong by 20 % and more on convolutions with
# groups, where Opacus is right.
BACKPACK = {
    name: layer
    for name, layer in (CONVOLUTIONS | {"linear": LINEAR}).items()
    if layer.options.get("groups", 1) == 1
}


def make(layer):
    """The layer, a nonlinearity and a classifier, and a batch; in float64."""
    torch = importlib.import_module("torch")
    torch.manual_seed(0)
    if layer.name == "Embedding":
        # Few words, which are repeated.
        count = NUM_EXAMPLES * layer.example_shape[0]
        batch = torch.arange(count).reshape(NUM_EXAMPLES, -1) ** 2 % 7
    else:
        batch = torch.tensor(np.asarray(normal(0, NUM_EXAMPLES, *layer.example_shape))).double()
    first = getattr(torch.nn, layer.name)(**layer.options).double()
    width = first(batch)[0].numel()
    last = torch.nn.Linear(width, NUM_CLASSES).double()
    model = torch.nn.Sequential(first, torch.nn.Tanh(), torch.nn.Flatten(), last)
    with torch.no_grad():
        # Scales and biases that are not at their initial values.
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return torch, model, batch


def check(layer, model, batch, expected):
    """Our norms of the same network, with the same weights."""
    params = {
        name: jnp.asarray(p.detach().numpy(), jnp.float32) for name, p in model.named_parameters()
    }

    def loss(params, x, labels):
        first, last = (
            {name.split(".")[1]: p for name, p in params.items() if name.startswith(which)}
            for which in "03"
        )
        h = jnp.tanh(layer.apply(first, x))
        logits = linear(last, h.reshape(h.shape[0], -1))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    x = batch.numpy()
    x = jnp.asarray(x, jnp.int32 if x.dtype == np.int64 else jnp.float32)
    step = clars_optax.value_and_grad_and_norms(loss, batch_argnums=(1, 2))
    _, _, norms = jax.jit(step)(params, x, LABELS)
    assert norms.keys() == expected.keys()
    for name, wanted in expected.items():
        assert wanted.shape == (NUM_EXAMPLES,)
        assert np.max(np.abs(norms[name] - wanted)) < 1e-5 * np.max(wanted), name


@pytest.mark.parametrize("name", OPACUS)
def test_opacus(name):
    torch, model, batch = make(OPACUS[name])
    opacus = importlib.import_module("opacus")
    wrapped = opacus.GradSampleModule(model, loss_reduction="mean")
    torch.nn.CrossEntropyLoss()(wrapped(batch), torch.tensor(LABELS)).backward()
    expected = {
        name: np.linalg.norm(p.grad_sample.reshape(NUM_EXAMPLES, -1).numpy(), axis=1)
        for name, p in model.named_parameters()
    }
    check(OPACUS[name], model, batch, expected)


@pytest.mark.parametrize("name", BACKPACK)
def test_backpack(name):
    torch, model, batch = make(BACKPACK[name])
    backpack = importlib.import_module("backpack")
    extensions = importlib.import_module("backpack.extensions")
    model, cross_entropy = backpack.extend(model), backpack.extend(torch.nn.CrossEntropyLoss())
    with backpack.backpack(extensions.BatchL2Grad()):
        cross_entropy(model(batch), torch.tensor(LABELS)).backward()
    # Squared norms of the examples' shares of the mean.
    expected = {
        name: NUM_EXAMPLES * np.sqrt(p.batch_l2.numpy()) for name, p in model.named_parameters()
    }
    check(BACKPACK[name], model, batch, expected)
