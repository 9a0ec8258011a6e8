"""Densely connected networks: Huang, Liu, van der Maaten, Weinberger (CVPR 2017), DenseNet-BC.

Every layer of a dense block sees the feature maps of all layers before it: it reads their
concatenation and adds `growth_rate` channels to it. B is the bottleneck, a 1x1 convolution in front
of each 3x3; C is the compression, by which the layers between blocks halve the channels.

The stem's convolution and pooling are padded by as much on either side, as in the authors' code.
Flax's default, "SAME", would pad an even size on its far side only.
"""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from train.models import layers

_BOTTLENECK = 4  # channels of the 1x1 convolution, in growth rates (section 3)


class DenseLayer(nn.Module):
    """BN-ReLU-Conv(1x1)-BN-ReLU-Conv(3x3), and the input beside the result (section 3).

    Attributes:
        growth_rate: channels that are added.
        norm: makes a normalisation layer.
        dropout: makes a dropout layer.
        dtype: of the computation; None for that of the input.
    """

    growth_rate: int
    norm: functools.partial[nn.BatchNorm]
    dropout: functools.partial[nn.Dropout]
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [N, H, W, C] to [N, H, W, C + growth_rate]."""
        conv = layers.conv(self.dtype)
        y = nn.relu(self.norm(name="norm1")(x))
        y = conv(_BOTTLENECK * self.growth_rate, (1, 1), name="conv1")(y)
        y = self.dropout()(y)
        y = nn.relu(self.norm(name="norm2")(y))
        y = conv(self.growth_rate, (3, 3), name="conv2")(y)
        y = self.dropout()(y)
        return jnp.concatenate([x, y], axis=-1)


class Transition(nn.Module):
    """Half the channels and half the resolution, between two dense blocks.

    Attributes:
        norm: makes a normalisation layer.
        dropout: makes a dropout layer.
        dtype: of the computation; None for that of the input.
    """

    norm: functools.partial[nn.BatchNorm]
    dropout: functools.partial[nn.Dropout]
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [N, H, W, C] to [N, H / 2, W / 2, C / 2].

        Raises:
            ValueError: there is nothing left to halve.
        """
        if min(x.shape[1:3]) < 2:
            raise ValueError(
                f"--image-size is too small for this network: {self.name} would halve an image of "
                f"{x.shape[1]}x{x.shape[2]}. Choose a larger one, or a network for small images."
            )
        channels = x.shape[-1] // 2
        x = nn.relu(self.norm(name="norm")(x))
        x = layers.conv(self.dtype)(channels, (1, 1), name="conv")(x)
        x = self.dropout()(x)
        return nn.avg_pool(x, (2, 2), strides=(2, 2))


class DenseNet(nn.Module):
    """DenseNet-BC.

    Attributes:
        block_sizes: layers in each dense block; (6, 12, 24, 16) is DenseNet-121, three blocks of
            (depth - 4) / 6 are the networks for small images.
        num_classes: number of logits.
        growth_rate: channels that each layer adds, the paper's k.
        large_images: whether the stem is the one for ImageNet, 7x7 with stride 2 and max pooling,
            or the 3x3 for small images.
        norm_momentum: decay rate of BatchNorm's running averages, per step.
        axis_name: mapped axis over which BatchNorm takes its statistics; None for one device.
        axis_index_groups: groups of that axis's indices, each with its own statistics; None for
            one group of all.
        dtype: of the computation, as opposed to the parameters; None for that of the images.
        dropout_rate: share of values that are dropped after each convolution but the first; the
            paper takes 0.2 where it does not augment (section 4.2).
    """

    block_sizes: Sequence[int]
    num_classes: int
    growth_rate: int
    large_images: bool = False
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
                uses the averages; and whether values are dropped, by the "dropout" keys.
        """
        norm = layers.batch_norm(
            train=train,
            momentum=self.norm_momentum,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            dtype=self.dtype,
        )
        dropout = functools.partial(nn.Dropout, self.dropout_rate, deterministic=not train)
        x = layers.conv(self.dtype)(
            2 * self.growth_rate,
            (7, 7) if self.large_images else (3, 3),
            strides=2 if self.large_images else 1,
            padding=3 if self.large_images else 1,
            name="stem_conv",
        )(images)
        if self.large_images:
            x = nn.relu(norm(name="stem_norm")(x))
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for block, num_layers in enumerate(self.block_sizes):
            if block > 0:
                x = Transition(norm, dropout, self.dtype, name=f"transition{block}")(x)
            for layer in range(num_layers):
                name = f"block{block + 1}_layer{layer + 1}"
                x = DenseLayer(self.growth_rate, norm, dropout, self.dtype, name=name)(x)
        x = nn.relu(norm(name="head_norm")(x))
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x)
