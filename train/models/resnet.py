"""Residual networks: He, Zhang, Ren, Sun, "Deep Residual Learning" (CVPR 2016).

The form for small images (section 4.2): a 3x3 stem without pooling, stages of two-convolution
blocks, each stage with half the resolution and twice the filters of the one before, global average
pooling. The form for ImageNet (table 1) has a 7x7 stem with pooling and, from 50 layers on,
bottlenecks. They have their stride in the 3x3 convolution and not in the first 1x1, as everybody's
have had since ("version 1.5").

Strided convolutions and the pooling are padded by as much on either side, as in all implementations
with public weights. Flax's default, "SAME", would pad an even size on its far side only.
"""

import functools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from train.models import layers


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (figure 5, left).

    Attributes:
        filters: channels of the output.
        stride: stride of the first convolution and of the shortcut.
        norm: makes a normalisation layer.
        dtype: of the computation; None for that of the input.
        zero_init_residual: whether the last normalisation starts with a scale of 0.
        projection: whether a shortcut that changes the shape is a 1x1 convolution (option B of
            section 4.1), or has no parameters (option A): it takes every second pixel, and fills
            the new channels with zeros.
    """

    filters: int
    stride: int
    norm: functools.partial[nn.BatchNorm]
    dtype: DTypeLike | None = None
    zero_init_residual: bool = False
    projection: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [N, H, W, C] to [N, H / stride, W / stride, filters]."""
        conv = layers.conv(self.dtype)
        y = conv(self.filters, (3, 3), strides=self.stride, padding=1, name="conv1")(x)
        y = nn.relu(self.norm(name="norm1")(y))
        y = conv(self.filters, (3, 3), name="conv2")(y)
        scale_init = layers.residual_scale_init(self.zero_init_residual)
        y = self.norm(scale_init=scale_init, name="norm2")(y)
        if x.shape != y.shape:
            if self.projection:
                x = conv(self.filters, (1, 1), strides=self.stride, name="shortcut_conv")(x)
                x = self.norm(name="shortcut_norm")(x)
            else:
                x = x[:, :: self.stride, :: self.stride]
                new_channels = self.filters - x.shape[-1]
                x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, new_channels)))
        return nn.relu(x + y)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut (figure 5, right).

    Attributes:
        filters: channels of the 3x3 convolution; the output has four times as many.
        stride: stride of the 3x3 convolution and of the shortcut.
        norm: makes a normalisation layer.
        dtype: of the computation; None for that of the input.
        zero_init_residual: whether the last normalisation starts with a scale of 0.
    """

    filters: int
    stride: int
    norm: functools.partial[nn.BatchNorm]
    dtype: DTypeLike | None = None
    zero_init_residual: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [N, H, W, C] to [N, H / stride, W / stride, 4 * filters]."""
        conv = layers.conv(self.dtype)
        y = conv(self.filters, (1, 1), name="conv1")(x)
        y = nn.relu(self.norm(name="norm1")(y))
        y = conv(self.filters, (3, 3), strides=self.stride, padding=1, name="conv2")(y)
        y = nn.relu(self.norm(name="norm2")(y))
        y = conv(4 * self.filters, (1, 1), name="conv3")(y)
        scale_init = layers.residual_scale_init(self.zero_init_residual)
        y = self.norm(scale_init=scale_init, name="norm3")(y)
        if x.shape != y.shape:
            x = conv(4 * self.filters, (1, 1), strides=self.stride, name="shortcut_conv")(x)
            x = self.norm(name="shortcut_norm")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A residual network.

    Attributes:
        stage_sizes: blocks in each stage.
        num_classes: number of logits.
        width: filters of the first stage.
        norm_momentum: decay rate of BatchNorm's running averages, per step.
        axis_name: mapped axis over which BatchNorm takes its statistics; None for one device.
        axis_index_groups: groups of that axis's indices, each with its own statistics; None for
            one group of all.
        block: the kind of block.
        large_images: whether the stem is the one for ImageNet, 7x7 with stride 2 and max pooling,
            or the 3x3 for small images.
        dtype: of the computation, as opposed to the parameters; None for that of the images.
        zero_init_residual: whether the last normalisation of each block starts with a scale of 0,
            so that the block starts as its shortcut.
    """

    stage_sizes: Sequence[int]
    num_classes: int
    width: int
    norm_momentum: float = 0.9
    axis_name: str | None = None
    axis_index_groups: Sequence[Sequence[int]] | None = None
    block: Callable[..., nn.Module] = BasicBlock
    large_images: bool = False
    dtype: DTypeLike | None = None
    zero_init_residual: bool = False

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Maps images [N, H, W, C] to logits [N, num_classes].

        Args:
            images: normalised images.
            train: whether BatchNorm uses the statistics of this batch and updates its averages, or
                uses the averages.
        """
        norm = layers.batch_norm(
            train=train,
            momentum=self.norm_momentum,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            dtype=self.dtype,
        )
        x = layers.conv(self.dtype)(
            self.width,
            (7, 7) if self.large_images else (3, 3),
            strides=2 if self.large_images else 1,
            padding=3 if self.large_images else 1,
            name="stem_conv",
        )(images)
        x = nn.relu(norm(name="stem_norm")(x))
        if self.large_images:
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for stage, num_blocks in enumerate(self.stage_sizes):
            for block in range(num_blocks):
                x = self.block(
                    filters=self.width * 2**stage,
                    stride=2 if stage > 0 and block == 0 else 1,
                    norm=norm,
                    dtype=self.dtype,
                    zero_init_residual=self.zero_init_residual,
                    name=f"stage{stage + 1}_block{block + 1}",
                )(x)
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x)
