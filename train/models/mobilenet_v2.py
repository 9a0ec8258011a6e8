"""MobileNetV2: Sandler, Howard, Zhu, Zhmoginov, Chen (CVPR 2018), tables 1 and 2.

Its residual blocks are turned inside out: thin at both ends, where the shortcut is, and wide in the
middle, where each channel has a 3x3 filter of its own. The last convolution of a block is linear.

Padding is TensorFlow's "SAME", which is Flax's default too, as in the authors' code.
"""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from train.models import layers

# Expansion t, channels c, repetitions n, stride s of the first one (table 2).
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, linear 1x1 projection (table 1).

    Attributes:
        expansion: channels in the middle, in channels of the input.
        filters: channels of the output.
        stride: stride of the depthwise convolution.
        norm: makes a normalisation layer.
        dtype: of the computation; None for that of the input.
        zero_init_residual: whether the last normalisation starts with a scale of 0, in blocks with
            a shortcut: nothing would come through the others.
    """

    expansion: int
    filters: int
    stride: int
    norm: functools.partial[nn.BatchNorm]
    dtype: DTypeLike | None = None
    zero_init_residual: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [N, H, W, C] to [N, H / stride, W / stride, filters]."""
        conv = layers.conv(self.dtype)
        has_shortcut = self.stride == 1 and x.shape[-1] == self.filters
        hidden = self.expansion * x.shape[-1]
        y = x
        if self.expansion > 1:
            y = conv(hidden, (1, 1), name="expand_conv")(y)
            y = nn.relu6(self.norm(name="expand_norm")(y))
        y = conv(
            hidden,
            (3, 3),
            strides=self.stride,
            feature_group_count=hidden,
            name="depthwise_conv",
        )(y)
        y = nn.relu6(self.norm(name="depthwise_norm")(y))
        y = conv(self.filters, (1, 1), name="project_conv")(y)
        scale_init = layers.residual_scale_init(self.zero_init_residual and has_shortcut)
        y = self.norm(scale_init=scale_init, name="project_norm")(y)
        return x + y if has_shortcut else y


class MobileNetV2(nn.Module):
    """MobileNetV2 of width 1.

    Attributes:
        num_classes: number of logits.
        large_images: whether the network is the one for ImageNet, or one for images of about 32
            pixels. The paper has no such network; as usual in public adaptations to CIFAR, the stem
            and the second stage have stride 1 instead of 2, so that the last feature map has 4x4
            pixels instead of one.
        norm_momentum: decay rate of BatchNorm's running averages, per step.
        axis_name: mapped axis over which BatchNorm takes its statistics; None for one device.
        axis_index_groups: groups of that axis's indices, each with its own statistics; None for
            one group of all.
        dtype: of the computation, as opposed to the parameters; None for that of the images.
        dropout_rate: share of features that are dropped before the classifier; the authors' code
            takes 0.2.
        zero_init_residual: whether the last normalisation of each block with a shortcut starts with
            a scale of 0, so that the block starts as the identity.
    """

    num_classes: int
    large_images: bool = True
    norm_momentum: float = 0.9
    axis_name: str | None = None
    axis_index_groups: Sequence[Sequence[int]] | None = None
    dtype: DTypeLike | None = None
    dropout_rate: float = 0.0
    zero_init_residual: bool = False

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Maps images [N, H, W, C] to logits [N, num_classes].

        Args:
            images: normalised images.
            train: whether BatchNorm uses the statistics of this batch and updates its averages, or
                uses the averages; and whether features are dropped, by the "dropout" keys.
        """
        conv = layers.conv(self.dtype)
        norm = layers.batch_norm(
            train=train,
            momentum=self.norm_momentum,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            dtype=self.dtype,
        )
        x = conv(32, (3, 3), strides=2 if self.large_images else 1, name="stem_conv")(images)
        x = nn.relu6(norm(name="stem_norm")(x))
        for stage, (expansion, filters, repetitions, stride) in enumerate(_STAGES):
            if stage == 1 and not self.large_images:
                stride = 1
            for block in range(repetitions):
                x = InvertedResidual(
                    expansion,
                    filters,
                    stride if block == 0 else 1,
                    norm,
                    self.dtype,
                    self.zero_init_residual,
                    name=f"stage{stage + 1}_block{block + 1}",
                )(x)
        x = conv(1280, (1, 1), name="head_conv")(x)
        x = nn.relu6(norm(name="head_norm")(x))
        x = jnp.mean(x, axis=(1, 2))
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x)
