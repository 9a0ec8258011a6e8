"""The layers that all families of networks use in the same way."""

import functools

import flax.linen as nn
from jax.typing import DTypeLike


def conv(dtype: DTypeLike | None) -> functools.partial[nn.Conv]:
    """Makes convolutions without bias, for a normalisation follows."""
    return functools.partial(
        nn.Conv, use_bias=False, kernel_init=nn.initializers.he_normal(), dtype=dtype
    )


def batch_norm(
    *, train: bool, momentum: float, axis_name: str | None, dtype: DTypeLike | None
) -> functools.partial[nn.BatchNorm]:
    """Makes normalisation layers.

    Args:
        train: whether they use the statistics of this batch and update their averages, or use the
            averages.
        momentum: decay rate of the running averages, per step.
        axis_name: mapped axis over which statistics are taken; None for one device.
        dtype: of the computation.
    """
    return functools.partial(
        nn.BatchNorm,
        use_running_average=not train,
        momentum=momentum,
        axis_name=axis_name,
        dtype=dtype,
    )
