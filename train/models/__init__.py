"""The networks by name."""

import functools
from collections.abc import Callable

import flax.linen as nn

from train.models import resnet

MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet8": functools.partial(resnet.ResNet, stage_sizes=(1, 1, 1), width=16),
}
