"""MobileNet: Howard, Zhu, Chen, Kalenichenko, Wang, Weyand, Andreetto, Adam (2017), table 1.

Each convolution but the first is separated into two: a depthwise one, in which each channel has a
3x3 filter of its own, and a 1x1 convolution that mixes the channels.

Padding is TensorFlow's "SAME", which is Flax's default too, and activations stop at 6, both as in
the authors' code.
"""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from train.models import layers

# Channels and stride of each separable convolution. The last one's stride is given as 2 in table 1;
# the resolutions there, and the authors' code, say 1.
_BLOCKS = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *[(512, 1)] * 5,
    (1024, 2),
    (1024, 1),
)


class SeparableConv(nn.Module):
    """3x3 depthwise and 1x1 convolution (figure 3, right).

    Attributes:
        filters: channels of the output.
        stride: stride of the depthwise convolution.
        norm: makes a normalisation layer.
        dtype: of the computation; None for that of the input.
    """

    filters: int
    stride: int
    norm: functools.partial[nn.BatchNorm]
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [N, H, W, C] to [N, H / stride, W / stride, filters]."""
        conv = layers.conv(self.dtype)
        channels = x.shape[-1]
        x = conv(
            channels,
            (3, 3),
            strides=self.stride,
            feature_group_count=channels,
            name="depthwise_conv",
        )(x)
        x = nn.relu6(self.norm(name="depthwise_norm")(x))
        x = conv(self.filters, (1, 1), name="pointwise_conv")(x)
        return nn.relu6(self.norm(name="pointwise_norm")(x))


class MobileNetV1(nn.Module):
    """MobileNet of width 1.

    Attributes:
        num_classes: number of logits.
        norm_momentum: decay rate of BatchNorm's running averages, per step.
        axis_name: mapped axis over which BatchNorm takes its statistics; None for one device.
        axis_index_groups: groups of that axis's indices, each with its own statistics; None for
            one group of all.
        dtype: of the computation, as opposed to the parameters; None for that of the images.
        dropout_rate: share of features that are dropped before the classifier; the authors' code
            takes 0.001.
    """

    num_classes: int
    norm_momentum: float = 0.9
    axis_name: str | None = None
    axis_index_groups: Sequence[Sequence[int]] | None = None
    dtype: DTypeLike | None = None
    dropout_rate: float = 0.0

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Maps images [N, H, W, C] to logits [N, num_classes].

        Args:
            images: normalised images.
            train: whether BatchNorm uses the statistics of this batch and updates its averages, or
                uses the averages; and whether features are dropped, by the "dropout" keys.
        """
        norm = layers.batch_norm(
            train=train,
            momentum=self.norm_momentum,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            dtype=self.dtype,
        )
        x = layers.conv(self.dtype)(32, (3, 3), strides=2, name="stem_conv")(images)
        x = nn.relu6(norm(name="stem_norm")(x))
        for block, (filters, stride) in enumerate(_BLOCKS):
            x = SeparableConv(filters, stride, norm, self.dtype, name=f"block{block + 1}")(x)
        x = jnp.mean(x, axis=(1, 2))
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x)
