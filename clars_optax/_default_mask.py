"""Which parameters have trust ratios and decay."""

from typing import Any

import jax
import jax.numpy as jnp

from clars_optax._trees import key_names

_NOT_SCALED = ("bias", "scale", "offset", "b")


def default_mask(params: Any) -> Any:
    """Tells the weights from the biases and the scales of normalisation layers.

    A leaf is a weight if two or more of its axes are longer than 1 and the last key of its path is
    none of ``bias``, ``scale``, ``offset`` and ``b``. A kernel with a single output counts as a
    vector. The attribute ``value`` at the end of a path is the box of a variable (Flax NNX, or
    Linen's ``Partitioned``), not its name, and is passed over.

    Args:
      params: a tree of arrays (parameters or gradients).

    Returns:
      A tree like ``params`` of booleans, True for the weights.

    Raises:
      ValueError: if ``params`` is a step count, which is what ``optax.inject_hyperparams`` calls
        this function with unless it is told that the masks are no schedules.

    Example:
      >>> import clars_optax
      >>> import jax.numpy as jnp
      >>> clars_optax.default_mask({"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)})
      {'bias': False, 'kernel': True}
    """
    if isinstance(params, int) or (
        hasattr(params, "dtype")
        and jnp.ndim(params) == 0
        and jnp.issubdtype(params.dtype, jnp.integer)
    ):
        raise ValueError(
            f"`default_mask` expects a tree of parameters, but got a step count, {params}: "
            "`optax.inject_hyperparams` takes every callable for a schedule. Pass it "
            'static_args=("weight_decay_mask", "trust_ratio_mask").'
        )

    def is_weight(path: tuple[Any, ...], leaf: Any) -> bool:
        long_axes = sum(size > 1 for size in jnp.shape(leaf))
        return long_axes >= 2 and key_names(path)[-1:] not in [(name,) for name in _NOT_SCALED]

    return jax.tree_util.tree_map_with_path(is_weight, params)
