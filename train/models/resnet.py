"""Residual networks: He, Zhang, Ren, Sun, "Deep Residual Learning" (CVPR 2016), section 4.2.

The form for small images: a 3x3 stem without pooling, stages of two-convolution blocks, each stage
with half the resolution and twice the filters of the one before, global average pooling.
"""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (figure 5, left).

    Attributes:
        filters: channels of the output.
        stride: stride of the first convolution and of the shortcut.
        norm: makes a normalisation layer.
    """

    filters: int
    stride: int
    norm: functools.partial[nn.BatchNorm]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [N, H, W, C] to [N, H / stride, W / stride, filters]."""
        conv = functools.partial(nn.Conv, use_bias=False, kernel_init=nn.initializers.he_normal())
        y = conv(self.filters, (3, 3), strides=self.stride, name="conv1")(x)
        y = nn.relu(self.norm(name="norm1")(y))
        y = conv(self.filters, (3, 3), name="conv2")(y)
        y = self.norm(name="norm2")(y)
        if x.shape != y.shape:
            x = conv(self.filters, (1, 1), strides=self.stride, name="shortcut_conv")(x)
            x = self.norm(name="shortcut_norm")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A residual network for small images.

    Attributes:
        stage_sizes: blocks in each stage.
        num_classes: number of logits.
        width: filters of the first stage.
        norm_momentum: decay rate of BatchNorm's running averages, per step.
        axis_name: mapped axis over which BatchNorm takes its statistics; None for one device.
    """

    stage_sizes: Sequence[int]
    num_classes: int
    width: int
    norm_momentum: float = 0.9
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Maps images [N, H, W, C] to logits [N, num_classes].

        Args:
            images: normalised images.
            train: whether BatchNorm uses the statistics of this batch and updates its averages, or
                uses the averages.
        """
        norm = functools.partial(
            nn.BatchNorm,
            use_running_average=not train,
            momentum=self.norm_momentum,
            axis_name=self.axis_name,
        )
        x = nn.Conv(
            self.width,
            (3, 3),
            use_bias=False,
            kernel_init=nn.initializers.he_normal(),
            name="stem_conv",
        )(images)
        x = nn.relu(norm(name="stem_norm")(x))
        for stage, num_blocks in enumerate(self.stage_sizes):
            for block in range(num_blocks):
                x = BasicBlock(
                    filters=self.width * 2**stage,
                    stride=2 if stage > 0 and block == 0 else 1,
                    norm=norm,
                    name=f"stage{stage + 1}_block{block + 1}",
                )(x)
        return nn.Dense(self.num_classes, name="head")(jnp.mean(x, axis=(1, 2)))
