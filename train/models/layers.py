"""The layers that all families of networks use in the same way."""

import functools
from collections.abc import Sequence

import flax.linen as nn
from jax.typing import DTypeLike


def conv(dtype: DTypeLike | None) -> functools.partial[nn.Conv]:
    """Makes convolutions without bias, for a normalisation follows."""
    return functools.partial(
        nn.Conv, use_bias=False, kernel_init=nn.initializers.he_normal(), dtype=dtype
    )


def batch_norm(
    *,
    train: bool,
    momentum: float,
    axis_name: str | None,
    axis_index_groups: Sequence[Sequence[int]] | None,
    dtype: DTypeLike | None,
) -> functools.partial[nn.BatchNorm]:
    """Makes normalisation layers.

    Args:
        train: whether they use the statistics of this batch and update their averages, or use the
            averages.
        momentum: decay rate of the running averages, per step.
        axis_name: mapped axis over which statistics are taken; None for one device.
        axis_index_groups: groups of that axis's indices, each with its own statistics; None for
            one group of all.
        dtype: of the computation.
    """
    return functools.partial(
        nn.BatchNorm,
        use_running_average=not train,
        momentum=momentum,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        dtype=dtype,
    )


def residual_scale_init(zero_init_residual: bool) -> nn.initializers.Initializer:
    """Initialises the scale of the normalisation that ends a residual branch.

    Args:
        zero_init_residual: whether it is 0, so that the block starts as its shortcut (Goyal et al.,
            "Accurate, Large Minibatch SGD", 2017, section 5.1), or 1.
    """
    return nn.initializers.zeros if zero_init_residual else nn.initializers.ones
