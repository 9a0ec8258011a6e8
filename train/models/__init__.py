"""The networks by name."""

import functools
import inspect
from collections.abc import Callable, Sequence

import flax.linen as nn
from jax.typing import DTypeLike

from train.models import densenet, mobilenet_v1, mobilenet_v2, resnet

# The paper's networks for small images have no parameters in their shortcuts (section 4.2).
_small_resnet = functools.partial(
    resnet.ResNet, width=16, block=functools.partial(resnet.BasicBlock, projection=False)
)
_resnet = functools.partial(resnet.ResNet, width=64, large_images=True)
_small_densenet = functools.partial(densenet.DenseNet, growth_rate=12)
_densenet = functools.partial(densenet.DenseNet, growth_rate=32, large_images=True)

MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet8": functools.partial(resnet.ResNet, stage_sizes=(1, 1, 1), width=16),
    "resnet20": functools.partial(_small_resnet, stage_sizes=(3, 3, 3)),
    "resnet56": functools.partial(_small_resnet, stage_sizes=(9, 9, 9)),
    "resnet18": functools.partial(_resnet, stage_sizes=(2, 2, 2, 2)),
    "resnet34": functools.partial(_resnet, stage_sizes=(3, 4, 6, 3)),
    "resnet50": functools.partial(_resnet, stage_sizes=(3, 4, 6, 3), block=resnet.Bottleneck),
    "resnet101": functools.partial(_resnet, stage_sizes=(3, 4, 23, 3), block=resnet.Bottleneck),
    "densenet_bc40": functools.partial(_small_densenet, block_sizes=(6, 6, 6)),
    "densenet_bc": functools.partial(_small_densenet, block_sizes=(16, 16, 16)),
    "densenet121": functools.partial(_densenet, block_sizes=(6, 12, 24, 16)),
    "densenet169": functools.partial(_densenet, block_sizes=(6, 12, 32, 32)),
    "mobilenet_v1": mobilenet_v1.MobileNetV1,
    "mobilenet_v2": mobilenet_v2.MobileNetV2,
    "mobilenet_v2_small": functools.partial(mobilenet_v2.MobileNetV2, large_images=False),
}


def make_model(
    name: str,
    *,
    num_classes: int,
    norm_momentum: float = 0.9,
    axis_name: str | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    dtype: DTypeLike | None = None,
    dropout_rate: float = 0.0,
    zero_init_residual: bool = False,
) -> nn.Module:
    """Makes a network, and computes nothing: a call is the cheapest check of its options.

    Args:
        name: a key of `MODELS`.
        num_classes: number of logits.
        norm_momentum: decay rate of BatchNorm's running averages, per step.
        axis_name: mapped axis over which BatchNorm takes its statistics; None for one device.
        axis_index_groups: groups of that axis's indices, each with its own statistics; None for
            one group of all.
        dtype: of the computation, as opposed to the parameters; None for that of the images.
        dropout_rate: share of values that are dropped in training, where the family's paper or its
            authors' code drops any.
        zero_init_residual: whether the last normalisation of each residual block starts with a
            scale of 0, so that the block starts as its shortcut.

    Raises:
        ValueError: if there is no such network, or it has no place for an option.
    """
    if name not in MODELS:
        raise ValueError(f"--model is {name!r}, but must be one of {', '.join(MODELS)}.")
    options = {"dropout_rate": dropout_rate, "zero_init_residual": zero_init_residual}
    asked_for = {option: value for option, value in options.items() if value}
    for option, value in asked_for.items():
        having = [other for other, make in MODELS.items() if option in _parameters(make)]
        if name not in having:
            flag = option.replace("_", "-")
            # A named configuration may have brought it.
            without = f"--no-{flag}" if value is True else f"--{flag} 0"
            raise ValueError(
                f"--{flag} is {value}, but {name} has no place for it: say {without}, or choose "
                f"one of {', '.join(having)}."
            )
    return MODELS[name](
        num_classes=num_classes,
        norm_momentum=norm_momentum,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        dtype=dtype,
        **asked_for,
    )


def _parameters(make: Callable[..., nn.Module]) -> set[str]:
    return set(inspect.signature(make).parameters)
