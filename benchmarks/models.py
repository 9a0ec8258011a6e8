"""The models that are measured: a loss, its parameters and a batch, by name."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

import train.models
from benchmarks.vit import ViT
from train.models.densenet import DenseNet
from train.models.resnet import ResNet


class Problem(NamedTuple):
    """A loss to differentiate.

    Attributes:
        loss_fn: `loss_fn(params, *batch)` is a mean over the examples.
        params: the parameters.
        batch: arrays with the examples along axis 0.
    """

    loss_fn: Callable[..., jax.Array]
    params: Any
    batch: tuple[jax.Array, ...]

    @property
    def args(self) -> tuple[Any, ...]:
        """What `loss_fn` is called with."""
        return (self.params, *self.batch)

    @property
    def batch_argnums(self) -> tuple[int, ...]:
        """The positions of the batch in `args`."""
        return tuple(range(1, len(self.args)))

    @property
    def batch_size(self) -> int:
        """The number of examples."""
        return self.batch[0].shape[0]


class MLP(nn.Module):
    """A perceptron with ReLU between its layers.

    Attributes:
        widths: outputs of each layer.
    """

    widths: Sequence[int]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [N, d] to [N, widths[-1]]."""
        for width in self.widths[:-1]:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.widths[-1])(x)


def make_problem(
    model: nn.Module,
    example_shape: tuple[int, ...],
    batch_size: int,
    *,
    num_classes: int = 10,
    dtype: DTypeLike = jnp.float32,
    **kwargs: Any,
) -> Problem:
    """Cross-entropy of a Flax model on random examples.

    Args:
        model: gives logits.
        example_shape: shape of one input.
        batch_size: number of examples.
        num_classes: number of logits.
        dtype: of the inputs.
        **kwargs: passed to the model.
    """
    keys = jax.random.split(jax.random.key(0), 3)
    inputs = jax.random.normal(keys[0], (batch_size, *example_shape), dtype)
    labels = jax.random.randint(keys[1], (batch_size,), 0, num_classes)
    variables = jax.jit(functools.partial(model.init, **kwargs))(keys[2], inputs[:1])
    rest = {name: values for name, values in variables.items() if name != "params"}

    def loss_fn(params: Any, inputs: jax.Array, labels: jax.Array) -> jax.Array:
        # BatchNorm's running averages are updated and thrown away: the compiler removes them.
        logits, _ = model.apply(
            {"params": params, **rest}, inputs, mutable=["batch_stats"], **kwargs
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
        return jnp.mean(losses)

    return Problem(loss_fn, variables["params"], (inputs, labels))


def _imagenet(name: str, batch_size: int = 256) -> Problem:
    dtype = jnp.bfloat16
    model = train.models.MODELS[name](num_classes=1000, dtype=dtype)
    return make_problem(model, (224, 224, 3), batch_size, num_classes=1000, dtype=dtype, train=True)


def mlp(batch_size: int = 512) -> Problem:
    """784-1024-1024-10."""
    return make_problem(MLP((1024, 1024, 10)), (784,), batch_size)


def resnet18(batch_size: int = 32) -> Problem:
    """ResNet-18 of half the usual width, 32x32 pixels."""
    model = ResNet(stage_sizes=(2, 2, 2, 2), num_classes=10, width=32)
    return make_problem(model, (32, 32, 3), batch_size, train=True)


def densenet(batch_size: int = 32) -> Problem:
    """DenseNet-BC of three blocks of 6 layers with growth rate 12, 64x64 pixels."""
    model = DenseNet(block_sizes=(6, 6, 6), num_classes=10, growth_rate=12, large_images=True)
    return make_problem(model, (64, 64, 3), batch_size, train=True)


def mobilenet(batch_size: int = 32) -> Problem:
    """MobileNetV2, 64x64 pixels."""
    model = train.models.MODELS["mobilenet_v2"](num_classes=10)
    return make_problem(model, (64, 64, 3), batch_size, train=True)


def vit(batch_size: int = 32, *, scan: bool = False) -> Problem:
    """ViT-Ti, 64x64 pixels in patches of 8."""
    model = ViT(num_classes=10, patch_size=8, width=192, depth=12, num_heads=3, scan=scan)
    return make_problem(model, (64, 64, 3), batch_size)


def vit_s(batch_size: int = 256) -> Problem:
    """ViT-S, 224x224 pixels in patches of 16."""
    dtype = jnp.bfloat16
    model = ViT(1000, patch_size=16, width=384, depth=12, num_heads=6, dtype=dtype)
    return make_problem(model, (224, 224, 3), batch_size, num_classes=1000, dtype=dtype)


MODELS: dict[str, Callable[..., Problem]] = {
    "mlp": mlp,
    "resnet18": resnet18,
    "densenet": densenet,
    "mobilenet": mobilenet,
    "vit": vit,
    "vit_scan": functools.partial(vit, scan=True),
    "resnet50": functools.partial(_imagenet, "resnet50"),
    "densenet121": functools.partial(_imagenet, "densenet121"),
    "mobilenet_v2": functools.partial(_imagenet, "mobilenet_v2"),
    "vit_s": vit_s,
}

PRESETS: dict[str, tuple[str, ...]] = {
    "cpu": ("mlp", "resnet18", "densenet", "mobilenet", "vit", "vit_scan"),
    "gpu": ("resnet50", "densenet121", "mobilenet_v2", "vit_s"),
}


def problem_of(name: str, batch_size: int | None = None) -> Problem:
    """Makes one of `MODELS`; of its own batch size if none is given."""
    return MODELS[name](batch_size=batch_size) if batch_size else MODELS[name]()
