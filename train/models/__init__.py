"""The networks by name."""

import functools
from collections.abc import Callable

import flax.linen as nn

from train.models import densenet, mobilenet, resnet

_resnet = functools.partial(resnet.ResNet, width=64, large_images=True)
_densenet = functools.partial(densenet.DenseNet, growth_rate=32, large_images=True)

MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet8": functools.partial(resnet.ResNet, stage_sizes=(1, 1, 1), width=16),
    "resnet18": functools.partial(_resnet, stage_sizes=(2, 2, 2, 2)),
    "resnet34": functools.partial(_resnet, stage_sizes=(3, 4, 6, 3)),
    "resnet50": functools.partial(_resnet, stage_sizes=(3, 4, 6, 3), block=resnet.Bottleneck),
    "resnet101": functools.partial(_resnet, stage_sizes=(3, 4, 23, 3), block=resnet.Bottleneck),
    "densenet121": functools.partial(_densenet, block_sizes=(6, 12, 24, 16)),
    "densenet169": functools.partial(_densenet, block_sizes=(6, 12, 32, 32)),
    "mobilenet_v2": mobilenet.MobileNetV2,
}
